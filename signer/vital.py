"""Parts that must live as long as the process: when one ends by an error, the process ends too, with `EXIT_BROKEN`.

A signer whose ledger can't be written, or one of whose threads is dead, looks well from outside and signs nothing. So
this module starts every thread, task and callback that is started once and must go on for ever. There is
no second try inside the process: what is on disk is the truth, and the next start reads it.
"""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Callable
from threading import Thread
from typing import Any, ParamSpec

import structlog

EXIT_BROKEN = 3
"""Exit status of a signer that can't go on; 2 is for a start that fails, 1 for the end of the token's process."""

log = structlog.get_logger()

_P = ParamSpec("_P")


def end(what: str, reason: str) -> None:
    """End the process now. Requests in flight get no answer; what was signed for is on disk, or was not answered."""
    try:
        log.critical("the signer can't go on and ends; it signs again after its next start", what=what, reason=reason)
    finally:
        os._exit(EXIT_BROKEN)


def end_by(what: str, error: BaseException) -> None:
    """End the process because of an error; says where it was raised, and nothing of what was handled there."""
    try:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "nowhere"
        reason = f"{type(error).__name__} at {where}"
    except MemoryError:
        reason = "no memory left"
    end(what, reason)


def start_thread(what: str, work: Callable[[], None]) -> Thread:
    """Start a daemon thread that returns only when it was asked to.

    Raises:
        RuntimeError: the system gives no further thread.
    """
    thread = Thread(target=guarded(what, work), name=what, daemon=True)
    thread.start()
    return thread


def guarded(what: str, function: Callable[_P, None]) -> Callable[_P, None]:
    """Wrap a callback of the event loop, or the body of a thread: no error of it is survived."""

    def call(*arguments: _P.args, **named: _P.kwargs) -> None:
        try:
            function(*arguments, **named)
        except BaseException as error:  # noqa: BLE001 - also what ends a thread
            end_by(what, error)

    return call


def watch(what: str, task: asyncio.Task[Any], is_ending: Callable[[], bool]) -> None:
    """End the process when this task ends, unless everything ends: also when it was cancelled, or returned."""

    def ended(task: asyncio.Task[Any]) -> None:
        if is_ending():
            return
        if task.cancelled():
            end(what, "it was cancelled")
        elif (error := task.exception()) is not None:
            end_by(what, error)
        else:
            end(what, "it returned")

    task.add_done_callback(ended)


def end_without_memory(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle uncaught errors of the event loop: a lack of memory ends the process, other errors are logged."""
    error = context.get("exception")
    if isinstance(error, MemoryError):
        end_by("memory", error)
    loop.default_exception_handler(context)
