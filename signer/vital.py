"""Vital parts: when one of them ends by an error, the process ends too, with `EXIT_BROKEN`.

A signer with a dead thread, or with a ledger that it can't write, looks healthy from outside and signs nothing. So this
module starts every thread, task and callback that must run as long as the process. The process never
retries such a part: the data on disk is correct, and the next start reads it.
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
"""Exit status of a signer that can't continue. Status 2: the start failed; status 1: the token's process has ended."""

log = structlog.get_logger()

_P = ParamSpec("_P")


def end(what: str, reason: str) -> None:
    """End the process now. Requests in progress get no reply; every signature that was sent is recorded on disk."""
    try:
        log.critical("the signer can't continue and ends; start it again to sign", what=what, reason=reason)
    finally:
        os._exit(EXIT_BROKEN)


def end_by(what: str, error: BaseException) -> None:
    """End the process because of an error. The log names the place of the error and none of the data handled there."""
    try:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "nowhere"
        reason = f"{type(error).__name__} at {where}"
    except MemoryError:
        reason = "no memory left"
    end(what, reason)


def start_thread(what: str, work: Callable[[], None]) -> Thread:
    """Start a daemon thread that must not return by itself.

    Raises:
        RuntimeError: the system can't create another thread.
    """
    thread = Thread(target=guarded(what, work), name=what, daemon=True)
    thread.start()
    return thread


def guarded(what: str, function: Callable[_P, None]) -> Callable[_P, None]:
    """Wrap a callback of the event loop, or the body of a thread: any error in it ends the process."""

    def call(*arguments: _P.args, **named: _P.kwargs) -> None:
        try:
            function(*arguments, **named)
        except BaseException as error:  # noqa: BLE001 - also SystemExit, which ends a thread
            end_by(what, error)

    return call


def watch(what: str, task: asyncio.Task[Any], is_ending: Callable[[], bool]) -> None:
    """End the process when this task ends in any way (error, cancellation, return), unless the process is stopping."""

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


def tell_bug(error: Exception) -> None:
    """Log the place of a bug, without the data handled there. Lack of memory ends the process.

    Where the interpreter does not notice the lack, it raises SystemError ("returned NULL without setting an exception").
    """
    if isinstance(error, MemoryError | SystemError):
        end_by("memory", error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    log.error("bug", kind=type(error).__name__, file=where.filename, line=where.lineno)


def end_without_memory(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle uncaught errors of the event loop: a lack of memory ends the process, other errors are logged."""
    error = context.get("exception")
    if isinstance(error, MemoryError):
        end_by("memory", error)
    loop.default_exception_handler(context)
