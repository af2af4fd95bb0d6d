"""Channels whose funding disappears and returns, and whose end a reorg removes; without a node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from structlog.testing import capture_logs

from actors.alarm import Kind
from paychan.chain.base import ChainFailed, Funding, Spend, Tip
from paychan.chain.debug import DebugChain
from paychan.protocol.channel import Close, CloseReason, State
from paychan.protocol.errors import ChainUnavailable, NeverFunded
from paychan.protocol.types import OutPoint, UnixTime
from tests.lib.channels import NOW
from tests.lib.world import DebugPayer, accepted, local, refused

PAYER = DebugPayer("comes and goes", UnixTime(NOW + 300 * 86_400))
CONFIRMATIONS = 6
"""Confirmations that end a channel in `local`."""


class Blocks(DebugChain):
    """A chain whose height the test sets; `depth`: confirmations of the funding output, None if it is gone."""

    def __init__(self) -> None:
        super().__init__(lambda: NOW)
        self.height = 100
        self.depth: int | None = 1000
        self.late = 0
        """Number of answers that are older than the funding output."""

    async def tip(self) -> Tip:
        return Tip(self.height, f"{self.height:064x}", NOW, NOW)

    async def unspent(self, outpoints: Any) -> dict[OutPoint, Funding]:
        found = await super().unspent(outpoints)
        if self.depth is None or self.late:
            self.late -= bool(self.late)
            return {}
        return {at: Funding(at, funding.value_sat, self.depth) for at, funding in found.items()}


async def test_fault_10_blocks_without_the_funding_are_counted(tmp_path: Path):
    """The count starts with the first scan without the output and ends the channel; a scan with it resets the count."""
    chain = Blocks()
    async with local(tmp_path, chain=chain) as server:
        await server.open(PAYER)
        await server.watcher.scan()
        chain.depth = None
        for height in range(100, 100 + CONFIRMATIONS):
            chain.height = height
            await server.watcher.scan()
            assert (await server.stored(PAYER)).state is State.OPEN
        chain.depth = 0
        await server.watcher.scan()
        chain.depth = None
        for height in range(200, 200 + CONFIRMATIONS):
            chain.height = height
            await server.watcher.scan()
            assert (await server.stored(PAYER)).state is State.OPEN
        chain.height += 1
        await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.UNFUNDED
        assert isinstance(refused(await server.registry.ask(PAYER.outpoint, PAYER.pays(10_001))), NeverFunded)
        assert server.watcher.alarms == ()


async def test_fault_10_an_answer_older_than_the_tip_ends_no_channel(tmp_path: Path):
    """A reorg moved the funding to the mempool: the server asks again after an old answer, and resets the count."""
    chain = Blocks()
    async with local(tmp_path, chain=chain) as server:
        await server.open(PAYER)
        chain.depth = None
        await server.watcher.scan()
        chain.height += CONFIRMATIONS + 1
        chain.late, chain.depth = 1, 0
        with capture_logs() as logs:
            await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.OPEN
        assert "never funded" not in [line["event"] for line in logs]


async def test_fault_10_funding_that_is_back_without_a_block_takes_no_payment(tmp_path: Path):
    """The channel is open again, but frozen until a block contains its funding."""
    chain = Blocks()
    async with local(tmp_path, chain=chain) as server:
        await server.open(PAYER)
        chain.depth = None
        for height in (100, 100 + CONFIRMATIONS):
            chain.height = height
            await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.UNFUNDED
        chain.depth = 0
        server.watcher._chain._unverified_scanned_at = 0.0
        await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.OPEN
        pay = PAYER.pays(10_001)
        assert isinstance(refused(await server.registry.ask(PAYER.outpoint, pay)), ChainUnavailable)
        chain.depth, chain.height = 1, chain.height + 1
        await server.watcher.scan()
        accepted(await server.registry.ask(PAYER.outpoint, pay))


async def test_fault_10_a_chain_that_is_not_trusted_ends_nothing(tmp_path: Path):
    """While the newest block is old, as when a node catches up, blocks without the funding do not count."""
    chain = Blocks()
    async with local(tmp_path, chain=chain, stale_seconds=3600) as server:
        await server.open(PAYER)
        await server.watcher.scan()
        chain.depth = None
        server.clock.now += 7000
        for height in range(101, 140):
            chain.height = height
            await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.OPEN


class Refunded(Blocks):
    """A chain on which a refund with this number of confirmations spends the output; None: no refund."""

    confirmations: int | None = 9

    async def spender(self, outpoint: OutPoint) -> Spend | None:  # noqa: ARG002 - there is one output
        return None if self.confirmations is None else Spend(b"\x66" * 32, self.confirmations)

    async def unspent(self, outpoints: Any) -> dict[OutPoint, Funding]:
        return {} if self.confirmations is not None else await super().unspent(outpoints)

    async def transaction(self, txid: bytes) -> bytes:
        return b"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00" if txid == b"\x66" * 32 else await super().transaction(txid)

    async def holds(self, seen: Tip) -> bool:
        return seen.height == self.height


async def test_fault_12_only_the_chain_ends_lost(tmp_path: Path):
    """With a deep refund, or without news of the output, it stays LOST; unspent again, the channel is settled."""
    chain = Refunded()
    async with local(tmp_path, chain=chain) as server:
        chain.confirmations = None
        await server.open(PAYER)
        chain.confirmations = 9
        await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.LOST
        assert [alarm.kind for alarm in server.watcher.alarms] == [Kind.LOST]
        chain.height += 1
        await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.LOST

        chain.confirmations, chain.depth, chain.height = None, None, chain.height + 1
        await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.LOST, "the chain knows nothing of the output"

        chain.depth, chain.height = 50, chain.height + 1
        await server.watcher.scan()
        assert (await server.stored(PAYER)).state in (State.CLOSING, State.PUBLISHED, State.CLOSED)
        await server.watcher.scan()
        assert server.watcher.alarms == ()


async def test_fault_04_a_closing_channel_sees_a_deep_refund_before_the_signer_is_asked(tmp_path: Path):
    """A CLOSING channel without a settlement becomes LOST, and the signer signs nothing for spent coins."""
    chain = Refunded()
    async with local(tmp_path, chain=chain) as server:
        chain.confirmations = None
        await server.open(PAYER)
        chain.confirmations = 9
        await server.registry.ask(PAYER.outpoint, Close(CloseReason.OPERATOR))
        assert (await server.stored(PAYER)).state is State.LOST
        assert not server.signer.calls["sign_settlement"]


class Forgetful(Refunded):
    """A chain that can't tell the spend of the outputs in `unknown`."""

    unknown: frozenset[OutPoint] = frozenset()

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        if outpoint in self.unknown:
            msg = "no such transaction"
            raise ChainFailed(msg)
        return await super().spender(outpoint)


async def test_fault_12_one_channel_that_can_not_be_judged_stops_no_other(tmp_path: Path):
    """The chain does not answer about one of two lost channels: the other resumes, and the first one later."""
    chain, second = Forgetful(), DebugPayer("judged later", UnixTime(NOW + 299 * 86_400))
    async with local(tmp_path, chain=chain) as server:
        chain.confirmations = None
        await server.open(PAYER)
        await server.open(second)
        chain.confirmations = 9
        await server.watcher.scan()
        chain.unknown = frozenset({second.outpoint})
        chain.confirmations, chain.depth, chain.height = None, 50, chain.height + 1
        await server.watcher.scan()
        assert (await server.stored(PAYER)).state is not State.LOST
        assert (await server.stored(second)).state is State.LOST
        assert not server.context.chain_view.problem

        chain.unknown = frozenset()
        await server.watcher.scan()
        assert (await server.stored(second)).state is not State.LOST
