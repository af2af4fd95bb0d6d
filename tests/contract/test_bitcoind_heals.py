"""A node that changes while the server runs: whatever it forgets, lacks or refuses, the backend recovers by itself."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from typing import Any, Self

import pytest

from paychan.chain.base import ChainFailed, ChainUnfit, Funding, Spend, WrongNetwork
from paychan.chain.bitcoind.chain import BitcoindChain
from paychan.chain.bitcoind.zmq import ZmqFeed
from paychan.protocol.fees import ChainFees
from paychan.protocol.types import Network, UnixTime
from paychan.supervisor import Supervised
from tests.contract.chains import DAY_SECONDS, FUNDING_SAT, PAST, address, refund
from tests.contract.test_bitcoind import Opener
from tests.lib.channels import Payer
from tests.lib.crashes import Crash
from tests.lib.node import Node
from tests.lib.rpcproxy import RpcProxy
from tests.lib.world import until

METHOD_NOT_FOUND = (
    404,
    json.dumps({"result": None, "error": {"code": -32601, "message": "Method not found"}, "id": 0}),
)
FORBIDDEN = (403, json.dumps({"result": None, "error": None, "id": 0}))
NONSENSE = (200, json.dumps({"result": ["what?"], "error": None, "id": 0}))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node")) as node:
        yield node


class Old:
    """A node on which two channels were funded two days ago, and one of them refunded: only a rescan finds that."""

    def __init__(self, directory: Path) -> None:
        self.node = Node(directory, born=int(time.time()) - 2 * DAY_SECONDS)
        self.payer, self.spent = Payer("funded long ago", PAST), Payer("refunded long ago", PAST)

    def __enter__(self) -> Self:
        self.node.__enter__()
        self.since = UnixTime(self.node.median_time - 3600)
        self.outpoint, self.gone = (self.node.fund(address(each), FUNDING_SAT) for each in (self.payer, self.spent))
        self.refund = refund(self.spent, Funding(self.gone, FUNDING_SAT, 1))
        self.node.send_raw(self.refund.transaction)
        self.node.mine()
        self.node.set_mock_time(0)
        self.node.mine(12)
        return self

    def __exit__(self, *_: object) -> None:
        self.node.__exit__()


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Old]:
    with Old(tmp_path_factory.mktemp("old")) as old:
        yield old


@pytest.fixture
def proxy(node: Node) -> Iterator[RpcProxy]:
    with RpcProxy(node) as proxy:
        yield proxy


@pytest.fixture
async def opener() -> AsyncIterator[Opener]:
    """Create backends that are closed at the end."""
    async with AsyncExitStack() as stack:

        def opened(url: str, node: Node, network: Network = Network.REGTEST, **settings: Any) -> BitcoindChain:
            chain = BitcoindChain(url, network, **({"credentials": node.credentials} | settings))
            stack.push_async_callback(chain.close)
            return chain

        yield opened  # type: ignore[misc]


@pytest.mark.parametrize("refusal", [METHOD_NOT_FOUND, FORBIDDEN, NONSENSE], ids=["unknown", "whitelist", "nonsense"])
@pytest.mark.parametrize("method", ["estimatesmartfee", "getmempoolinfo", "getzmqnotifications", "submitpackage"])
async def test_fault_28_what_is_optional_is_done_without(
    node: Node, proxy: RpcProxy, opener: Opener, method: str, refusal: tuple[int, str]
) -> None:
    """A node that lacks, refuses or garbles an optional answer still serves the chain."""
    proxy.refused[method] = refusal
    chain = opener(proxy.url, node)
    await chain.check()

    assert (await chain.tip()).block_hash == node.best
    assert await chain.fees() == ChainFees(None, 1, 1)
    assert [text for text in chain.capabilities.shortcomings if "estimate" in text] == (
        ["the node refuses to estimate fees: only the configured curve decides"] if method == "estimatesmartfee" else []
    )


async def test_a_node_that_can_not_be_reached_is_no_optional_answer(
    node: Node, proxy: RpcProxy, opener: Opener
) -> None:
    """A connection that is lost during a call for fees is a failure, not a fee."""
    chain = opener(proxy.url, node)
    await chain.check()
    proxy.__exit__()

    with pytest.raises(ChainFailed):
        await chain.fees()


@pytest.mark.parametrize("lost", ["unloaded", "lost"])
async def test_fault_29_a_wallet_that_went_away_is_there_again_at_the_next_question(
    tmp_path: Path, opener: Opener, lost: str
) -> None:
    """Each call that needs the wallet works after it was unloaded, or lost with its directory, at any moment."""
    payer = Payer("wallet went away", PAST)
    with Node(tmp_path, "-nosettings") as node:
        chain = opener(node.url, node)
        await chain.check()
        begun = chain.capabilities.memory
        await chain.watch([payer.terms])
        outpoint = node.fund(address(payer), FUNDING_SAT)
        node.mine()
        since = UnixTime(node.median_time - 3600)
        refunding = refund(payer, Funding(outpoint, FUNDING_SAT, 1))

        def take_away() -> None:
            node.rpc("unloadwallet", "paychan")
            if lost == "lost":
                shutil.rmtree(tmp_path / "regtest" / "wallets" / "paychan")

        for ask in (
            lambda: chain.funding(payer.terms),
            lambda: chain.watch([payer.terms], since),
            lambda: chain.adopt(payer.terms, [outpoint]),
        ):
            take_away()
            await ask()
        assert (chain.capabilities.memory > begun) == (lost == "lost")
        node.send_raw(refunding.transaction)
        node.mine()
        take_away()
        if lost == "lost":
            await chain.tip()
            assert await chain.spender(outpoint) is None
            await chain.watch([payer.terms], since)
        assert await chain.spender(outpoint) == Spend(refunding.txid, 1)
        take_away()
        await chain.tip()
        with pytest.raises(ChainFailed) if lost == "lost" else nullcontext():
            assert await chain.transaction(refunding.txid) == refunding.transaction


async def test_fault_29_a_rescan_holds_nothing_up(old: Old, opener: Opener) -> None:
    """While the node rescans old blocks, `watch` returns, outputs are seen, and an unknown spender is reported as such."""
    terms = [old.payer.terms, old.spent.terms]
    with RpcProxy(old.node) as proxy:
        chain = opener(proxy.url, old.node, wallet="slow", timeout_seconds=2, rescan_patience_seconds=0.05)
        await opener(proxy.url, old.node, wallet="slow").check()  # creates the wallet, however long that takes
        await chain.check()
        with proxy.held("rescanblockchain"):
            await chain.watch(terms, old.since)
            await chain.watch(terms, old.since)
            unspent = await chain.unspent([old.outpoint, old.gone])
            assert list(unspent) == [old.outpoint]
            assert await chain.spender(old.outpoint) is None
            with pytest.raises(ChainFailed, match="still scanning its blocks"):
                await chain.spender(old.gone)
            assert (await chain.tip()).block_hash == old.node.best
            await until(lambda: "rescanblockchain" in proxy.calls)
            await asyncio.sleep(2.2)  # longer than the deadline of one answer
            assert proxy.calls.count("rescanblockchain") == 1

        await until(lambda: not chain._rescan.under_way)
        assert (await chain.spender(old.gone)).txid == old.refund.txid  # type: ignore[union-attr]
        assert proxy.calls.count("importdescriptors") == 1
        before = proxy.calls.count("rescanblockchain")
        again = opener(proxy.url, old.node, wallet="slow")
        await again.watch(terms, old.since)
        assert proxy.calls.count("rescanblockchain") == before, "a complete address is not searched again"


async def test_fault_29_a_rescan_that_was_cut_off_is_taken_up_again(old: Old, opener: Opener) -> None:
    """After the server ended during a rescan, the next start rescans and finds everything."""
    with RpcProxy(old.node) as proxy:
        chain = opener(proxy.url, old.node, wallet="cut off", rescan_patience_seconds=0.05)
        await chain.check()
        with proxy.held("rescanblockchain"):
            await chain.watch([old.spent.terms], old.since)
            await until(lambda: "rescanblockchain" in proxy.calls)
            await chain.close()
        again = opener(proxy.url, old.node, wallet="cut off")
        await again.check()
        await again.watch([old.spent.terms], old.since)

        assert (await again.spender(old.gone)).txid == old.refund.txid  # type: ignore[union-attr]


async def test_fault_26_a_node_is_checked_again_after_each_interruption(tmp_path: Path, opener: Opener) -> None:
    """A node is absent, appears, and restarts with other settings and a new cookie.

    `tip` fails, then works, and the node's abilities are read again.
    """
    with Node(tmp_path) as node:
        node.stop()
        chain = opener(node.url, node)
        with pytest.raises(ChainUnfit, match=r"no bitcoind (answers|runs)"):
            await chain.tip()
        node.start("-blocksonly", "-mempoolfullrbf=0", "-maxmempool=7")
        assert (await chain.tip()).block_hash == node.best
        found = chain.capabilities
        assert (found.relays, found.full_rbf, found.mempool_bytes, found.news) == (False, False, 7_000_000, True)
        assert len(found.shortcomings) == 2
        node.stop()
        node.start()
        assert (await chain.tip()).block_hash == node.best
        found = chain.capabilities
        assert (found.relays, found.full_rbf, found.shortcomings) == (True, True, ())
        assert found.version >= 250_000


async def test_fault_26_a_node_that_warms_up_is_waited_for(node: Node, proxy: RpcProxy, opener: Opener) -> None:
    """Error -28, at the start and later, means that the node is not available yet; a later call is answered."""
    warming = {"result": None, "error": {"code": -28, "message": "Verifying blocks…"}, "id": 0}
    chain = opener(proxy.url, node)
    for _ in range(2):
        proxy.refused = dict.fromkeys(("getblockchaininfo", "getnetworkinfo", "uptime"), (500, json.dumps(warming)))
        with pytest.raises(ChainFailed, match=r"Verifying blocks|still starting"):
            await chain.tip()
        proxy.refused = {}
        assert (await chain.tip()).block_hash == node.best


async def test_a_wrong_network_has_its_own_error(node: Node, opener: Opener) -> None:
    """Of all reasons to refuse a node, only another network is an error of the configuration."""
    with pytest.raises(WrongNetwork):
        await opener(node.url, node, Network.LIVE).check()


@pytest.mark.parametrize("at", [1, 2, 5, 9, 14])
async def test_fault_27_a_rescan_killed_at_any_await_is_done_all_the_same(
    old: Old, opener: Opener, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever await the rescan raises, it restarts, and finds everything."""
    monkeypatch.setattr("paychan.supervisor._FIRST_PAUSE_SECONDS", 0.001)
    chain = opener(old.node.url, old.node, wallet=f"killed {at}")
    await chain.check()
    chain._rescan._run = Crash(at, turns=False)(chain._rescan._run)  # type: ignore[method-assign]
    await chain.watch([old.spent.terms], old.since)

    assert (await chain.spender(old.gone)).txid == old.refund.txid  # type: ignore[union-attr]
    (task,) = (each for each in [chain._rescan._task] if each is not None)
    assert task.restarts == 1


