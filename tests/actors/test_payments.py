"""Payments on one channel: judged in order and answered when durable, also under concurrency (threats 9-11)."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from paychan.protocol.channel import Accepted, Channel, Outcome, Rejected
from paychan.protocol.errors import InternalError, TryAgain, UnknownChannel, ValueBackwards
from paychan.protocol.state_machine import apply
from paychan.store.base import Change, StoreFailed
from tests.lib.channels import accepted as channel_of
from tests.lib.world import DebugPayer, Local, accepted, local, refused, settled_down, until

PAYER = DebugPayer("payments")


def pay(server: Local, paid_sat: int) -> asyncio.Future[Outcome]:
    """Send the payment after which `paid_sat` are paid in total."""
    return asyncio.ensure_future(server.registry.ask(PAYER.outpoint, PAYER.pays(paid_sat)))


async def test_threat_10_parallel_payments_are_judged_in_the_order_of_arrival(tmp_path: Path):
    """64 concurrent payments on one channel: each value counts once, and the sum is the total of the last one."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        outcomes = await asyncio.gather(*(pay(server, 10_000 + 10 * n) for n in range(1, 65)))

        assert [accepted(outcome).value_sat for outcome in outcomes] == [10] * 64
        assert (await server.stored(PAYER)).received_sat == 10_640


async def test_threat_10_whatever_the_order_change_only_falls(tmp_path: Path):
    """64 payments in any order: accepted ones never take value back, and their values add up to the stored total."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        totals = [10_000 + 10 * n for n in range(1, 65)]
        random.Random(10).shuffle(totals)
        outcomes = await asyncio.gather(*(pay(server, total) for total in totals))
        values = [outcome.value_sat for outcome in outcomes if isinstance(outcome, Accepted)]
        refusals = [outcome.error for outcome in outcomes if isinstance(outcome, Rejected)]

        assert min(values) > 0
        assert sum(values) == 640
        assert all(isinstance(error, ValueBackwards) for error in refusals)
        assert (await server.stored(PAYER)).received_sat == 10_640


async def test_threat_11_no_payment_is_answered_before_it_is_durable(tmp_path: Path):
    """While the disk blocks a commit none of 64 payments is answered; after the write all of them are."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.store.hold("commit")
        payments = [pay(server, 10_000 + n) for n in range(1, 65)]
        await until(lambda: server.store.calls["commit"] == 2)
        await settled_down()

        assert not any(payment.done() for payment in payments)
        assert (await server.stored(PAYER)).received_sat == 10_000
        server.store.release("commit")
        assert [accepted(outcome).value_sat for outcome in await asyncio.gather(*payments)] == [1] * 64


async def test_threat_11_an_answered_payment_survives_a_crash(tmp_path: Path):
    """The next process finds every answered payment; unanswered ones may be missing."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        await pay(server, 10_001)
        server.store.hold("commit")
        pay(server, 10_002)
        await until(lambda: server.store.calls["commit"] == 3)
    async with local(tmp_path) as server:
        assert (await server.stored(PAYER)).received_sat == 10_001


async def test_threat_11_after_a_failed_write_no_payment_is_answered(tmp_path: Path):
    """A disk error reaches the callback that ends the process, and no payment of that write is ever answered."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.store.fail("commit", StoreFailed("disk on fire"))
        payments = [pay(server, 10_001), pay(server, 10_001)]
        await until(lambda: server.failures)
        payments.append(pay(server, 10_002))
        await settled_down()

        assert not any(payment.done() for payment in payments)


async def test_threat_9_a_repetition_is_answered_no_earlier_than_the_original(tmp_path: Path):
    """A repetition during the write of the first payment waits for that write, and brings no value."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.store.hold("commit")
        first = pay(server, 10_005)
        await until(lambda: server.store.calls["commit"] == 2)
        again = pay(server, 10_005)
        await settled_down()

        assert not again.done()
        server.store.release("commit")
        assert [accepted(outcome).value_sat for outcome in await asyncio.gather(first, again)] == [5, 0]


async def test_threat_9_a_repetition_fails_with_the_original(tmp_path: Path):
    """If the write of a payment loses against another writer, its repetition is refused too."""
    async with local(tmp_path) as server:
        opened = await server.open(PAYER, 10_000)
        server.store.hold("commit")
        waiting = [pay(server, 10_005), pay(server, 10_005)]
        await until(lambda: server.store.calls["commit"] == 2)
        await elsewhere(server, opened, 10_003)
        server.store.release("commit")

        assert [refused(outcome) for outcome in await asyncio.gather(*waiting)] == [TryAgain(), TryAgain()]


async def test_threat_9_a_repetition_waits_although_the_first_caller_has_left(tmp_path: Path):
    """A payer that disconnects and sends the payment again gets the answer only when it is durable."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.store.hold("commit")
        first = pay(server, 10_005)
        await until(lambda: server.store.calls["commit"] == 2)
        first.cancel()
        again = pay(server, 10_005)
        await settled_down()

        assert not again.done()
        server.store.release("commit")
        assert accepted(await again).channel.received_sat == 10_005


