"""The Electrum backend against a real ElectrumX on a real bitcoind: TLS, lost connections, reorgs, and wrong servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bitcoin.core import CMutableTransaction, CTransaction, CTxOut
from bitcoin.core.script import CScript

from paychan.chain.base import ChainFailed, ChainUnfit, Funding, Tip
from paychan.chain.electrum import connection as electrumwire
from paychan.chain.electrum import session as electrumlink
from paychan.chain.electrum.chain import ElectrumChain
from paychan.protocol.fees import ChainFees
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from tests.contract.chains import lift, settle
from tests.lib.channels import Payer
from tests.lib.electrumx import ElectrumX, make_certificate
from tests.lib.node import Node

PATIENCE_SECONDS = 90.0
FUNDING_SAT = Sat(1_000_000)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node"), "-txindex=1", zmq=False) as node:
        yield node


@pytest.fixture(scope="module")
def server(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ElectrumX]:
    with ElectrumX(node, tmp_path_factory.mktemp("electrumx")) as server:
        yield server


@pytest.fixture
async def chain(server: ElectrumX) -> AsyncIterator[ElectrumChain]:
    chain = ElectrumChain(server.tcp_url, Network.REGTEST, timeout_seconds=5)
    yield chain
    await chain.close()


async def eventually(ask: Callable[[], Awaitable[Any]], expected: Any) -> None:
    """Retries: servers lag their node, and reconnect after a pause. `ChainFailed` is an unexpected answer."""
    for _ in range(int(PATIENCE_SECONDS / 0.05)):
        if (answer := await answered(ask)) == expected:
            return
        await asyncio.sleep(0.05)
    assert answer == expected


async def answered(ask: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await ask()
    except ChainFailed as failure:
        return failure


async def tip_hash(chain: ElectrumChain) -> str:
    return (await chain.tip()).block_hash


def address(payer: Payer) -> str:
    return payer.terms.funding_address(Network.REGTEST)


async def refusal(url: str, network: Network = Network.REGTEST, certificate_file: Path | None = None) -> str:
    """Return the reason why a server is unfit."""
    chain = ElectrumChain(url, network, timeout_seconds=5, certificate_file=certificate_file)
    try:
        with pytest.raises(ChainUnfit) as unfit:
            await chain.check()
        return str(unfit.value)
    finally:
        await chain.close()


class TestWhoIsThere:
    async def test_pinned_certificate(self, server: ElectrumX, node: Node) -> None:
        """Over TLS, a server with the given self-signed certificate is trusted, and answers as over TCP."""
        chain = ElectrumChain(server.tls_url, Network.REGTEST, timeout_seconds=5, certificate_file=server.certificate)
        await chain.check()
        await eventually(lambda: tip_hash(chain), node.best)
        await chain.close()

    async def test_other_certificate(self, server: ElectrumX, tmp_path: Path) -> None:
        """A certificate other than the given one is refused, although it has the same name."""
        make_certificate(tmp_path / "other.crt")
        assert "certificate is not the one" in await refusal(server.tls_url, certificate_file=tmp_path / "other.crt")

    async def test_certificate_of_an_unknown_authority(self, server: ElectrumX) -> None:
        """Without a given certificate, a self-signed one is refused."""
        assert "no certificate authority signed" in await refusal(server.tls_url)

    @pytest.mark.parametrize("content", [None, "", "-----BEGIN CERTIFICATE-----\n", "\xff"])
    async def test_no_certificate_in_the_file(self, server: ElectrumX, tmp_path: Path, content: str | None) -> None:
        """A certificate file that is missing or holds no certificate is an error that names it."""
        file = tmp_path / "server.crt"
        if content is not None:
            file.write_text(content, encoding="latin-1")
        assert str(file) in await refusal(server.tls_url, certificate_file=file)

    @pytest.mark.parametrize("network", [Network.LIVE, Network.TEST])
    async def test_other_network(self, server: ElectrumX, network: Network) -> None:
        """A server of another network is refused."""
        assert f"the configuration says {network.value!r}" in await refusal(server.tcp_url, network)

    async def test_another_kind_of_server(self, server: ElectrumX, node: Node) -> None:
        """No server, TCP to a TLS port, TLS to a TCP port, another kind of server: each is refused with its message."""
        no_server = await refusal("tcp://127.0.0.1:1")
        assert "no server listens there: is an Electrum server running there" in no_server
        others = (f"ssl://127.0.0.1:{server.tcp_port}", f"tcp://127.0.0.1:{server.tls_port}", f"tcp:{node.url[5:]}")
        for url in others:
            assert url in await refusal(url)

    @pytest.mark.parametrize(
        "url", ["localhost:50001", "http://localhost:50001", "tcp://localhost", "ssl://:1", "tcp://h:x"]
    )
    def test_no_url(self, url: str) -> None:
        """A text that is no URL of an Electrum server is refused before any connection."""
        with pytest.raises(ChainUnfit, match="expected tcp://host:port or ssl://host:port"):
            ElectrumChain(url, Network.REGTEST, timeout_seconds=5)


class TestAbsence:
    async def test_killed_and_started(self, server: ElectrumX, node: Node, chain: ElectrumChain) -> None:
        """If a server dies, the wait ends; once it runs again, the same backend continues, and sees payments."""
        payer = Payer("server restart")
        await chain.watch([payer.terms])
        waiting = asyncio.create_task(chain.wait_for_change(await chain.tip(), PATIENCE_SECONDS * 10))
        await asyncio.sleep(0)
        server.kill()
        await asyncio.wait_for(waiting, PATIENCE_SECONDS)
        with pytest.raises(ChainFailed):
            await chain.tip()
        server.start()
        await eventually(lambda: tip_hash(chain), node.best)
        outpoint = node.fund(address(payer), FUNDING_SAT)
        while not await chain.funding(payer.terms):
            await asyncio.wait_for(chain.wait_for_change(await chain.tip(), PATIENCE_SECONDS * 10), PATIENCE_SECONDS)
        assert await chain.funding(payer.terms) == (Funding(outpoint, FUNDING_SAT, 0),)

    async def test_hanging(self, server: ElectrumX, node: Node, chain: ElectrumChain) -> None:
        """If a server hangs, every call fails at the deadline; calls succeed again as soon as it responds."""
        await chain.check()
        server.pause()
        try:
            for _ in range(2):  # on the existing connection, and on a new one
                with pytest.raises(ChainFailed, match=r"no answer within 5 s"):
                    await asyncio.wait_for(chain.tip(), PATIENCE_SECONDS)
        finally:
            server.resume()
        await eventually(lambda: tip_hash(chain), node.best)

    async def test_silent_death(self, server: ElectrumX, chain: ElectrumChain, monkeypatch: pytest.MonkeyPatch) -> None:
        """A backend that only waits for changes notices by itself that the server no longer answers."""
        monkeypatch.setattr(electrumwire, "_PING_SECONDS", 0.1)
        seen = await chain.tip()
        await chain.wait_for_change(seen, 0.0)  # consumes the event of the connection
        server.pause()
        try:
            await asyncio.wait_for(chain.wait_for_change(seen, PATIENCE_SECONDS * 10), PATIENCE_SECONDS)
        finally:
            server.resume()

    async def test_pause_between_attempts(self, chain: ElectrumChain, server: ElectrumX) -> None:
        """While no server listens, one call per pause tries to connect; the others fail at once and name the next time."""
        server.kill()
        try:
            with pytest.raises(ChainFailed, match=r"no server listens there$"):
                await chain.tip()
            with pytest.raises(ChainFailed, match=r"no server listens there; next attempt in 0\.\d s"):
                await chain.tip()
        finally:
            server.start()
        await chain.wait_for_change(Tip(0, "", UnixTime(0), UnixTime(0)), 0.0)

    async def test_closed(self, chain: ElectrumChain) -> None:
        """A closed backend stays closed, and its error says so."""
        await chain.check()
        await chain.close()
        with pytest.raises(ChainFailed, match="closed"):
            await chain.tip()


class TestDepth:
    async def test_old_funding(self, node: Node, server: ElectrumX) -> None:
        """The depth of an output is proved over more headers than a server sends at a time."""
        payer = Payer("old")
        outpoint = node.fund(address(payer), FUNDING_SAT)
        node.mine(2100, to=address(Payer("nobody")))
        server.wait_until_synced()
        chain = ElectrumChain(server.tcp_url, Network.REGTEST, timeout_seconds=5)
        assert await chain.funding(payer.terms) == (Funding(outpoint, FUNDING_SAT, 2100),)
        await chain.close()

    @pytest.mark.parametrize("depth", [1, 10, 30])
    async def test_reorg(self, node: Node, chain: ElectrumChain, depth: int) -> None:
        """After a reorg of any depth, tip, median time and confirmations are those of the new branch."""
        payer = Payer(f"reorg {depth}")
        outpoint = node.fund(address(payer), FUNDING_SAT)
        node.mine(depth)
        await eventually(lambda: chain.funding(payer.terms), (Funding(outpoint, FUNDING_SAT, depth),))
        node.reorg(depth, node.rpc("getrawtransaction", outpoint.txid_hex))
        await eventually(lambda: tip_hash(chain), node.best)
        assert (await chain.tip()).median_time == node.median_time
        await eventually(lambda: chain.funding(payer.terms), (Funding(outpoint, FUNDING_SAT, depth + 1),))

    async def test_missed_blocks(self, node: Node, server: ElectrumX, chain: ElectrumChain) -> None:
        """Blocks mined while the server was stopped are fetched: more than it sends at a time, and a reorg."""
        await chain.check()
        server.kill()
        with pytest.raises(ChainFailed):
            await chain.tip()
        node.reorg(12)
        node.mine(2100, to=address(Payer("nobody")))
        server.start()
        await chain.wait_for_change(Tip(0, "", UnixTime(0), UnixTime(0)), PATIENCE_SECONDS)  # for the connection
        tip = await chain.tip()
        assert (tip.block_hash, tip.median_time) == (node.best, node.median_time)


class TestProtocol:
    async def test_oldest_version(self, node: Node, chain: ElectrumChain, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server with the oldest version of the protocol works as well."""
        monkeypatch.setattr(electrumlink, "_PROTOCOL_VERSIONS", ("1.4", "1.4.3"))
        payer = Payer("oldest version")
        outpoint = node.fund(address(payer), FUNDING_SAT)
        node.mine()
        await eventually(lambda: chain.funding(payer.terms), (Funding(outpoint, FUNDING_SAT, 1),))
        assert await chain.fees() == ChainFees(None, floor_sat_per_vb=1, increment_sat_per_vb=1)

    async def test_oldest_version_without_packages(
        self, node: Node, chain: ElectrumChain, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server of the oldest version gets a settlement and its child one by one, any number of times."""
        monkeypatch.setattr(electrumlink, "_PROTOCOL_VERSIONS", ("1.4", "1.4.3"))
        payer = Payer("one by one", UnixTime(1_400_000_000))
        await chain.watch([payer.terms])
        settlement = settle(payer, Funding(node.fund(address(payer), FUNDING_SAT), FUNDING_SAT, 0))
        child = lift(settlement, 3_000)
        for _ in range(2):
            await chain.publish(settlement.transaction, child.transaction)
            assert len(node.rpc("getrawmempool")) == 3
        node.mine()
        await chain.publish(settlement.transaction, child.transaction)
        with pytest.raises(ChainFailed, match=r"(?s)refused.*with its child: the server accepts no packages"):
            await chain.publish(settlement.transaction, lift(settlement, 4_000).transaction)

    async def test_no_common_version(self, server: ElectrumX, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server without a common version is refused."""
        monkeypatch.setattr(electrumlink, "_PROTOCOL_VERSIONS", ("9.8", "9.9"))
        assert "no common version" in await refusal(server.tcp_url)

    async def test_answers_held_back(self, node: Node, tmp_path: Path) -> None:
        """ElectrumX with default settings, which delays small answers by a second, meets a deadline of some seconds."""
        payer = Payer("held back")
        outpoint = node.fund(address(payer), FUNDING_SAT)
        node.mine()
        with ElectrumX(node, tmp_path, hold_back_seconds=1.0) as server:
            chain = ElectrumChain(
                server.tls_url, Network.REGTEST, timeout_seconds=5, certificate_file=server.certificate
            )
            await chain.watch([payer.terms])
            assert await chain.funding(payer.terms) == (Funding(outpoint, FUNDING_SAT, 1),)
            await chain.close()

    async def test_dust(self, node: Node, chain: ElectrumChain) -> None:
        """Of more than a hundred outputs at an address, the most valuable are read; a named output is always found."""
        payer = Payer("dust")
        await chain.watch([payer.terms])
        outpoints = pay_often(node, payer.terms.funding_script, [Sat(1_000 + number) for number in range(120)])
        node.mine()
        await eventually(lambda: count(chain.unspent(outpoints)), 120)
        listed = await chain.funding(payer.terms)
        assert [funding.value_sat for funding in listed] == list(range(1_119, 1_019, -1))
        least = min((await chain.unspent(outpoints)).values(), key=lambda funding: funding.value_sat)
        assert await chain.unspent([least.outpoint]) == {least.outpoint: least}


def pay_often(node: Node, script: bytes, values: list[Sat]) -> list[OutPoint]:
    """Return the outputs of one transaction of the node's wallet that pays many times to one script."""
    bare = CMutableTransaction([], [CTxOut(value, CScript(script)) for value in values])
    whole = node.rpc("fundrawtransaction", bare.serialize().hex(), {}, False, wallet="miner")["hex"]
    signed = node.rpc("signrawtransactionwithwallet", whole, wallet="miner")["hex"]
    txid = node.rpc("sendrawtransaction", signed)
    paid = enumerate(CTransaction.deserialize(bytes.fromhex(signed)).vout)
    return [OutPoint.parse(txid, vout) for vout, output in paid if output.scriptPubKey == script]


async def count(found: Awaitable[dict[OutPoint, Funding]]) -> int:
    return len(await found)
