"""Answers of a lying Electrum server: each is the real answer with one change, and none is believed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import pytest

from paychan.chain.base import ChainFailed, Funding, Spend
from paychan.chain.electrum.chain import ElectrumChain
from paychan.chain.spv import HeaderChain, ViewMoved
from paychan.protocol.fees import ChainFees
from paychan.protocol.kinds.refund import sign_refund
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from tests.contract.chains import lift, settle
from tests.lib.channels import Payer
from tests.lib.electrumproxy import ElectrumProxy, Refuse
from tests.lib.electrumx import ElectrumX
from tests.lib.node import Node

FUNDED = Payer("funded three deep")
SPENT = Payer("spent two deep", UnixTime(1_400_000_000))
FUNDING_SAT = Sat(1_000_000)

SETTLEMENT = settle(FUNDED, Funding(FUNDED.outpoint, FUNDING_SAT, 1))
PAIR = (SETTLEMENT.transaction, lift(SETTLEMENT, 3_000).transaction)
"""Spends an output that never existed."""

Alter = Callable[[str, list[Any], Any], Any]


class Scene:
    """A chain with one funded and one refunded channel, and a server that reports on them."""

    def __init__(self, node: Node, server: ElectrumX) -> None:
        self.node = node
        self.server = server
        self.funded = node.fund(address(FUNDED), FUNDING_SAT)
        self.spent = node.fund(address(SPENT), FUNDING_SAT)
        node.mine()
        refund = sign_refund(SPENT.key, SPENT.terms, self.spent, FUNDING_SAT, SPENT.change_script, Sat(2_000))
        node.send_raw(refund.transaction)
        node.mine(2)
        self.refund_txid = refund.txid
        server.wait_until_synced()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("trust")
    with (
        Node(directory / "node", "-txindex=1", zmq=False) as node,
        ElectrumX(node, directory / "electrumx") as server,
    ):
        yield Scene(node, server)


@pytest.fixture
async def proxy(scene: Scene) -> AsyncIterator[ElectrumProxy]:
    async with ElectrumProxy(scene.server.tcp_port) as proxy:
        yield proxy


@pytest.fixture
async def chain(proxy: ElectrumProxy) -> AsyncIterator[ElectrumChain]:
    chain = ElectrumChain(proxy.url, Network.REGTEST, timeout_seconds=5)
    yield chain
    await chain.close()


def address(payer: Payer) -> str:
    return payer.terms.funding_address(Network.REGTEST)


def changing(method: str, change: Callable[[Any], Any]) -> Alter:
    """Change the answers to one method."""
    return lambda asked, _params, result: change(result) if asked == method else result


def first(**changes: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """Change fields of the first entry of a list."""
    return lambda entries: [{**entries[0], **changes}, *entries[1:]] if entries else entries


def flipped(text: str, at: int) -> str:
    """Flip one bit of a hex text."""
    raw = bytearray.fromhex(text)
    raw[at] ^= 1
    return raw.hex()


def all_headers(change: Callable[[str], str]) -> Callable[[dict[str, Any]], Any]:
    return lambda result: {**result, "headers": [change(header) for header in result["headers"]]}


FUNDING_LIES: dict[str, Alter] = {
    "more value": changing("blockchain.scripthash.listunspent", first(value=FUNDING_SAT + 1)),
    "another output": changing("blockchain.scripthash.listunspent", first(tx_pos=7)),
    "another transaction": changing("blockchain.scripthash.listunspent", first(tx_hash="ab" * 32)),
    "deeper": changing("blockchain.scripthash.listunspent", first(height=50)),
    "in a block to come": changing("blockchain.scripthash.listunspent", first(height=10_000)),
    "transaction with another amount": changing("blockchain.transaction.get", lambda raw: flipped(raw, -20)),
    "no transaction": changing("blockchain.transaction.get", lambda _raw: "zz"),
    "cut transaction": changing("blockchain.transaction.get", lambda raw: raw[:-2]),
    "another branch": changing("blockchain.transaction.get_merkle", lambda proof: {**proof, "merkle": ["cd" * 32]}),
    "another position": changing("blockchain.transaction.get_merkle", lambda proof: {**proof, "pos": proof["pos"] ^ 2}),
    "no branch": changing("blockchain.transaction.get_merkle", lambda proof: {**proof, "merkle": []}),
    "headers with another root": changing("blockchain.block.headers", all_headers(lambda raw: flipped(raw, 40))),
    "headers with another parent": changing("blockchain.block.headers", all_headers(lambda raw: flipped(raw, 10))),
    "headers the wrong way": changing(
        "blockchain.block.headers", lambda result: {**result, "headers": result["headers"][::-1]}
    ),
    "headers of half a size": changing("blockchain.block.headers", all_headers(lambda raw: raw[:80])),
    "too many headers": changing(
        "blockchain.block.headers", lambda result: {**result, "headers": result["headers"] * 200}
    ),
    "no headers": changing("blockchain.block.headers", lambda result: {**result, "headers": []}),
    "height that is none": changing("blockchain.headers.subscribe", lambda result: {**result, "height": -1}),
    "value that is none": changing("blockchain.scripthash.listunspent", first(value=-1)),
    "text for a number": changing("blockchain.scripthash.listunspent", first(height="7")),
}


@pytest.mark.parametrize("lie", FUNDING_LIES)
async def test_threat_2_funding(scene: Scene, proxy: ElectrumProxy, chain: ElectrumChain, lie: str) -> None:
    """Threat 2: funding with one changed detail is an error, never an answer; the honest answer works again."""
    proxy.alter = FUNDING_LIES[lie]
    with pytest.raises(ChainFailed):
        await chain.funding(FUNDED.terms)
    proxy.alter = lambda _method, _params, result: result
    await eventually(lambda: chain.funding(FUNDED.terms), (Funding(scene.funded, FUNDING_SAT, 3),))


async def test_listed_twice(scene: Scene, proxy: ElectrumProxy, chain: ElectrumChain) -> None:
    """An output listed both as confirmed and in the mempool, as ElectrumX does after a block, counts once."""
    proxy.alter = lambda method, _params, result: (
        twice(result) if method.startswith("blockchain.scripthash") else result
    )
    assert await chain.funding(FUNDED.terms) == (Funding(scene.funded, FUNDING_SAT, 3),)
    await chain.watch([FUNDED.terms, SPENT.terms])
    assert await chain.unspent([scene.funded]) == {scene.funded: Funding(scene.funded, FUNDING_SAT, 3)}
    assert await chain.spender(scene.spent) == Spend(scene.refund_txid, 2)


def twice(entries: Any) -> Any:
    return [*entries, *({**entry, "height": 0} for entry in entries)] if isinstance(entries, list) else entries


async def test_threat_2_output_of_others(scene: Scene, proxy: ElectrumProxy, chain: ElectrumChain) -> None:
    """Threat 2: an output of the right amount and depth that pays to another script is an error."""
    other = {"tx_hash": scene.spent.txid_hex, "tx_pos": scene.spent.vout}
    proxy.alter = changing("blockchain.scripthash.listunspent", first(**other))
    with pytest.raises(ChainFailed, match="does not pay"):
        await chain.funding(FUNDED.terms)


SPENDING_LIES: dict[str, Alter] = {
    "deeper": changing(
        "blockchain.scripthash.get_history", lambda entries: [{**entry, "height": 50} for entry in entries]
    ),
    "transaction that it is not": changing("blockchain.transaction.get", lambda raw: flipped(raw, -20)),
}


@pytest.mark.parametrize("lie", SPENDING_LIES)
async def test_spending(scene: Scene, proxy: ElectrumProxy, chain: ElectrumChain, lie: str) -> None:
    """A spend with one changed detail is an error."""
    await chain.watch([SPENT.terms])
    assert await chain.spender(scene.spent) == Spend(scene.refund_txid, 2)
    proxy.alter = SPENDING_LIES[lie]
    with pytest.raises(ChainFailed):
        await ElectrumChain.spender(chain, scene.spent)


async def test_other_spender(scene: Scene, proxy: ElectrumProxy, chain: ElectrumChain) -> None:
    """A transaction that does not spend the output is not its spender, even if the history lists it."""
    await chain.watch([FUNDED.terms])
    refund = OutPoint(scene.refund_txid, 0).txid_hex
    proxy.alter = changing("blockchain.scripthash.get_history", lambda _: [{"tx_hash": refund, "height": 103}])
    assert await chain.spender(scene.funded) is None


async def test_unwatched(scene: Scene, chain: ElectrumChain) -> None:
    """A request for an output at no watched script is a failure, not an answer."""
    with pytest.raises(ChainFailed, match="not watched"):
        await chain.unspent([scene.funded])


@pytest.mark.parametrize(
    ("estimate", "mempool", "relay", "increment", "fees"),
    [
        (0.00012345, 0.00001, 0.00001, 0.00001, ChainFees(13, 1, 1)),
        (0.00001, 0.00001, 0.00001, 0.000001, ChainFees(1, 1, 1)),
        (1e-05, 0.0000501, 0.00001, 0.00001001, ChainFees(1, 6, 2)),
        (0.000001, 0.000001, 0.00002, 0.00003, ChainFees(1, 2, 3)),
        (0.00057, 0, 0, 0, ChainFees(57, 1, 1)),
        (-1, 0.001, 0.00001, 0.00001, ChainFees(None, 100, 1)),
    ],
)
async def test_fees(
    proxy: ElectrumProxy,
    chain: ElectrumChain,
    estimate: float,
    mempool: float,
    relay: float,
    increment: float,
    fees: ChainFees,
) -> None:
    """BTC per 1000 vB becomes satoshi per vB exactly, rounded up, at least 1; the floor is the higher of two."""
    info = {"mempoolminfee": mempool, "minrelaytxfee": relay, "incrementalrelayfee": increment}
    made_up = {"blockchain.estimatefee": estimate, "mempool.get_info": info}
    proxy.alter = lambda method, _params, result: made_up.get(method, result)
    assert await chain.fees() == fees


async def test_no_increment(proxy: ElectrumProxy, chain: ElectrumChain) -> None:
    """If a server reports no increment, the nodes' default applies."""
    proxy.alter = changing("mempool.get_info", lambda _: {"mempoolminfee": 0.00002, "minrelaytxfee": 0.00001})
    assert await chain.fees() == ChainFees(None, 2, 1)