async def elsewhere(server: Local, seen: Channel, paid_sat: int) -> Channel:
    """Another process accepts a payment on the version it has seen."""
    channel = channel_of(apply(seen, PAYER.pays(paid_sat), server.context.view()))
    assert await server.store.real.commit([Change(seen, channel)]) == [True]
    return channel


async def test_threat_10_a_conflict_is_resolved_from_the_store(tmp_path: Path):
    """If another process changed a channel, a payment gets TryAgain, and the next is judged by the store's record."""
    async with local(tmp_path) as server:
        opened = await server.open(PAYER, 10_000)
        await elsewhere(server, opened, 10_100)

        assert refused(await pay(server, 10_050)) == TryAgain()
        assert isinstance(refused(await pay(server, 10_050)), ValueBackwards)
        assert accepted(await pay(server, 10_150)).value_sat == 50


async def test_threat_10_a_conflict_of_many_payments_affects_no_other_channel(tmp_path: Path):
    """All payments that were judged by an outdated version get TryAgain, and the process continues."""
    other = DebugPayer("another channel")
    async with local(tmp_path) as server:
        opened = await server.open(PAYER, 10_000)
        await server.open(other)
        server.store.hold("commit")
        payments = [pay(server, 10_000 + n) for n in range(1, 6)]
        await until(lambda: server.store.calls["commit"] == 3)
        payments += [pay(server, 10_000 + n) for n in range(6, 9)]
        newest = opened
        for n in range(12):
            newest = await elsewhere(server, newest, 10_101 + n)
        server.store.release("commit")

        assert [refused(outcome) for outcome in await asyncio.gather(*payments)] == [TryAgain()] * 8
        assert server.failures == []
        accepted(await server.registry.ask(other.outpoint, other.pays(10_001)))
        assert (await server.stored(PAYER)).received_sat == 10_112


async def test_threat_10_a_payment_on_a_version_that_was_never_written_is_refused(tmp_path: Path):
    """Two payments in sequence lose against one of another process: the second must not undo that one."""
    async with local(tmp_path) as server:
        opened = await server.open(PAYER, 10_000)
        server.store.hold("commit")
        payments = [pay(server, 10_010), pay(server, 10_020)]
        await until(lambda: server.store.calls["commit"] == 2)
        await elsewhere(server, opened, 10_500)
        server.store.release("commit")
        await asyncio.gather(*payments)

        assert (await server.stored(PAYER)).received_sat == 10_500


async def test_a_bug_on_one_channel_is_answered_and_the_store_is_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An exception while judging reaches the caller; the next message finds a new actor and the stored state."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        with monkeypatch.context() as broken, capture_logs() as logs:
            broken.setattr("actors.channel.pay", lambda *_, **__: 1 / 0)
            assert refused(await pay(server, 10_001)) == InternalError()

        assert [entry["event"] for entry in logs] == ["actor failed"]
        assert accepted(await pay(server, 10_001)).value_sat == 1


async def test_a_bug_does_not_lose_what_was_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Payments that were accepted before an actor failed are answered, and no later one undoes them."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.store.hold("commit")
        before = pay(server, 10_010)
        await until(lambda: server.store.calls["commit"] == 2)
        with monkeypatch.context() as broken, capture_logs():
            broken.setattr("actors.channel.pay", lambda *_, **__: 1 / 0)
            assert refused(await pay(server, 10_020)) == InternalError()
        after = pay(server, 10_030)
        await until(lambda: server.registry.actors[PAYER.outpoint].alive)
        server.store.release("commit")

        assert accepted(await before).value_sat == 10
        assert refused(await after) == TryAgain()
        assert accepted(await pay(server, 10_030)).value_sat == 20


async def test_an_unknown_channel_wakes_no_actor(tmp_path: Path):
    """A payment for an outpoint that was never opened is refused, and no actor is made for it."""
    async with local(tmp_path) as server:
        assert refused(await pay(server, 10_000)) == UnknownChannel()
        assert server.registry.awake == 0
