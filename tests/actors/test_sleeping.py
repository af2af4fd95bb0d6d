"""Idle channels sleep: their actors stop, their records stay, and no message is lost."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import tracemalloc
import weakref
from pathlib import Path

from structlog.testing import capture_logs

from paychan.protocol.channel import Close, CloseReason
from tests.lib.world import IDLE_SECONDS, Clock, DebugPayer, accepted, local, settled_down, until

PAYER = DebugPayer("sleeping")


async def test_an_idle_channel_sleeps_and_wakes_with_the_same_state(tmp_path: Path):
    """After the idle time the actor is gone; the next message is judged by the same record."""
    clock = Clock()
    async with local(tmp_path, clock) as server:
        await server.open(PAYER, 10_000)
        newest = accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(10_010))).channel
        actor = server.registry.actors[PAYER.outpoint]
        clock.now += IDLE_SECONDS - 1
        assert server.registry.passivate(IDLE_SECONDS) == 0
        clock.now += 1
        assert server.registry.passivate(IDLE_SECONDS) == 1

        assert not actor.alive
        assert server.registry.awake == 0
        assert await server.registry.read(PAYER.outpoint) == newest
        assert accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(10_015))).value_sat == 5
        assert server.registry.awake == 1


async def test_a_sleeping_actor_gives_its_memory_back(tmp_path: Path):
    """No reference keeps a stopped actor in memory."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        actor = weakref.ref(server.registry.actors[PAYER.outpoint])
        server.registry.passivate(0)
        gc.collect()

        assert actor() is None


async def test_a_channel_with_work_under_way_stays_awake(tmp_path: Path):
    """While a payment is written or a settlement is signed, the actor is not idle."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.store.hold("commit")
        payment = asyncio.ensure_future(server.registry.ask(PAYER.outpoint, PAYER.pays(10_010)))
        await until(lambda: server.store.calls["commit"] == 2)
        assert server.registry.passivate(0) == 0
        server.store.release("commit")
        await payment

        server.signer.hold("sign_settlement")
        closing = asyncio.ensure_future(server.registry.ask(PAYER.outpoint, Close(CloseReason.OPERATOR)))
        await until(lambda: server.signer.calls["sign_settlement"])
        assert server.registry.passivate(0) == 0
        server.signer.release("sign_settlement")
        accepted(await closing)
        assert server.registry.passivate(0) == 1


async def test_an_actor_that_died_is_removed(tmp_path: Path):
    """The watcher's scan works after a bug has stopped an actor."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.registry.actors[PAYER.outpoint].stop()
        with capture_logs() as logs:
            server.clock.now += IDLE_SECONDS
            await server.watcher.scan()

        assert server.registry.awake == 0
        assert logs == []


async def test_no_message_is_lost_around_the_moment_of_sleeping(tmp_path: Path):
    """Channels that are stopped at every possible moment answer each of their payments exactly once."""
    chance = random.Random(7)
    payers = [DebugPayer(f"sleepy {n}") for n in range(8)]
    async with local(tmp_path) as server:

        async def use(payer: DebugPayer) -> int:
            values = []
            for n in range(1, 31):
                values.append(accepted(await server.registry.ask(payer.outpoint, payer.pays(10_000 + n))).value_sat)
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            return sum(values)

        for payer in payers:
            await server.open(payer, 10_000)
        using = asyncio.gather(*map(use, payers))
        slept = 0
        while not using.done():
            slept += server.registry.passivate(0)
            await asyncio.sleep(0)

        assert await using == [30] * len(payers)
        assert slept >= len(payers)
        assert {(await server.stored(payer)).received_sat for payer in payers} == {10_030}


async def test_messages_for_a_sleeping_channel_wake_it_once(tmp_path: Path):
    """Sixteen payments for a sleeping channel are judged by one actor, in order."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        server.registry.passivate(0)
        server.store.hold("get")
        asked = [
            asyncio.ensure_future(server.registry.ask(PAYER.outpoint, PAYER.pays(10_000 + n))) for n in range(1, 17)
        ]
        await settled_down()
        server.store.release("get")
        outcomes = await asyncio.gather(*asked)

        assert sum(getattr(outcome, "value_sat", 0) for outcome in outcomes) == 16
        assert server.registry.awake == 1


async def test_a_channel_costs_no_thread(tmp_path: Path):
    """A hundred awake channels need as many threads as one."""
    async with local(tmp_path) as server:
        await server.open(PAYER, 10_000)
        accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(10_001)))
        server.registry.passivate(0)
        accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(10_002)))
        before = threading.active_count()
        for n in range(100):
            await server.open(DebugPayer(f"thread {n}"))

        assert server.registry.awake == 101
        assert threading.active_count() <= before + 1  # the store's second reader may not have been needed before


async def test_a_channel_awake_costs_at_most_four_kilobytes(tmp_path: Path):
    """All memory that Python keeps for a channel with payments, including its newest record."""
    payers = [DebugPayer(f"memory {n}") for n in range(200)]
    async with local(tmp_path) as server:
        await asyncio.gather(*map(server.open, payers))
        server.registry.passivate(0)
        payments = [(payer.outpoint, payer.pays(10_001)) for payer in payers]
        gc.collect()
        tracemalloc.start()
        try:
            for outcome in await asyncio.gather(*(server.registry.ask(*payment) for payment in payments)):
                accepted(outcome)
            del outcome
            gc.collect()
            each = tracemalloc.get_traced_memory()[0] / len(payers)
        finally:
            tracemalloc.stop()

        assert server.registry.awake == len(payers)
        assert each < 4_096
