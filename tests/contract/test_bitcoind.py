"""The bitcoind backend beyond the chain's contract: which nodes it refuses, and how it searches."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import uvloop

from paychan.chain.base import ChainFailed, ChainUnfit, Funding, Spend
from paychan.chain.bitcoind.chain import BitcoindChain
from paychan.chain.bitcoind.zmq import reachable
from paychan.protocol.types import Network, Sat
from tests.contract.chains import (
    DAY_SECONDS,
    FUNDING_SAT,
    PAST,
    PATIENCE_SECONDS,
    address,
    eventually,
    lift,
    refund,
    reserve_of,
    settle,
)
from tests.lib.channels import Payer
from tests.lib.node import Node

Opener = Callable[..., BitcoindChain]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node"), login="operator:secret") as node:
        yield node


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A pruned node without its old blocks, with old funding and a wallet that missed blocks."""
    born = int(time.time()) - 2 * DAY_SECONDS
    with Node(tmp_path_factory.mktemp("pruned"), "-prune=1", "-fastprune", born=born) as node:
        node.fund(address(Payer("in a pruned block")), FUNDING_SAT)
        node.mine()
        node.rpc("createwallet", "asleep", True, True)
        descriptor = node.rpc("getdescriptorinfo", f"addr({address(Payer('asleep'))})")["descriptor"]
        node.rpc("importdescriptors", [{"desc": descriptor, "timestamp": "now"}], wallet="asleep")
        node.rpc("unloadwallet", "asleep")
        node.mine(700)
        node.set_mock_time(0)
        node.mine(12)
        node.rpc("pruneblockchain", 500)
        assert node.rpc("getblockchaininfo")["pruneheight"] > 130
        yield node


@pytest.fixture
async def opener() -> AsyncIterator[Opener]:
    """Create backends that are closed at the end."""
    async with AsyncExitStack() as stack:

        def opened(node: Node, network: Network = Network.REGTEST, **settings: object) -> BitcoindChain:
            chain = BitcoindChain(node.url, network, **({"credentials": node.credentials} | settings))
            stack.push_async_callback(chain.close)
            return chain

        yield opened