@pytest.mark.parametrize("rate", [-2, 1.1, 1e300, "NaN", "Infinity", None, "a lot"])
@pytest.mark.parametrize("of", ["estimate", "mempoolminfee", "minrelaytxfee", "incrementalrelayfee"])
async def test_no_fee_rate(proxy: ElectrumProxy, chain: ElectrumChain, of: str, rate: Any) -> None:
    """An impossible fee rate is ignored: there is no estimate, or the nodes' default applies."""
    made_up = {
        "blockchain.estimatefee": lambda _: rate if of == "estimate" else 0.00005,
        "mempool.get_info": lambda info: info if of == "estimate" else {**info, of: rate},
    }
    proxy.alter = lambda method, _params, result: made_up[method](result) if method in made_up else result
    assert await chain.fees() == ChainFees(None if of == "estimate" else 5, 1, 1)


@pytest.mark.parametrize("verdict", [{}, {"success": "yes"}, {"success": False, "errors": [{}]}, None, "txid"])
async def test_no_verdict(proxy: ElectrumProxy, chain: ElectrumChain, verdict: Any) -> None:
    """An unreadable answer to a package is an error, not a success."""
    proxy.alter = changing("blockchain.transaction.broadcast_package", lambda _: verdict)
    with pytest.raises(ChainFailed):
        await chain.publish(*PAIR)


