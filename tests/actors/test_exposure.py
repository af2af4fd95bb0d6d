"""Fault 1: unconfirmed funding is counted once, by its owner, and never above the limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from actors.exposure import Exposure, Reservation
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Accepted, CloseByProof, Outcome, State
from paychan.protocol.errors import TooMuchUnconfirmed
from paychan.protocol.types import OutPoint, Sat
from paychan.signer_client.base import SignerAbsent
from tests.actors.test_rounds import Blocks
from tests.lib.world import Clock, DebugPayer, Local, accepted, local, refused, settled_down, until

PAYERS = [DebugPayer(f"exposed {n}") for n in range(8)]
VALUE_SAT = PAYERS[0].funding_sat
ROOM = 3
"""Channels that fit under the limit."""


def outpoint(number: int) -> OutPoint:
    return OutPoint(number.to_bytes(32, "big"), 0)


def made(reserved: Reservation | TooMuchUnconfirmed) -> Reservation:
    assert isinstance(reserved, Reservation)
    return reserved


@asynccontextmanager
async def exposed(directory: Path, *, publishes: bool = True) -> AsyncIterator[tuple[Local, Blocks]]:
    """A server with room for `ROOM` unconfirmed channels; no block contains the payers' funding."""
    chain = Blocks()
    chain.unconfirmed |= {payer.outpoint for payer in PAYERS}
    settings = {"exposure": Exposure(Sat(ROOM * VALUE_SAT))}
    async with local(directory, Clock(), chain=chain, settings=settings, min_confirmations=0) as server:
        if not publishes:
            server.chain.fail("publish", ChainFailed("no"))
        await server.watcher.scan()
        yield server, chain


def opened(outcomes: Sequence[Outcome]) -> int:
    return sum(isinstance(outcome, Accepted) for outcome in outcomes)


def test_fault_01_only_its_owner_ends_a_reservation():
    """Two openings hold one output: after the refused one ends it still counts, and ending twice has no effect."""
    exposure = Exposure(Sat(100))
    first, second = made(exposure.reserve(outpoint(1), Sat(60))), made(exposure.reserve(outpoint(1), Sat(60)))
    second.release()
    second.release()
    assert exposure.sum_sat == 60
    assert exposure.reserve(outpoint(2), Sat(41)) == TooMuchUnconfirmed(got_sat=101, need_sat=100)
    first.opened()
    first.release()
    assert (exposure.sum_sat, list(exposure.open)) == (60, [outpoint(1)])
    exposure.note_safe(outpoint(1))
    assert exposure.sum_sat == 0


def test_fault_01_a_scan_ends_no_reservation():
    """The chain watch finds no such channel, or a block: the output counts until its opening ends."""
    exposure = Exposure(Sat(100))
    reserved = made(exposure.reserve(outpoint(1), Sat(60)))
    exposure.note_open(outpoint(1), Sat(60))
    exposure.note_safe(outpoint(1))
    assert exposure.sum_sat == 60
    reserved.release()
    assert exposure.sum_sat == 0


@pytest.mark.parametrize("held", ["", "commit", "get"])
async def test_fault_01_requests_sent_twice_count_once_and_keep_the_limit(tmp_path: Path, held: str):
    """Each of eight openings comes three times at once: three channels open, and their sum counts."""
    async with exposed(tmp_path) as (server, _):
        if held:
            server.store.hold(held)
        requests = [
            msgspec.structs.replace(payer.request(), secret=secret) for payer in PAYERS for secret in (b"", b"x", b"")
        ]
        opening = [asyncio.ensure_future(server.opener.open(request)) for request in requests]
        if held:
            await until(lambda: server.store.calls[held])
            await settled_down()
            assert server.context.exposure.sum_sat <= ROOM * VALUE_SAT
            server.store.release(held)
        outcomes = await asyncio.gather(*opening)
        assert opened(outcomes) == ROOM
        assert server.context.exposure.sum_sat == ROOM * VALUE_SAT
        assert len(server.context.exposure.open) == ROOM
        assert isinstance(refused(await server.opener.open(PAYERS[-1].request())), TooMuchUnconfirmed)


