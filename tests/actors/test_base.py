"""Actors on the event loop keep pykka's promises."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pykka
import pytest
from structlog.testing import capture_logs

from actors.runtime import LoopActor, LoopFuture


class Echo(LoopActor):
    """Answers with its message; calls a message that is callable."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_receive(self, message: Any) -> Any:
        self.seen.append(message)
        return message() if callable(message) else message


def ask(actor: LoopActor, message: Any) -> LoopFuture:
    future = actor.actor_ref.ask(message, block=False)
    assert isinstance(future, LoopFuture)
    return future


async def test_an_answer_is_there_when_ask_returns():
    """A message is handled as soon as it is put, so a blocking `ask` has its answer at once."""
    assert Echo.launch().actor_ref.ask("hello") == "hello"


async def test_the_caller_awaits_an_awaitable_answer():
    """An actor that needs longer returns an awaitable, and the caller gets its result."""
    later = asyncio.get_running_loop().create_future()
    asked = ask(Echo.launch(), lambda: later)
    later.set_result("at last")

    assert await asked == "at last"


async def test_get_never_blocks_the_loop():
    """`get` on the loop's thread raises instead of waiting for a result that only the loop can produce."""
    later = asyncio.get_running_loop().create_future()
    asked = ask(Echo.launch(), lambda: later)

    with pytest.raises(RuntimeError, match="await"):
        asked.get()
    later.cancel()


async def test_a_stopped_actor_refuses():
    """`ask` and `tell` raise ActorDeadError for a stopped actor."""
    actor = Echo.launch()
    actor.actor_ref.stop()

    with pytest.raises(pykka.ActorDeadError):
        await ask(actor, "hello")
    with pytest.raises(pykka.ActorDeadError):
        actor.actor_ref.tell("hello")
    assert actor.seen == []


async def test_stop_returns_at_once_and_says_whether_it_did_anything():
    """`stop` is true the first time and false afterwards, also if its future is awaited."""
    actor = Echo.launch()

    assert actor.actor_ref.stop() is True
    assert actor.actor_ref.stop() is False
    assert await Echo.launch().actor_ref.stop(block=False) is True


async def test_an_actor_can_be_stopped_twice():
    """A second stop has no effect, so a caller need not check whether the actor has stopped already."""
    actor = Echo.launch()
    actor.stop()
    actor.stop()

    assert not actor.alive


async def test_a_message_from_inside_a_handler_waits_for_its_turn():
    """An actor that sends itself a message handles it after the present one."""
    actor = Echo.launch()
    order = []

    def outer() -> LoopFuture:
        inner = ask(actor, lambda: order.append("inner"))
        order.append("outer")
        return inner

    await ask(actor, outer)

    assert order == ["outer", "inner"]


async def test_stopping_from_inside_a_handler_lets_it_finish():
    """The message that stops its own actor is answered, and messages after the stop are refused."""
    actor = Echo.launch()
    behind: list[LoopFuture] = []

    def stop() -> str:
        actor.stop()
        behind.append(ask(actor, "too late"))
        return "stopping"

    assert await ask(actor, stop) == "stopping"
    with pytest.raises(pykka.ActorDeadError):
        await behind[0]


async def test_a_bug_is_answered_and_kills_only_its_actor():
    """An exception in a handler reaches the caller and stops that actor; another actor continues."""
    broken, other = Echo.launch(), Echo.launch()

    with capture_logs() as logs, pytest.raises(ZeroDivisionError):
        await ask(broken, lambda: 1 / 0)

    assert (broken.alive, other.alive) == (False, True)
    assert [entry["event"] for entry in logs] == ["actor failed"]


async def test_a_bug_under_tell_kills_the_actor_and_not_the_caller():
    """No caller waits for a message of `tell`, so its exception is only logged."""
    broken = Echo.launch()
    with capture_logs() as logs:
        broken.actor_ref.tell(lambda: 1 / 0)

    assert not broken.alive
    assert [entry["event"] for entry in logs] == ["actor failed"]


async def test_an_awaitable_returned_under_tell_runs():
    """An awaitable that answers a message of `tell` runs although no caller waits for it."""
    done = asyncio.Event()

    async def work() -> None:
        done.set()

    Echo.launch().actor_ref.tell(work)

    await asyncio.wait_for(done.wait(), 5)


async def test_a_cancelled_caller_cancels_no_other():
    """The cancellation of one waiting caller cancels neither the work nor another caller of the same work."""
    work = asyncio.get_running_loop().create_future()
    actor = Echo.launch()
    impatient = asyncio.ensure_future(_wait(ask(actor, lambda: work)))
    patient = asyncio.ensure_future(_wait(ask(actor, lambda: work)))
    await asyncio.sleep(0)

    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    work.set_result("done")

    assert impatient.cancelled()
    assert await patient == "done"


async def test_work_that_is_cancelled_ends_the_wait_for_it():
    """The caller of cancelled work gets the cancellation and does not wait for ever."""
    work = asyncio.get_running_loop().create_future()
    asked = ask(Echo.launch(), lambda: work)
    work.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asked


async def test_ten_thousand_messages_do_not_deepen_the_stack():
    """A handler that sends its actor the next message causes no recursion."""
    actor = Echo.launch()
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        if count < 10_000:
            actor.actor_ref.tell(again)

    actor.actor_ref.tell(again)

    assert count == 10_000


@pytest.mark.parametrize(
    "combine", [lambda f: f.map(len), lambda f: f.filter(bool).map(len), lambda f: f.join(f).map(len)]
)
async def test_combined_futures_can_be_awaited(combine: Callable[[Any], Any]):
    """The futures that `map`, `filter` and `join` make of an answered future can be awaited."""
    asked = ask(Echo.launch(), ["a", "b"])

    assert await combine(asked) == 2


async def _wait(future: LoopFuture) -> Any:
    return await future
