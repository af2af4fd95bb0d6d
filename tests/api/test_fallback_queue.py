"""Requests for Tornado begin at a pace that leaves half of the loop to payments."""

from __future__ import annotations

import asyncio

from paychan.api.budgets.fallback_queue import PACE_SECONDS, FallbackQueue


async def test_a_request_alone_begins_in_the_next_turn() -> None:
    queue, begun = FallbackQueue(), asyncio.get_running_loop().create_future()
    queue.begin("a", lambda: begun.set_result(None))
    assert not begun.done()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert begun.done()


async def test_fault_78_a_flood_begins_at_a_pace() -> None:
    """Queued requests keep the pace, whatever number of turns the loop makes meanwhile."""
    queue, loop = FallbackQueue(), asyncio.get_running_loop()
    times: list[float] = []
    for _ in range(10):
        queue.begin("a", lambda: times.append(loop.time()))
    while len(times) < 10:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert times[-1] - times[0] >= 9 * PACE_SECONDS * 0.95


async def test_a_client_that_has_paid_does_not_wait() -> None:
    """Payments that Tornado serves are not held to the pace of strangers."""
    queue, order = FallbackQueue(), list[str]()
    for _ in range(5):
        queue.begin("a", lambda: order.append("stranger"))
    for _ in range(20):
        queue.begin("a", lambda: order.append("payer"), has_paid=True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order.count("payer") == 20


async def test_networks_take_turns() -> None:
    """A client behind a flood waits for one of the flood's requests, not for all of them."""
    queue, order = FallbackQueue(), list[str]()
    for _ in range(5):
        queue.begin("flood", lambda: order.append("flood"))
    queue.begin("client", lambda: order.append("client"))
    while len(order) < 6:  # noqa: ASYNC110
        await asyncio.sleep(PACE_SECONDS)
    assert order.index("client") <= 1
