"""Flows: the payer's steps as generators of effects. They do no I/O, so threads and asyncio share the logic.

A flow yields an effect and receives its result: `Request` → `Response` or `NoAnswer`; `Connect` → `Connected` or
`NoAnswer`; `Send` → None; `Receive` → `Received` or `NoAnswer`; `Save` → None, once the record is durable; `Pause` →
None, after that time; `Retry` → None or `NoAnswer`. Module `http` performs the effects, blocking or on an event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TypeAlias, TypeVar
from urllib.parse import urlsplit

from msgspec import Struct

from paychan.client.errors import ServerMisbehaved, Unreachable
from paychan.client.record import ChannelRecord

T = TypeVar("T")

TIME_LIMIT_SECONDS = 30.0
"""Default of the time that one call may take, with all that it sends again."""


class Request(Struct, frozen=True):
    """An HTTP request. Every request of this library may be sent twice without harm."""

    method: str
    url: str
    body: bytes = b""


class Response(Struct, frozen=True):
    """An HTTP answer; header names in lower case."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


class NoAnswer(Struct, frozen=True):
    """The connection failed; it is unknown whether the server got the request."""

    reason: str
    last: bool = False
    """The time limit of the call is over: nothing is sent again."""


class Connect(Struct, frozen=True):
    """Open a stream (WebSocket). A flow has one at a time, which is closed when the flow ends."""

    url: str
    secret: str


class Connected(Struct, frozen=True):
    """The stream is open."""


class Send(Struct, frozen=True):
    """Send a binary frame. If the stream is broken, the next `Receive` reports it."""

    frame: bytes


class Receive(Struct, frozen=True):
    """Wait for the next frame."""


class Received(Struct, frozen=True):
    """A binary frame from the server; b"" for a text frame, which the client does not expect."""

    frame: bytes


class Save(Struct, frozen=True):
    """Make the record durable, then adopt it."""

    record: ChannelRecord


class Pause(Struct, frozen=True):
    """Wait this many seconds. Afterwards the time limit of the call begins anew."""

    seconds: float


class Retry(Struct, frozen=True):
    """Wait this many seconds before a request is sent again; `NoAnswer` if the time limit of the call ends before."""

    seconds: float


class Patience(Struct, frozen=True):
    """Retry policy for a server that is busy or silent: pauses double, `Retry-After` is honoured."""

    attempts: int = 5
    first_pause_seconds: float = 0.25
    longest_pause_seconds: float = 30.0


class Reply(Struct, frozen=True):
    """The final answer to a request; with `repeated` the server may have seen the request more than once."""

    response: Response
    repeated: bool


Effect: TypeAlias = Request | Connect | Send | Receive | Save | Pause | Retry
Answer: TypeAlias = Response | Connected | Received | NoAnswer | None
Flow: TypeAlias = Generator[Effect, Answer, T]

MOVED = frozenset({308, 318})
"""Statuses that report a channel's new location (RBPCP §6.5); 308 is also an ordinary redirect."""

_NOT_YET = frozenset({429, 502, 503, 504})
"""Statuses after which the same request is sent again."""


def is_busy(response: Response) -> bool:
    """Say whether the server asks the client to retry later."""
    return response.status in _NOT_YET


def ask(
    request: Request, patience: Patience, busy: Callable[[Response], bool] = is_busy, *, follows: bool = False
) -> Flow[Reply]:
    """Send a request until it is answered, or the attempts or the time are used up; return the last answer, busy or not.

    When the time limit ends while a repetition waits for its answer, the answer before it is the last one.

    With `follows` the caller handles a move of the channel (308, 318) itself.

    Raises:
        Unreachable: the last attempt got no answer, or the time limit ended before the first answer.
        ServerMisbehaved: a redirect. The client follows none, since it could send a payment or a secret to another
            server.
    """
    pause = patience.first_pause_seconds
    attempt = 1
    heard: Response | None = None
    while True:
        answer = yield request
        last = attempt == patience.attempts
        if isinstance(answer, Response):
            if 300 <= answer.status < 400 and not (follows and answer.status in MOVED):
                raise ServerMisbehaved(what="redirect", got=answer.status, want="an answer")
            wanted = _retry_after(answer)
            if not busy(answer) or last or wanted > patience.longest_pause_seconds:
                return Reply(answer, repeated=attempt > 1)
            pause, heard = max(pause, wanted), answer
        elif _is_last(answer) and heard is not None:
            return Reply(heard, repeated=True)
        elif last or _is_last(answer):
            raise _unreachable(request, answer)
        else:
            heard = None
        if (yield Retry(min(pause, patience.longest_pause_seconds))) is not None:
            if isinstance(answer, Response):
                return Reply(answer, repeated=attempt > 1)
            raise _unreachable(request, answer)
        pause *= 2
        attempt += 1


def _is_last(answer: Answer) -> bool:
    return isinstance(answer, NoAnswer) and answer.last


def _unreachable(request: Request, answer: Answer) -> Unreachable:
    server = urlsplit(request.url)
    reason = answer.reason if isinstance(answer, NoAnswer) else "no answer"
    return Unreachable(url=f"{server.scheme}://{server.netloc}", reason=reason)


def _retry_after(response: Response) -> float:
    """Read `Retry-After` in seconds; its date form is ignored."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 8 else 0.0