async def test_fault_01_a_scan_never_drops_what_is_being_opened(tmp_path: Path):
    """The watcher scans repeatedly while the records of all openings are being written."""
    async with exposed(tmp_path) as (server, _):
        server.store.hold("commit")
        opening = [asyncio.ensure_future(server.opener.open(payer.request())) for payer in PAYERS[:ROOM]]
        await until(lambda: server.store.calls["commit"])
        for _ in range(3):
            await server.watcher._chain.scan()
        late = [server.opener.open(payer.request()) for payer in PAYERS[ROOM:]]
        assert {type(refused(outcome)) for outcome in await asyncio.gather(*late)} == {TooMuchUnconfirmed}
        server.store.release("commit")
        assert opened(await asyncio.gather(*opening)) == ROOM
        for _ in range(3):
            await server.watcher._chain.scan()
        assert server.context.exposure.sum_sat == ROOM * VALUE_SAT


@pytest.mark.parametrize(
    ("part", "method", "error"),
    [("signer", "show_funding", SignerAbsent("away")), ("chain", "adopt", ChainFailed("-"))],
)
async def test_fault_01_an_opening_that_fails_late_gives_its_room_back(
    tmp_path: Path, part: str, method: str, error: Exception
):
    """If signer or chain is away after the reservation, no channel opens, and no output counts."""
    async with exposed(tmp_path) as (server, chain):
        chain._published[PAYERS[0].outpoint.txid] = bytes(10)
        getattr(server, part).fail(method, error)
        refused(await server.opener.open(PAYERS[0].request()))
        assert server.context.exposure.sum_sat == 0
        assert await server.store.real.get(PAYERS[0].outpoint) is None


async def test_fault_01_a_request_that_is_cut_off_keeps_its_room_until_its_channel_is_known(tmp_path: Path):
    """The client's request is cancelled while the record is written: the channel opens, and counts."""
    async with exposed(tmp_path) as (server, _):
        server.store.hold("commit")
        opening = asyncio.ensure_future(server.opener.open(PAYERS[0].request()))
        await until(lambda: server.store.calls["commit"])
        opening.cancel()
        await settled_down()
        assert server.context.exposure.sum_sat == VALUE_SAT
        server.store.release("commit")
        await until(lambda: list(server.context.exposure.open) == [PAYERS[0].outpoint])


async def test_fault_01_after_a_restart_all_that_is_unconfirmed_counts_again(tmp_path: Path):
    """Open channels count, and channels that are being settled, while no block contains their funding."""
    async with exposed(tmp_path, publishes=False) as (server, _):
        for payer in PAYERS[:ROOM]:
            channel = await server.open(payer)
        await server.registry.ask(PAYERS[ROOM - 1].outpoint, CloseByProof(channel.payment))
        assert (await server.stored(PAYERS[ROOM - 1])).state is State.CLOSING
    async with exposed(tmp_path, publishes=False) as (server, chain):
        assert server.context.exposure.sum_sat == ROOM * VALUE_SAT
        assert isinstance(refused(await server.opener.open(PAYERS[-1].request())), TooMuchUnconfirmed)
        chain.unconfirmed.clear()
        await server.watcher.scan()
        assert server.context.exposure.sum_sat == 0


async def test_fault_01_a_reorg_makes_confirmed_funding_count_again(tmp_path: Path):
    """Funding that a reorg made unconfirmed counts before another channel opens without a confirmation."""
    async with exposed(tmp_path) as (server, chain):
        chain.unconfirmed.clear()
        for payer in PAYERS[:ROOM]:
            await server.open(payer)
        assert server.context.exposure.sum_sat == 0
        chain.tip_hash = "02" * 32
        chain.unconfirmed |= {payer.outpoint for payer in PAYERS}
        await server.watcher.scan()
        assert server.context.exposure.sum_sat == ROOM * VALUE_SAT
        assert isinstance(refused(await server.opener.open(PAYERS[-1].request())), TooMuchUnconfirmed)
        chain.unconfirmed.clear()
        chain.tip_hash = "03" * 32
        await server.watcher.scan()
        assert server.context.exposure.sum_sat == 0
        accepted(await server.opener.open(PAYERS[-1].request()))
