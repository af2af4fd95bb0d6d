"""Payments of a channel that come together: one message, one record, and the same outcomes as one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from actors.channel import ChannelActor, Payments
from paychan.callback.base import Verdict
from paychan.protocol.channel import Accepted, Channel, Outcome, Rejected, State
from paychan.protocol.errors import (
    BadSignature,
    ChainUnavailable,
    ChannelClosing,
    TryAgain,
    ValueBackwards,
)
from paychan.protocol.payment_batch import MOST_CHECKS, Commands
from paychan.protocol.state_machine import apply
from paychan.protocol.wire.payment_frames import read_payments, write_payments
from paychan.store.base import Change
from tests.actors.test_application import Shop
from tests.lib.channels import accepted as channel_of
from tests.lib.world import DebugPayer, Local, local, settled_down, until

PAYER = DebugPayer("several")

both_ways = pytest.mark.parametrize("coalesce", [True, False], ids=["coalesced", "each"])


def row(*paid_sat: int) -> Commands:
    """Payments as in a binary frame; `paid_sat` are the totals after each."""
    return read_payments(write_payments([PAYER.pays(paid).payment for paid in paid_sat]))


def pay(server: Local, commands: Commands) -> asyncio.Future[Sequence[Outcome]]:
    return asyncio.ensure_future(_pay(server, commands))


async def _pay(server: Local, commands: Commands) -> Sequence[Outcome]:
    actor = await server.registry.awaken(PAYER.outpoint)
    assert actor is not None
    _, answer = tell(actor, commands)
    return await answer


def tell(
    actor: ChannelActor, commands: Commands, *, in_parts: bool = False
) -> tuple[Payments, asyncio.Future[Sequence[Outcome]]]:
    """Send an actor payments; return the message, and a future of their final outcomes."""
    answer: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()
    message = Payments(commands, lambda done: answer.set_result(done.outcomes), in_parts=in_parts)
    actor.tell(message)
    return message, answer


def values(outcomes: Sequence[Outcome]) -> list[int | str]:
    return [each.value_sat if isinstance(each, Accepted) else each.error.code for each in outcomes]


@both_ways
async def test_a_batch_is_one_record(tmp_path: Path, coalesce: bool):
    """The record equals that of the same single payments, but is written once; each outcome has its own totals."""
    async with local(tmp_path, settings={"coalesce": coalesce}) as server:
        opened = await server.open(PAYER, 10_000)
        commits = server.store.calls["commit"]
        outcomes = await pay(server, row(*range(10_001, 10_017)))
        stored = await server.stored(PAYER)

        assert values(outcomes) == [1] * 16
        assert server.store.calls["commit"] == commits + 1
        assert (stored.received_sat, stored.payments, stored.seq) == (10_016, opened.payments + 16, opened.seq + 16)
        shown = [each.channel.received_sat for each in outcomes if isinstance(each, Accepted)]
        assert shown == list(range(10_001, 10_017))


@both_ways
async def test_refusals_stand_beside_what_was_accepted(tmp_path: Path, coalesce: bool):
    """Stale and badly signed payments are refused, repetitions bring no value, and the others count."""
    bad = msgspec.structs.replace(PAYER.pays(10_009).payment, signature=PAYER.pays(5).payment.signature)
    sent = [PAYER.pays(paid).payment for paid in (10_002, 10_001, 10_002, 10_005)]
    async with local(tmp_path, settings={"coalesce": coalesce}) as server:
        await server.open(PAYER, 10_000)
        outcomes = await pay(server, read_payments(write_payments([*sent, bad])))

        assert values(outcomes) == [2, "value_backwards", 0, 3, "bad_signature"]
        assert (await server.stored(PAYER)).received_sat == 10_005
        assert values(await pay(server, row(10_003, 10_004))) == ["value_backwards"] * 2
        assert values(await pay(server, row(10_005, 10_005))) == [0, 0]
    assert {ValueBackwards.code, BadSignature.code} == {"value_backwards", "bad_signature"}


@both_ways
async def test_none_is_answered_before_the_newest_is_durable(tmp_path: Path, coalesce: bool):
    """While the disk blocks the write there is no answer, not even to a repetition that came later."""
    async with local(tmp_path, settings={"coalesce": coalesce}) as server:
        await server.open(PAYER, 10_000)
        server.store.hold("commit")
        first, again = pay(server, row(10_001, 10_002)), pay(server, row(10_002, 10_002))
        await until(lambda: server.store.calls["commit"] == 2)
        await settled_down()

        assert not first.done()
        assert not again.done()
        server.store.release("commit")
        assert [values(each) for each in await asyncio.gather(first, again)] == [[1, 1], [0, 0]]


@both_ways
async def test_after_a_conflict_all_are_tried_again(tmp_path: Path, coalesce: bool):
    """All were judged by an outdated version; judged again by the store's record, each has its outcome."""
    async with local(tmp_path, settings={"coalesce": coalesce}) as server:
        opened = await server.open(PAYER, 10_000)
        server.store.hold("commit")
        waiting = pay(server, row(10_001, 10_002))
        await until(lambda: server.store.calls["commit"] == 2)
        other: Channel = channel_of(apply(opened, PAYER.pays(10_001), server.context.view()))
        assert await server.store.real.commit([Change(opened, other)]) == [True]
        server.store.release("commit")

        assert list(await waiting) == [Rejected(TryAgain())] * 2
        assert values(await pay(server, row(10_001, 10_002))) == [0, 1]


