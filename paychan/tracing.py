"""The ids of a log line: the request that caused it, and the channel that it is about.

Both are context variables. A door sets the request where it begins; the channel's actor sets the channel in the tasks
that log, and a door in its refusals. Tasks and callbacks that start there inherit both (PEP 567). A payment by the fast
path sets one variable once; the ids become text only when a line is written.
"""

from __future__ import annotations

import secrets
from contextvars import ContextVar, Token
from itertools import count

from structlog.typing import EventDict, WrappedLogger

from paychan.protocol.types import OutPoint

_RUN = secrets.token_hex(3)
"""Distinguishes the requests of this process from those of an earlier one in the same log."""

NUMBERS = count(1)
REQUEST: ContextVar[int] = ContextVar("request", default=0)
_channel: ContextVar[OutPoint | str] = ContextVar("channel", default="")


def begin_request() -> None:
    """Give the request that begins in this task a new id."""
    REQUEST.set(next(NUMBERS))


def continue_request() -> None:
    """Keep the id of the request that this task works for; without one, do as `begin_request`."""
    REQUEST.set(REQUEST.get() or next(NUMBERS))


def enter_channel(channel: OutPoint | str) -> Token[OutPoint | str]:
    """Name the channel that the following lines are about, until `leave_channel`, or in this task."""
    return _channel.set(channel)


def leave_channel(token: Token[OutPoint | str]) -> None:
    """Restore the channel of before."""
    _channel.reset(token)


def add_ids(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Add the ids to a log line, unless it names its channel itself (a processor of structlog)."""
    if number := REQUEST.get():
        event.setdefault("request", f"{_RUN}-{number}")
    if (channel := _channel.get()) and "channels" not in event:
        event.setdefault("channel", str(channel))
    return event
