"""Queues have limits: beyond them payments are refused before any check, and all other work continues."""

from __future__ import annotations

import asyncio
from pathlib import Path

from actors.channel import MOST_BEHIND
from paychan.api.responses import refusal
from paychan.callback.base import Verdict
from paychan.protocol.channel import Accepted, Channel, Close, CloseReason, Rejected
from paychan.protocol.errors import BadSignature, Overloaded
from tests.lib.world import DebugPayer, accepted, local, refused, settled_down

LIMIT = 3


async def test_payments_beyond_what_may_wait_for_the_disk_are_refused(tmp_path: Path):
    """With a full queue a payment gets 503; after the write it is accepted, and the refused ones left no trace."""
    async with local(tmp_path) as server:
        payers = [DebugPayer(name) for name in "abcdefgh"]
        channels = [await server.open(payer) for payer in payers]
        server.context.commits._max_waiting = LIMIT
        server.store.hold("commit")
        asks = []
        for payer, channel in zip(payers, channels, strict=True):
            asks.append(asyncio.ensure_future(server.registry.ask(channel.outpoint, payer.pays(10_001))))
            await settled_down()
        done = [ask.result() for ask in asks if ask.done()]
        server.store.release("commit")
        taken = await asyncio.gather(*asks)

        assert [type(refused(outcome)) for outcome in done] == [Overloaded] * (len(payers) - LIMIT - 1)
        assert sum(isinstance(outcome, Accepted) for outcome in taken) == LIMIT + 1
        again = await server.registry.ask(channels[-1].outpoint, payers[-1].pays(10_001))
        assert accepted(again).value_sat == 1


async def test_closing_goes_on_while_payments_are_refused(tmp_path: Path):
    """Operator and deadline can close a channel with any number of waiting payments."""
    async with local(tmp_path) as server:
        channel = await server.open(DebugPayer("a"))
        server.context.commits._max_waiting = 0

        assert isinstance(await server.registry.ask(channel.outpoint, DebugPayer("a").pays(10_001)), Rejected)
        accepted(await server.registry.ask(channel.outpoint, Close(CloseReason.OPERATOR)))


class Slow:
    """An application that answers when the test allows it."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()

    async def ask(self, channel: Channel) -> Verdict:  # noqa: ARG002 - any
        await self.may_answer.wait()
        return Verdict()

    async def close(self) -> None:
        pass


async def test_the_queue_for_an_application_has_a_limit(tmp_path: Path):
    """Only a limited number of payments of one channel wait for the application's answer to an earlier one."""
    application = Slow()
    async with local(tmp_path, application=application) as server:
        payer = DebugPayer("a")
        opening = asyncio.ensure_future(server.open(payer))
        application.may_answer.set()
        channel = await opening
        application.may_answer.clear()
        asks = [
            asyncio.ensure_future(server.registry.ask(channel.outpoint, payer.pays(10_001 + paid)))
            for paid in range(MOST_BEHIND + 5)
        ]
        await settled_down()
        done = [ask.result() for ask in asks if ask.done()]
        application.may_answer.set()
        outcomes = await asyncio.gather(*asks)

        assert [type(refused(outcome)) for outcome in done] == [Overloaded] * 4
        assert sum(isinstance(outcome, Accepted) for outcome in outcomes) == MOST_BEHIND + 1


def test_an_overload_refusal_says_when_to_retry():
    """The refusal is 503 with Retry-After, a code, and both numbers."""
    answer = refusal(Overloaded(waiting=3, what="payments for the disk", limit=3), quiet_404=True, to_operator=True)

    assert answer.status == 503
    assert [name for name, _ in answer.headers] == ["Retry-After"]
    assert b'"code":"overloaded"' in answer.body
    assert b"3 payments for the disk are waiting, limit 3" in answer.body


async def test_fault_75_forged_payments_take_no_place_in_the_queue(tmp_path: Path) -> None:
    """In v1 a caller needs only the outpoint: its forged payment is refused at once, without the channel's numbers."""
    slow = Slow()
    async with local(tmp_path, application=slow) as server:
        payer, stranger = DebugPayer("asked"), DebugPayer("stranger")
        channel = await server.open(payer, 10_000)
        offered = asyncio.ensure_future(server.registry.ask(channel.outpoint, payer.pays(10_001)))
        await settled_down()
        for paid in range(MOST_BEHIND + 5):
            forged = await server.registry.ask(channel.outpoint, stranger.pays(10_002 + paid))
            assert isinstance(refused(forged), BadSignature)
        honest = asyncio.ensure_future(server.registry.ask(channel.outpoint, payer.pays(10_005)))
        await settled_down()
        slow.may_answer.set()

        assert accepted(await offered).value_sat == 1
        assert accepted(await honest).value_sat == 4