@both_ways
async def test_a_draining_payment_ends_the_batch(tmp_path: Path, coalesce: bool):
    """It is answered with its settlement, earlier payments are answered as usual, and later ones are refused."""
    everything = PAYER.funding_sat
    async with local(tmp_path, settings={"coalesce": coalesce}) as server:
        await server.open(PAYER, 10_000)
        outcomes = await pay(server, row(10_004, everything, everything))

        assert values(outcomes) == [4, everything - 10_004, ChannelClosing.code]
        drained = outcomes[1]
        assert isinstance(drained, Accepted)
        assert drained.channel.state in (State.PUBLISHED, State.CLOSED)
        assert drained.channel.closing is not None
        assert drained.channel.closing.settlement is not None


async def test_a_frozen_channel_refuses_each(tmp_path: Path):
    """Without a reliable chain view no payment is verified or written."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.context.chain_view.problem = "no node"
        outcomes = await pay(server, row(10_001, 10_002))

        assert list(outcomes) == [Rejected(ChainUnavailable(reason="no node"))] * 2


async def test_an_unknown_channel_is_not_woken(tmp_path: Path):
    """The registry makes no actor for it."""
    async with local(tmp_path) as server:
        assert await server.registry.awaken(PAYER.outpoint) is None


async def test_an_application_is_asked_about_each(tmp_path: Path):
    """With an application no payments are coalesced: one request at a time, each with its own answer."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        outcomes = pay(server, row(10_001, 10_003, 10_006))
        await shop.says(Verdict(data="first"))
        await shop.says(Verdict(refusal="sold out"))
        await shop.says(Verdict(data="third"))

        assert values(await outcomes) == [1, "application_error", 5]
        assert shop.questions == [10_001, 10_003, 10_006]
        assert (await server.stored(PAYER)).received_sat == 10_006


async def test_batches_keep_their_order_while_a_channel_wakes(tmp_path: Path):
    """Batches for a sleeping channel reach it in the order in which they were sent."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
    async with local(tmp_path) as server:
        rows = [pay(server, row(10_000 + 2 * n - 1, 10_000 + 2 * n)) for n in range(1, 9)]

        assert [values(each) for each in await asyncio.gather(*rows)] == [[1, 1]] * 8


@both_ways
async def test_fault_69_a_batch_in_parts_stops_after_a_bad_signature(tmp_path: Path, coalesce: bool):
    """256 bad signatures in one message cost at most two checks; the caller sees at once how far the actor came."""
    bad = [
        msgspec.structs.replace(PAYER.pays(20_000 + n).payment, signature=PAYER.pays(5).payment.signature)
        for n in range(256)
    ]
    async with local(tmp_path, settings={"coalesce": coalesce}) as server:
        await server.open(PAYER, 10_000)
        actor = await server.registry.awaken(PAYER.outpoint)
        assert actor is not None
        good = PAYER.pays(10_001).payment
        message, answer = tell(actor, read_payments(write_payments([good, *bad])), in_parts=True)

        assert (message.judged, values(message.outcomes), message.waits) == (2, [1, "bad_signature"], False)
        assert values(await answer) == [1, "bad_signature"]
        _, alone = tell(actor, read_payments(write_payments(bad)), in_parts=True)
        assert values(await alone) == ["bad_signature"]


async def test_fault_69_a_batch_in_parts_takes_a_bounded_time(tmp_path: Path):
    """One message causes a limited number of single checks, for any number of valid signatures."""
    async with local(tmp_path, settings={"coalesce": False}) as server:
        await server.open(PAYER, 10_000)
        actor = await server.registry.awaken(PAYER.outpoint)
        assert actor is not None
        message, answer = tell(actor, row(*range(10_001, 10_100)), in_parts=True)
        outcomes = await answer

        assert values(outcomes) == [1] * MOST_CHECKS
        assert (message.judged, len(message.outcomes)) == (MOST_CHECKS, MOST_CHECKS)


async def test_fault_69_with_an_application_a_batch_in_parts_is_judged_one_by_one(tmp_path: Path):
    """Only the application's answer decides whether the next payment may be judged."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        actor = await server.registry.awaken(PAYER.outpoint)
        assert actor is not None
        message, answer = tell(actor, row(10_001, 10_003), in_parts=True)
        assert (message.judged, message.waits) == (1, True)
        await shop.says(Verdict())
        assert values(await answer) == [1]


@pytest.mark.parametrize("paid_sat", [9_999, 10_001], ids=["refused", "accepted"])
async def test_a_reply_that_fails_stops_no_actor(tmp_path: Path, paid_sat: int):
    """A bug in the caller's reply is logged; the reply is not called again, and the channel goes on."""
    calls: list[Payments] = []

    def broken(message: Payments) -> None:
        calls.append(message)
        raise ZeroDivisionError

    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        actor = await server.registry.awaken(PAYER.outpoint)
        assert actor is not None
        with capture_logs() as logs:
            actor.tell(Payments(row(paid_sat), broken))
            await until(lambda: bool(calls))
            await settled_down()

        assert len(calls) == 1
        assert [entry["event"] for entry in logs] == ["answer failed"]
        assert values(await pay(server, row(10_002))) == [10_002 - max(10_000, paid_sat)]
        assert server.registry.actors[PAYER.outpoint] is actor