class TestUnfitNodes:
    @pytest.mark.parametrize(("found", "configured"), [("signet", Network.REGTEST), ("testnet4", Network.LIVE)])
    async def test_wrong_network(self, tmp_path: Path, opener: Opener, found: str, configured: Network) -> None:
        """A node of another network is refused by name, also if it appears behind the URL later."""
        with Node(tmp_path, network=found) as node:
            for ask in (opener(node, configured).check, opener(node, configured).tip):
                with pytest.raises(ChainUnfit, match=rf'node of "{found}".*network = "{configured.value}".*Correct'):
                    await ask()

    async def test_any_test_network(self, tmp_path: Path, opener: Opener) -> None:
        """Network "test" accepts a node of any test network; this one is refused only because it is not synced."""
        with Node(tmp_path, network="signet") as node, pytest.raises(ChainUnfit, match="initial block download"):
            await opener(node, Network.TEST).check()

    async def test_threat_33_initial_download(self, tmp_path: Path, opener: Opener) -> None:
        """Threat 33: a node whose newest block is old, because it is catching up, is refused."""
        with Node(tmp_path, born=int(time.time()) - 3 * DAY_SECONDS) as node:
            node.stop()
            node.start()
            with pytest.raises(ChainUnfit, match=r"initial block download: height 140.*usable when"):
                await opener(node).check()
            node.mine()
            await opener(node).check()

    async def test_wrong_credentials(self, node: Node, opener: Opener, tmp_path: Path) -> None:
        """Wrong credentials and a missing file are reported with the file's name; the password is not shown."""
        wrong = tmp_path / "login"
        wrong.write_text("operator:wrong-secret")
        with pytest.raises(ChainUnfit, match=rf"refuses the credentials of {wrong}.*chain.credentials") as caught:
            await opener(node, credentials=wrong).check()
        assert "wrong-secret" not in str(caught.value)
        with pytest.raises(ChainUnfit, match=rf"can't read {tmp_path}/none: No such file.*chain.credentials"):
            await opener(node, credentials=tmp_path / "none").check()

    async def test_credentials_in_the_url(self, node: Node) -> None:
        """Secrets come from files: a URL with a password is refused without showing the password."""
        chain = BitcoindChain(node.url_with_credentials, Network.REGTEST, credentials=node.credentials)
        with pytest.raises(ChainUnfit, match=r"write them into a file") as caught:
            await chain.check()
        await chain.close()
        assert "secret" not in str(caught.value)

    async def test_no_listener(self, tmp_path: Path, opener: Opener) -> None:
        """A URL without a listener is refused with the remedy, and every other call fails."""
        with Node(tmp_path) as node:
            chain = opener(node)
            await chain.check()
        with pytest.raises(ChainUnfit, match=rf"no bitcoind answers: {node.url}.*Start it with server=1"):
            await opener(node).check()
        with pytest.raises(ChainFailed, match=node.url):
            await chain.tip()

    async def test_no_bitcoind(self, node: Node) -> None:
        """Another service behind the URL is not accepted as a node."""
        server = await asyncio.start_server(_answer_html, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        chain = BitcoindChain(f"http://{host}:{port}", Network.REGTEST, credentials=node.credentials)
        with pytest.raises(ChainUnfit, match=r"without JSON"):
            await chain.check()
        await chain.close()
        server.close()
        await server.wait_closed()

    async def test_silent_node(self, node: Node) -> None:
        """A call to a node that accepts connections but never answers times out."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            chain = BitcoindChain(url, Network.REGTEST, credentials=node.credentials, timeout_seconds=0.2)
            with pytest.raises(ChainFailed, match=r"did not answer getblockchaininfo within 0\.2 s"):
                await chain.check()
            await chain.close()

    async def test_no_wallets(self, tmp_path: Path, opener: Opener) -> None:
        """A node without wallet support is refused with the remedy."""
        with Node(tmp_path, "-disablewallet") as node:
            node.rpc("generatetodescriptor", 1, "raw(51)")
            with pytest.raises(ChainUnfit, match=r"runs without wallet support. Remove disablewallet"):
                await opener(node).check()

    async def test_wallet_with_keys(self, node: Node, opener: Opener) -> None:
        """A wallet that holds another user's keys is not used."""
        with pytest.raises(ChainUnfit, match=r'"miner" belongs to another user. Set chain.wallet to another name'):
            await opener(node, wallet="miner").check()


class TestPruned:
    async def test_lost_wallet(self, pruned: Node, opener: Opener) -> None:
        """Channels older than the node's blocks can't be followed again; younger ones can."""
        chain = opener(pruned)
        await chain.check()
        with pytest.raises(ChainUnfit, match=r"has pruned its blocks below .* since"):
            await chain.watch([Payer("older").terms], since=pruned.median_time - 3 * DAY_SECONDS)
        await chain.watch([Payer("younger").terms], since=pruned.median_time - DAY_SECONDS)

    async def test_wallet_that_missed_blocks(self, pruned: Node, opener: Opener) -> None:
        """A wallet that missed blocks which are now pruned is refused with the remedy."""
        with pytest.raises(ChainUnfit, match=r'"asleep".*set chain.wallet to a new name'):
            await opener(pruned, wallet="asleep").check()

    async def test_funding_in_a_pruned_block(self, pruned: Node, opener: Opener) -> None:
        """Funding whose spend could not be noticed is listed but never adopted; it delays no other channel."""
        chain, buried, other = opener(pruned), Payer("in a pruned block"), Payer("beside it")
        await chain.check()
        outpoint = pruned.fund(address(other), FUNDING_SAT)
        pruned.mine()
        listed, found = await asyncio.gather(chain.funding(buried.terms), chain.funding(other.terms))
        assert found == (Funding(outpoint, FUNDING_SAT, 1),)
        for _ in range(2):
            with pytest.raises(ChainFailed, match=r"pruned"):
                await chain.adopt(buried.terms, [listed[0].outpoint])
        await chain.adopt(other.terms, [outpoint])

    async def test_reserve(self, pruned: Node, opener: Opener) -> None:
        """The reserve's coins are found and followed like those of channels; a pruned block hides both."""
        chain, payer, reserve = opener(pruned), Payer("helped on a pruned node", PAST), reserve_of()
        await chain.check()
        await chain.watch([payer.terms])
        outpoints = [pruned.fund(address(each), FUNDING_SAT) for each in (payer, reserve)]
        pruned.mine()
        funding, coin = (Funding(outpoint, FUNDING_SAT, 1) for outpoint in outpoints)
        assert await chain.funding(reserve) == (coin,)
        await chain.adopt(reserve, [coin.outpoint])
        assert await chain.unspent([coin.outpoint]) == {coin.outpoint: coin}
        settlement = settle(payer, funding, to=reserve.funding_script, reserve=reserve_of(coin))
        await chain.publish(settlement.transaction)
        pruned.mine()
        assert await chain.spender(coin.outpoint) == Spend(settlement.txid, 1)
        assert [each.outpoint.txid for each in await chain.funding(reserve)] == [settlement.txid]


class TestFollowing:
    async def test_lost_wallet(self, node: Node, opener: Opener) -> None:
        """A new wallet that is given a time learns the funding and the spends since then."""
        payer, spent = Payer("lost wallet", PAST), Payer("lost wallet, spent", PAST)
        since = node.rpc("getblockchaininfo")["time"]
        outpoint, gone = node.fund(address(payer), FUNDING_SAT), node.fund(address(spent), FUNDING_SAT)
        refunding = refund(spent, Funding(gone, FUNDING_SAT, 1))
        node.send_raw(refunding.transaction)
        node.mine()
        chain = opener(node, wallet="another")
        await chain.check()
        assert await chain.spender(gone) is None
        await chain.watch([payer.terms, spent.terms], since=since)
        assert await chain.funding(payer.terms) == (Funding(outpoint, FUNDING_SAT, 1),)
        assert await chain.spender(gone) == Spend(refunding.txid, 1)

    async def test_many_at_once(self, node: Node, opener: Opener) -> None:
        """Many concurrent callers with unwatched addresses share scans, and each gets its own answer."""
        chain = opener(node)
        await chain.check()
        payers = [Payer(f"at once {number}") for number in range(40)]
        outpoints = [node.fund(address(payer), 10_000 + number) for number, payer in enumerate(payers)]
        node.mine()
        found = await asyncio.gather(*(chain.funding(payer.terms) for payer in payers))
        expected = [(Funding(outpoint, Sat(10_000 + number), 1),) for number, outpoint in enumerate(outpoints)]
        assert list(found) == expected

    async def test_fault_33_an_arriving_output_is_seen_on_every_path(self, node: Node, opener: Opener) -> None:
        """In a block without having been in the mempool; in a block of another branch; in blocks that were not read."""
        chain = opener(node)
        await chain.check()
        payers = [Payer(f"arrives {number}", PAST) for number in range(3)]
        for payer in payers:
            chain.expect(payer.terms)
            assert await chain.funding(payer.terms) == ()  # a scan has found no output: from now on only arrivals count

        def paying(payer: Payer) -> str:
            """A transaction that is in no mempool."""
            (coin, *_) = [each for each in node.rpc("listunspent", wallet="miner") if each["amount"] > 1]
            outputs = [{address(payer): "0.1"}, {node.address(): str(coin["amount"] - Decimal("0.101"))}]
            inputs = [{"txid": coin["txid"], "vout": coin["vout"]}]
            raw = node.rpc("createrawtransaction", inputs, outputs)
            return str(node.rpc("signrawtransactionwithwallet", raw, wallet="miner")["hex"])

        node.mine_only(paying(payers[0]))
        assert [each.confirmations for each in await chain.funding(payers[0].terms)] == [1]
        node.mine(2)
        await chain.funding(payers[1].terms)
        node.reorg(2, paying(payers[1]))
        assert [each.confirmations for each in await chain.funding(payers[1].terms)] == [3]
        await chain._outputs._arrivals.close()
        node.mine_only(paying(payers[2]))
        node.mine(30)
        assert [each.confirmations for each in await chain.funding(payers[2].terms)] == [31]

    async def test_a_reserve_that_was_funded_before_it_was_watched_is_known(
        self, opener: Opener, tmp_path: Path
    ) -> None:
        """A coin sent days before the server's first start is listed, and its spend is noticed."""
        with Node(tmp_path, born=int(time.time()) - 2 * DAY_SECONDS) as node:
            coin = Funding(node.fund(address(reserve_of()), 50_000), Sat(50_000), 6)
            node.mine(6)
            node.set_mock_time(0)
            chain = opener(node)
            await chain.check()
            await chain.watch([reserve_of()])
            await eventually(lambda: chain.funding(reserve_of()), (coin,))
            await eventually(chain._wallet.unsearched, [])
            payer = Payer("helped by an old coin", PAST)
            await chain.watch([payer.terms])
            funding = Funding(node.fund(address(payer), FUNDING_SAT), FUNDING_SAT, 1)
            node.mine()
            settlement = settle(payer, funding, to=reserve_of().funding_script, reserve=reserve_of(coin))
            await chain.publish(settlement.transaction)
            node.mine()
            assert await chain.spender(coin.outpoint) == Spend(settlement.txid, 1)

    async def test_deposits_older_than_the_opening_are_known(self, opener: Opener, tmp_path: Path) -> None:
        """Of two outputs of two days ago, one opened a channel: v1 lists the other, and after the next scan it stays known."""
        with Node(tmp_path, born=int(time.time()) - 2 * DAY_SECONDS) as node:
            payer = Payer("twice", PAST)
            first, second = (node.fund(address(payer), sat) for sat in (FUNDING_SAT, 5_000))
            node.mine(6)
            node.set_mock_time(0)
            node.mine(30)
            chain = opener(node)
            await chain.check()
            await chain.adopt(payer.terms, [first])
            listed = {each.outpoint for _, each in await chain.deposits([payer.terms, Payer("other", PAST).terms])}
            assert listed == {first}
            assert {each.outpoint for each in await chain.funding(payer.terms)} == {first, second}
            await chain._outputs.completing.look()
            third = node.fund(address(payer), 7_000)
            again = opener(node)
            await again.check()
            assert {each.outpoint for _, each in await again.deposits([payer.terms])} == {first, second, third}
            assert {each.value_sat for each in await again.funding(payer.terms)} == {FUNDING_SAT, 5_000, 7_000}
            assert await again._wallet.unsearched() == []

    async def test_interrupted_search(self, node: Node, opener: Opener) -> None:
        """A search that the server's end interrupted is repeated, not counted as complete."""
        payer = Payer("interrupted")
        outpoint = node.fund(address(payer), FUNDING_SAT)
        node.mine()
        chain = opener(node)
        await chain.check()
        descriptor = node.rpc("getdescriptorinfo", f"addr({address(payer)})")["descriptor"]
        request = {"desc": descriptor, "timestamp": "now", "label": "paychan search"}
        node.rpc("importdescriptors", [request], wallet="paychan")
        assert await chain.funding(payer.terms) == (Funding(outpoint, FUNDING_SAT, 1),)
        await chain.adopt(payer.terms, [outpoint])
        assert node.rpc("getaddressinfo", address(payer), wallet="paychan")["labels"] == ["paychan adopted"]

    async def test_long_search(self, node: Node, opener: Opener) -> None:
        """A caller gets the error "try again" while a scan runs; the answer is available afterwards."""
        payer = Payer("patience")
        outpoint = node.fund(address(payer), FUNDING_SAT)
        node.mine()
        chain = opener(node)
        await chain.check()
        with pytest.raises(ChainFailed, match=r"try again"):
            await chain._outputs.search.complete(chain._outputs.scripts.entry(payer.terms.funding_script.hex()), 0.0)
        assert await chain.funding(payer.terms) == (Funding(outpoint, FUNDING_SAT, 1),)

    async def test_dust(self, node: Node, opener: Opener) -> None:
        """If an address has more outputs than the limit, the most valuable ones are read."""
        payer = Payer("dusted")
        chain = opener(node)
        await chain.check()
        await chain.watch([payer.terms])
        for sat in range(1_000, 1_102):
            node.fund(address(payer), sat)
            if sat % 20 == 0:
                node.mine()  # before the chain of change outputs exceeds the mempool's limit
        node.mine()
        values = [funding.value_sat for funding in await chain.funding(payer.terms)]
        assert values == list(range(1_101, 1_001, -1))


class TestNews:
    async def test_mempool(self, node: Node, opener: Opener) -> None:
        """With ZMQ a transaction ends the wait, because it may be a double-spend."""
        chain = opener(node)
        await chain.check()
        waiting = asyncio.create_task(chain.wait_for_change(await chain.tip(), 10 * PATIENCE_SECONDS))
        await asyncio.sleep(0.2)
        node.fund(node.address(), FUNDING_SAT)
        await asyncio.wait_for(waiting, PATIENCE_SECONDS)

    async def test_dead_publisher(self, node: Node, opener: Opener) -> None:
        """A silent publisher delays a change by at most a second."""
        chain = opener(node, zmq="tcp://127.0.0.1:1")
        await chain.check()
        waiting = asyncio.create_task(chain.wait_for_change(await chain.tip(), 10 * PATIENCE_SECONDS))
        await asyncio.sleep(0.2)
        node.mine()
        await asyncio.wait_for(waiting, PATIENCE_SECONDS)

    @pytest.mark.parametrize(
        ("published", "host", "connectable"),
        [
            ("tcp://127.0.0.1:28332", "127.0.0.1", "tcp://127.0.0.1:28332"),
            ("tcp://127.0.0.1:28332", "localhost", "tcp://127.0.0.1:28332"),
            ("tcp://127.0.0.1:28332", "node.lan", None),
            ("tcp://0.0.0.0:28332", "node.lan", "tcp://node.lan:28332"),
            ("tcp://[::]:28332", "fd00::1", "tcp://[fd00::1]:28332"),
            ("tcp://*:28332", "10.0.0.2", "tcp://10.0.0.2:28332"),
            ("tcp://10.0.0.2:28332", "node.lan", "tcp://10.0.0.2:28332"),
            ("ipc:///run/bitcoind.zmq", "127.0.0.1", "ipc:///run/bitcoind.zmq"),
            ("ipc:///run/bitcoind.zmq", "node.lan", None),
        ],
    )
    def test_reachable(self, published: str, host: str, connectable: str | None) -> None:
        """A published address is converted to a reachable one, and ignored if there is none."""
        assert reachable(published, host) == connectable


class TestFees:
    async def test_estimate(self, tmp_path: Path, opener: Opener) -> None:
        """The estimate is in whole satoshi per virtual byte, at least the rate of the mined transactions."""
        with Node(tmp_path) as node:
            for _ in range(12):
                for _ in range(4):
                    node.rpc("sendtoaddress", node.address(), "0.01", *[None] * 7, "15.2", wallet="miner")
                node.mine()
            chain = opener(node)
            await chain.check()
            rate = (await chain.fees()).estimate_sat_per_vb
            assert isinstance(rate, int)
            assert 16 <= rate <= 17

    async def test_replacement_cost(self, node: Node, opener: Opener) -> None:
        """The operator's change of a transaction's priority counts, as it does for the node."""
        chain = opener(node)
        await chain.check()
        outpoint = node.fund(node.address(), FUNDING_SAT)
        fee_sat = await chain.replacement_cost(outpoint.txid)
        assert fee_sat is not None
        node.rpc("prioritisetransaction", outpoint.txid_hex, None, 1_234)
        assert await chain.replacement_cost(outpoint.txid) == fee_sat + 1_234
        node.mine()


class TestPackages:
    async def test_below_the_node_s_minimum(self, tmp_path: Path, opener: Opener) -> None:
        """No child pays for a settlement below `-minrelaytxfee`; the reason names both.

        The package's own rate suffices.
        """
        with Node(tmp_path, "-minrelaytxfee=0.0001") as node:
            chain, payer = opener(node), Payer("below relay fee", PAST)
            await chain.check()
            await chain.watch([payer.terms])
            funding = Funding(node.fund(address(payer), FUNDING_SAT), FUNDING_SAT, 0)
            settlement = settle(payer, funding, fee_sat=3_000)
            child = lift(settlement, 50_000)
            with pytest.raises(ChainFailed, match=r"min relay fee not met.*with its child.*min relay fee not met"):
                await chain.publish(settlement.transaction, child.transaction)
            assert await chain.spender(funding.outpoint) is None

    async def test_node_without_packages(self, node: Node, opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
        """A node that accepts no packages, or only with limits (Core 26), gets the two transactions one by one."""
        chain, payer = opener(node), Payer("no packages", PAST)
        await chain.check()
        await chain.watch([payer.terms])
        settlement = settle(payer, Funding(node.fund(address(payer), FUNDING_SAT), FUNDING_SAT, 0))
        child = lift(settlement, 3_000)
        monkeypatch.setattr(chain._rpc, "call", without("submitpackage", chain._rpc.call))
        for _ in range(2):
            await chain.publish(settlement.transaction, child.transaction)
            assert await chain.replacement_cost(settlement.txid) == settlement.fee_sat + child.fee_sat
        with pytest.raises(ChainFailed, match=r"with its child: .*Method not found"):
            await chain.publish(settlement.transaction, child.transaction[:-1] + b"\x01")
        node.mine()


def without(missing: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Return the node's interface without one method."""

    async def called(decoder: object, method: str, *params: object, **options: object) -> Any:
        return await call(decoder, "nonsense" if method == missing else method, *params, **options)

    return called


def test_uvloop(node: Node) -> None:
    """The backend works on the server's event loop, including notifications."""

    async def wait() -> int:
        chain = BitcoindChain(node.url, Network.REGTEST, credentials=node.credentials)
        await chain.check()
        seen = await chain.tip()
        waiting = asyncio.create_task(chain.wait_for_change(seen, 10 * PATIENCE_SECONDS))
        await asyncio.sleep(0.1)
        node.mine()
        await asyncio.wait_for(waiting, PATIENCE_SECONDS)
        height = (await chain.tip()).height
        await chain.close()
        return height - seen.height

    assert uvloop.run(wait()) == 1


async def _answer_html(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
    writer.close()
    await writer.wait_closed()
