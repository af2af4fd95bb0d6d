"""pykka's promises, kept by actors that run on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pykka
import pytest
from structlog.testing import capture_logs

from actors.runtime import LoopActor, LoopFuture


class Echo(LoopActor):
    """Answers with what it got; calls what can be called."""

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
    """A message is handled as soon as it is put, so a blocking `ask` finds its answer and does not wait."""
    assert Echo.launch().actor_ref.ask("hello") == "hello"


async def test_an_awaitable_answer_is_awaited_by_the_asker():
    """An actor that needs longer returns an awaitable, and the asker gets what that gives."""
    later = asyncio.get_running_loop().create_future()
    asked = ask(Echo.launch(), lambda: later)
    later.set_result("at last")

    assert await asked == "at last"


async def test_get_never_blocks_the_loop():
    """`get` on the loop's thread raises instead of waiting for what only the loop could bring."""
    later = asyncio.get_running_loop().create_future()
    asked = ask(Echo.launch(), lambda: later)

    with pytest.raises(RuntimeError, match="await"):
        asked.get()
    later.cancel()


async def test_a_stopped_actor_refuses():
    """Asking and telling an actor that was stopped raise ActorDeadError."""
    actor = Echo.launch()
    actor.actor_ref.stop()

    with pytest.raises(pykka.ActorDeadError):
        await ask(actor, "hello")
    with pytest.raises(pykka.ActorDeadError):
        actor.actor_ref.tell("hello")
    assert actor.seen == []


async def test_stop_returns_at_once_and_says_whether_it_did_anything():
    """`stop` is true the first time, false afterwards, also when its future is awaited."""
    actor = Echo.launch()

    assert actor.actor_ref.stop() is True
    assert actor.actor_ref.stop() is False
    assert await Echo.launch().actor_ref.stop(block=False) is True


async def test_an_actor_may_be_told_to_stop_twice():
    """Whoever finds that an actor must go may say so without asking whether it went already."""
    actor = Echo.launch()
    actor.stop()
    actor.stop()

    assert not actor.alive


async def test_a_message_from_inside_a_handler_waits_for_its_turn():
    """An actor that asks itself is not entered twice: the message is handled after the one that sent it."""
    actor = Echo.launch()
    order = []

    def outer() -> LoopFuture:
        inner = ask(actor, lambda: order.append("inner"))
        order.append("outer")
        return inner

    await ask(actor, outer)

    assert order == ["outer", "inner"]


async def test_stopping_from_inside_a_handler_lets_it_finish():
    """The message that stops its own actor is answered, and those that were put behind the stop are refused."""
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
    """An exception in a handler reaches the asker and ends that actor; another one lives on."""
    broken, other = Echo.launch(), Echo.launch()

    with capture_logs() as logs, pytest.raises(ZeroDivisionError):
        await ask(broken, lambda: 1 / 0)

    assert (broken.alive, other.alive) == (False, True)
    assert [entry["event"] for entry in logs] == ["actor failed"]


async def test_a_bug_under_tell_kills_the_actor_and_not_the_teller():
    """Nobody waits for a told message, so its exception is logged and goes nowhere else."""
    broken = Echo.launch()
    with capture_logs() as logs:
        broken.actor_ref.tell(lambda: 1 / 0)

    assert not broken.alive
    assert [entry["event"] for entry in logs] == ["actor failed"]


async def test_what_a_told_message_returns_is_carried_out():
    """An awaitable that answers a told message runs although nobody waits for it."""
    done = asyncio.Event()

    async def work() -> None:
        done.set()

    Echo.launch().actor_ref.tell(work)

    await asyncio.wait_for(done.wait(), 5)


async def test_an_asker_that_gives_up_gives_up_alone():
    """Cancelling one who waits cancels neither the work nor another who waits for the same."""
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
    """An asker does not wait for ever for what will never be done."""
    work = asyncio.get_running_loop().create_future()
    asked = ask(Echo.launch(), lambda: work)
    work.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asked


async def test_ten_thousand_messages_do_not_deepen_the_stack():
    """A handler that sends its actor the next message does not recurse."""
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
    """What `map`, `filter` and `join` make of an answered future is awaited like that one."""
    asked = ask(Echo.launch(), ["a", "b"])

    assert await combine(asked) == 2


async def _wait(future: LoopFuture) -> Any:
    return await future
