"""Requests that are charged through a channel's actor: what is answered is on disk, and no satoshi pays twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

from paychan.protocol.channel import Accepted, Outcome, State
from paychan.protocol.charges import Charge, Delivered, Release
from paychan.protocol.credit import find_delivery
from paychan.protocol.types import Sat
from paychan.protocol.unpaid import CreditTooLow
from tests.lib.world import IDLE_SECONDS, Clock, DebugPayer, Local, accepted, local, refused, until

PAYER = DebugPayer("charged")


def request(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def charge(server: Local, number: int, total: int, paid_sat: int | None = None) -> Outcome:
    payment = None if paid_sat is None else PAYER.pays(paid_sat).payment
    return await server.registry.ask(PAYER.outpoint, Charge(request(number), Sat(total), payment))


async def test_of_many_requests_at_once_the_paid_ones_are_charged(tmp_path: Path) -> None:
    """Twenty requests come together with the payment for seven: seven are charged, and none for free."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        outcomes = await asyncio.gather(*(charge(server, number, 25, 10_175) for number in range(20)))
        stored = await server.stored(PAYER)

    assert sum(isinstance(outcome, Accepted) for outcome in outcomes) == 7
    assert all(refused(each).code == CreditTooLow.code for each in outcomes if not isinstance(each, Accepted))
    assert (stored.spent_sat, stored.credit_sat) == (10_175, 0)


async def test_a_charge_is_answered_when_it_is_on_disk(tmp_path: Path) -> None:
    """Payment and charge are in one record; until it is written, the caller waits."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.store.hold("commit")
        charging = asyncio.ensure_future(charge(server, 1, 25, 10_025))
        await until(lambda: server.store.calls["commit"] == 2)
        assert not charging.done()
        assert (await server.store.real.get(PAYER.outpoint)).spent_sat == 10_000
        server.store.release("commit")
        assert accepted(await charging).value_sat == 25
        stored = await server.store.real.get(PAYER.outpoint)
        assert (stored.accepted_sat, stored.spent_sat) == (10_025, 10_025)


async def test_a_repeated_request_waits_for_the_write_of_the_first(tmp_path: Path) -> None:
    """It is not charged again, and not answered before the charge is durable."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.store.hold("commit")
        both = [asyncio.ensure_future(charge(server, 1, 25, 10_025)) for _ in range(2)]
        await until(lambda: server.store.calls["commit"] == 2)
        assert not any(each.done() for each in both)
        server.store.release("commit")
        assert {accepted(await each).channel.spent_sat for each in both} == {10_025}


async def test_a_released_charge_is_credit_for_the_next_request(tmp_path: Path) -> None:
    """Nothing was delivered: the client pays the next request from the credit, without a new payment."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        accepted(await charge(server, 1, 25, 10_025))
        accepted(await server.registry.ask(PAYER.outpoint, Release(request(1))))
        accepted(await charge(server, 2, 25))
        assert (await server.stored(PAYER)).spent_sat == 10_025


async def test_answered_requests_are_marked_by_the_next_charge_or_before_sleep(tmp_path: Path) -> None:
    """An answer that begins to leave costs no write of its own."""
    clock = Clock()
    async with local(tmp_path, clock) as server:
        await server.open(PAYER, 10_000)
        for number in (1, 2):
            accepted(await charge(server, number, 25, 10_000 + 25 * number))
            await server.registry.ask(PAYER.outpoint, Delivered(frozenset([request(number)])))
        marks = [each.is_done for each in (await server.stored(PAYER)).deliveries]
        assert marks == [True, False]
        clock.now += IDLE_SECONDS
        assert server.registry.passivate(IDLE_SECONDS) == 0
        await until(lambda: server.registry.passivate(IDLE_SECONDS) == 1)
        found = find_delivery(await server.stored(PAYER), request(2))
        assert found is not None
        assert found.is_done


async def test_a_refused_charge_loses_no_mark(tmp_path: Path) -> None:
    """The answered request is marked by the next charge that is booked."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        accepted(await charge(server, 1, 25, 10_050))
        await server.registry.ask(PAYER.outpoint, Delivered(frozenset([request(1)])))
        refused(await charge(server, 2, 26))
        accepted(await charge(server, 1, 25))  # a repetition changes nothing
        accepted(await charge(server, 3, 25))
        assert [each.is_done for each in (await server.stored(PAYER)).deliveries] == [True, False]


async def test_the_last_payment_of_a_channel_pays_its_request(tmp_path: Path) -> None:
    """The channel settles, and the request is answered as charged."""
    async with local(tmp_path) as server:
        channel = await server.open(PAYER, 10_000)
        outcome = await charge(server, 1, 25, channel.funding_sat)
        assert accepted(outcome).channel.state in (State.PUBLISHED, State.CLOSED)
        assert accepted(outcome).channel.spent_sat == 10_025