async def test_package_refused(proxy: ElectrumProxy, chain: ElectrumChain) -> None:
    """After a refused package, its transactions are sent one by one; the error has the server's reason for both."""
    with pytest.raises(ChainFailed, match=r"(?s)transaction.broadcast refused.*with its child: \w+"):
        await chain.publish(*PAIR)


async def test_long_history(scene: Scene, proxy: ElectrumProxy, chain: ElectrumChain) -> None:
    """A script whose history is too long for the server affects neither other scripts nor its own funding."""
    proxy.alter = changing("blockchain.scripthash.subscribe", refuse)
    await chain.watch([FUNDED.terms, SPENT.terms])
    assert await chain.unspent([scene.funded]) == {scene.funded: Funding(scene.funded, FUNDING_SAT, 3)}


async def test_busy(scene: Scene, proxy: ElectrumProxy, chain: ElectrumChain) -> None:
    """A server that is too busy to look up a transaction has not denied its existence."""
    await chain.watch([FUNDED.terms])
    proxy.alter = changing("blockchain.transaction.get", refuse)
    with pytest.raises(ChainFailed, match="code -102"):
        await chain.unspent([scene.funded])


@asynccontextmanager
async def serving(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Yield a server's port, and close its connections at the end: Python 3.11 leaves them to the garbage collector."""
    ended = list[asyncio.Task[None]]()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended.append(cast("asyncio.Task[None]", asyncio.current_task()))
        with suppress(OSError):
            await answer(reader, writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.wait(ended)


@pytest.mark.parametrize(
    "line",
    [b"", b"\n", b"{}", b"[1]\n", b"\xff\xfe\n", b'{"id": true}\n', b'{"id":0,"result":' + b"[" * 100_000 + b"\n"],
    ids=repr,
)
async def test_no_json_rpc(line: bytes) -> None:
    """A server that answers with anything but JSON-RPC, or disconnects, is an error at once."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(line)
        writer.close()

    async with serving(answer) as port:
        chain = ElectrumChain(f"tcp://127.0.0.1:{port}", Network.REGTEST, timeout_seconds=5)
        with pytest.raises(ChainFailed, match=rf"^tcp://127\.0\.0\.1:{port}: server.version: "):
            await chain.tip()
        await chain.close()


async def test_endless_line() -> None:
    """A server that sends an endless line is disconnected before it fills the memory."""
    sent = 0

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while not writer.is_closing():
            writer.write(b"x" * 1_000_000)
            sent += 1_000_000
            await writer.drain()

    async with serving(flood) as port:
        chain = ElectrumChain(f"tcp://127.0.0.1:{port}", Network.REGTEST, timeout_seconds=20)
        with pytest.raises(ChainFailed, match="a line of more than"):
            await chain.tip()
        await chain.close()
    assert sent < 40_000_000


@pytest.mark.parametrize("blocks", [5, 40])
async def test_shorter_chain(scene: Scene, proxy: ElectrumProxy, chain: ElectrumChain, blocks: int) -> None:
    """If a server goes back some blocks, the backend follows; the median time is still that of eleven blocks."""
    height = (await chain.tip()).height - blocks

    def shorten(method: str, params: list[Any], result: Any) -> Any:
        if method == "blockchain.block.headers":
            return {**result, "headers": result["headers"][: max(0, height + 1 - params[0])]}
        return {**result, "height": height} if method == "blockchain.headers.subscribe" else result

    proxy.alter = shorten
    expected = scene.node.rpc("getblockheader", scene.node.rpc("getblockhash", height))
    shorter = await chain.tip()
    assert (shorter.height, shorter.block_hash) == (height, expected["hash"])
    assert (shorter.time, shorter.median_time) == (expected["time"], expected["mediantime"])


class TestHeaders:
    def test_connected(self, scene: Scene) -> None:
        """Headers without continuous links form no chain, in one answer or over several answers."""
        lower, middle, upper = (
            bytes.fromhex(scene.node.rpc("getblockheader", scene.node.rpc("getblockhash", height), False))
            for height in (10, 11, 12)
        )
        chain = HeaderChain(Network.REGTEST)
        with pytest.raises(ViewMoved, match="does not follow"):
            chain.parse(lower + upper)
        chain.replace(12, chain.parse(upper))
        with pytest.raises(ViewMoved, match="does not follow"):
            chain.prepend(chain.parse(lower))
        chain.prepend(chain.parse(lower + middle))
        assert (chain.base, chain.height) == (10, 12)
        assert chain.at(11).previous == chain.at(10).block_hash
        for height in (9, 13):
            with pytest.raises(ViewMoved, match="not in the chain"):
                chain.at(height)

    def test_work_of_the_live_network(self, scene: Scene) -> None:
        """Headers that are valid on regtest, and the first live header, lack the work that the live network requires."""
        genesis = (
            "0100000000000000000000000000000000000000000000000000000000000000000000003ba3edfd7a7b12b27ac72c3e67768f61"
            "7fc81bc3888a51323a9fb8aa4b1e5e4a29ab5f49ffff001d1dac2b7c"
        )
        regtest = scene.node.rpc("getblockheader", scene.node.best, False)
        HeaderChain(Network.REGTEST).parse(bytes.fromhex(regtest))
        HeaderChain(Network.TEST).parse(bytes.fromhex(genesis))
        for raw, network in ((genesis, Network.LIVE), (regtest, Network.LIVE), (regtest, Network.TEST)):
            with pytest.raises(ChainFailed, match="lacks the work"):
                HeaderChain(network).parse(bytes.fromhex(raw))

    def test_transaction_as_a_node(self, scene: Scene) -> None:
        """CVE-2017-12842: a merkle proof with a node that is a transaction of 64 bytes proves nothing."""
        chain = HeaderChain(Network.REGTEST)
        header = scene.node.rpc("getblockheader", scene.node.best, False)
        chain.replace(100, chain.parse(bytes.fromhex(header)))
        # version, one input (empty script), one output (4 bytes of script), lock time
        pair = bytes.fromhex("0100000001" + "11" * 36 + "00ffffffff01" + "00" * 8 + "04" + "22" * 4 + "00" * 4)
        assert len(pair) == 64
        with pytest.raises(ViewMoved, match="invalid node"):
            chain.check_inclusion(100, pair[:32], [pair[32:]], 0)


def refuse(_: Any) -> Any:
    raise Refuse(-102)


async def eventually(ask: Callable[[], Awaitable[Any]], expected: Any) -> None:
    for _ in range(400):
        try:
            if (answer := await ask()) == expected:
                return
        except ChainFailed as failure:
            answer = failure
        await asyncio.sleep(0.05)
    assert answer == expected


@pytest.mark.parametrize("method", ["blockchain.estimatefee", "blockchain.relayfee"])
@pytest.mark.parametrize("output", [None, "what?", -2, 10**9, Refuse(-32601)], ids=repr)
async def test_fault_28_a_server_without_fees_serves_all_else(
    proxy: ElectrumProxy, chain: ElectrumChain, method: str, output: Any
) -> None:
    """If a server refuses or garbles fees, the floor is the default, one shortcoming says so, and the chain is visible."""

    def alter(asked: str, _params: list[Any], result: Any) -> Any:
        if asked not in (method, "mempool.get_info" if method == "blockchain.relayfee" else method):
            return result
        if isinstance(output, Refuse):
            raise output
        return output

    proxy.alter = alter
    fees = await chain.fees()

    assert (fees.estimate_sat_per_vb, fees.floor_sat_per_vb, fees.increment_sat_per_vb) == (None, 1, 1)
    assert len(chain.capabilities.shortcomings) == 1
    assert (await chain.tip()).height > 0
    proxy.alter = lambda _method, _params, result: result
    await chain.fees()
    assert chain.capabilities.shortcomings == ()