async def test_fault_27_news_come_after_the_feed_was_killed(
    node: Node, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever await the ZMQ feed raises, later blocks are announced; the same holds for mempool arrivals."""
    monkeypatch.setattr("paychan.supervisor._FIRST_PAUSE_SECONDS", 0.001)
    for at in (1, 2, 3):
        monkeypatch.setattr(ZmqFeed, "_receive", _killed(ZmqFeed._receive, Crash(at)))
        chain = opener(node.url, node)
        await chain.check()
        arrivals = chain._outputs._arrivals
        arrivals._scan_forever = Crash(at, turns=False)(arrivals._scan_forever)  # type: ignore[method-assign]
        payer = Payer(f"killed feed {at}")
        chain.expect(payer.terms)
        outpoint = node.fund(address(payer), FUNDING_SAT)
        node.mine()
        async with asyncio.timeout(30):
            while True:
                node.mine()
                assert chain._feed is not None
                if await chain._feed.wait(0.5):
                    break
            while outpoint not in {each.outpoint for each in await chain.funding(payer.terms)}:
                await chain.wait_for_change(await chain.tip(), 0.1)
        monkeypatch.undo()
        monkeypatch.setattr("paychan.supervisor._FIRST_PAUSE_SECONDS", 0.001)


def _killed(method: Any, crash: Crash) -> Any:
    crashing = crash(method)

    async def killed(self: ZmqFeed, task: Supervised) -> None:
        await crashing(self, task)

    return killed
