"""Connections of the signer's socket: frames in, frames out, and nobody who can keep the others waiting.

A request is judged and signed on the event loop, which takes a fraction of a millisecond, and waits for the disk in
between. What can take long is worked on in threads instead: a key store that hangs holds up nobody but those who ask
it, and so does a funding transaction as large as a block. A peer that sends what is no request is told why, with request
id 0, and the connection ends.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar

import structlog
from msgspec import Struct

from paychan.protocol.signerwire import (
    USUAL_FRAME_BYTES,
    ChildReply,
    Refusal,
    Reply,
    Request,
    SettlementReply,
    WireError,
    decode_request,
    encode_frame,
    frame_size,
)
from paychan.protocol.types import OutPoint
from signer.handlers import Approved
from signer.socketfile import peer_uid

WORKERS = 16
"""More than cores: what they wait for may be a hardware module."""

REQUESTS_IN_FLIGHT = 16
"""Of one connection; further ones stay in the socket. With 64 connections of 64 KiB frames this bounds us to 64 MiB."""

LARGE_FRAMES = 8
"""Read at a time, of all connections: 8 MiB."""

FAREWELLS = 256
"""Connections that are told why they are turned away; of more, the rest is closed without a word."""

_FAREWELL_SECONDS = 1.0
"""A connection that is closed with unread input loses what was sent to the peer, so we read on for this long."""

_T = TypeVar("_T")

log = structlog.get_logger()


class Answering(Protocol):
    """What answers requests: see `handlers.Handler`."""

    @property
    def blocking(self) -> bool:
        """Whether it is to be called in a thread."""

    def begin(self, request: Request, peer_uid: int) -> Reply | Approved:
        """Answer, or say what to wait for."""

    def finish(self, request: Request, approved: Approved) -> Reply:
        """Answer what was approved."""


class Limits(Struct, frozen=True):
    """Who is answered, and how long anybody may take."""

    allowed_uids: frozenset[int]
    request_seconds: float
    idle_seconds: float
    max_connections: int


class Connections:
    """Serves the connections of one socket. `serve` is the callback that asyncio's servers take."""

    def __init__(self, answering: Answering, limits: Limits) -> None:
        self._answering = answering
        self._limits = limits
        self._admitted: dict[_Peer, None] = {}
        self._large_frames = asyncio.Semaphore(LARGE_FRAMES)
        self._leaving = 0
        self._workers = ThreadPoolExecutor(WORKERS, "signer")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection until it ends. A peer's failure is its own."""
        try:
            # What is still open when the process stops is cancelled; asyncio would report that as a failed callback.
            with suppress(ConnectionError, TimeoutError, asyncio.CancelledError):
                peer = _Peer(reader, writer)
                refusal = self._admission(peer) or await self._converse(peer)
                if refusal is not None and self._leaving < FAREWELLS:
                    log.warning("turned away", tag=refusal.tag, reason=refusal.reason)
                    await self._turn_away(peer, refusal)
        finally:
            writer.close()

    def close(self) -> None:
        """Begin no further work."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _admission(self, peer: _Peer) -> Refusal | None:
        """Let in who is on the list. When all places are taken, who has been idle for the longest makes room."""
        if peer.uid not in self._limits.allowed_uids:
            return Refusal(0, "policy-peer", f"uid {peer.uid} is not in socket.allowed_uids")
        if len(self._admitted) >= self._limits.max_connections:
            idle = next((other for other in self._admitted if not other.in_flight), None)
            if idle is None:
                return Refusal(0, "protocol-busy", f"{len(self._admitted)} connections are open and busy")
            del self._admitted[idle]
            idle.writer.close()
        return None

    async def _converse(self, peer: _Peer) -> Refusal | None:
        """Answer requests until the peer ends (None), or sends what is no request."""
        slots = asyncio.Semaphore(REQUESTS_IN_FLIGHT)
        self._admitted[peer] = None
        try:
            async with asyncio.TaskGroup() as answers:
                while True:
                    await slots.acquire()
                    request = await self._next_request(peer)
                    if not isinstance(request, _Asked):
                        return request
                    if peer in self._admitted:  # behind all that have been idle for longer
                        self._admitted[peer] = self._admitted.pop(peer)
                    answers.create_task(self._answer(request, peer)).add_done_callback(lambda _: slots.release())
        finally:
            self._admitted.pop(peer, None)

    async def _next_request(self, peer: _Peer) -> _Asked | Refusal | None:
        try:
            try:
                async with asyncio.timeout(self._limits.idle_seconds):
                    prefix = await peer.reader.readexactly(4)
            except TimeoutError:
                return None
            peer.in_flight += 1
            try:
                async with asyncio.timeout(self._limits.request_seconds):
                    return await self._read(peer, frame_size(prefix))
            finally:
                peer.in_flight -= 1
        except asyncio.IncompleteReadError:
            return None
        except TimeoutError:
            return Refusal(0, "policy-deadline", f"half a frame within {self._limits.request_seconds} s")
        except WireError as error:
            return Refusal(0, "protocol-message", str(error))

    async def _read(self, peer: _Peer, size: int) -> _Asked:
        if size <= USUAL_FRAME_BYTES:
            return _Asked(decode_request(await peer.reader.readexactly(size)), large=False)
        async with self._large_frames:
            return _Asked(decode_request(await peer.reader.readexactly(size)), large=True)

    async def _answer(self, asked: _Asked, peer: _Peer) -> None:
        peer.in_flight += 1
        try:
            reply = await self._reply(asked, peer.uid)
            _tell(reply)
            peer.writer.write(encode_frame(reply))
            async with asyncio.timeout(self._limits.request_seconds):
                await peer.writer.drain()
        except (ConnectionError, TimeoutError):
            peer.writer.transport.abort()
        finally:
            peer.in_flight -= 1

    async def _reply(self, asked: _Asked, uid: int) -> Reply:
        """Work on a request, but not longer than it may take."""
        request, threaded = asked.request, asked.large or self._answering.blocking
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                answer = await self._run(lambda: self._answering.begin(request, uid), threaded=threaded)
                if not isinstance(answer, Approved):
                    return answer
                approved = answer
                await asyncio.wait([asyncio.wrap_future(approved.durable)])
                return await self._run(lambda: self._answering.finish(request, approved), threaded=threaded)
        except TimeoutError:
            return Refusal(request.id, "policy-deadline", f"not done within {self._limits.request_seconds} s")
        except Exception as error:  # noqa: BLE001 - a bug must not take the signer down, nor show what it handled
            where = traceback.extract_tb(error.__traceback__)[-1]
            log.error("bug", kind=type(error).__name__, file=where.filename, line=where.lineno)  # noqa: TRY400
            return Refusal(request.id, "protocol-internal", "the signer failed")

    async def _run(self, work: Callable[[], _T], *, threaded: bool) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work) if threaded else work()

    async def _turn_away(self, peer: _Peer, refusal: Refusal) -> None:
        self._leaving += 1
        try:
            peer.writer.write(encode_frame(refusal))
            peer.writer.write_eof()
            async with asyncio.timeout(_FAREWELL_SECONDS):
                while await peer.reader.read(4096):
                    pass
        finally:
            self._leaving -= 1


class _Peer:
    """One connection."""

    __slots__ = ("in_flight", "reader", "uid", "writer")

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.uid = peer_uid(writer.get_extra_info("socket"))
        self.in_flight = 0


class _Asked(Struct, frozen=True):
    request: Request
    large: bool


def _tell(reply: Reply) -> None:
    """Log what was decided, for people; the audit log has it all."""
    if isinstance(reply, Refusal):
        log.warning("refused", tag=reply.tag, reason=reply.reason)
    elif isinstance(reply, SettlementReply):
        log.info("signed", txid=OutPoint(reply.settlement.txid, 0).txid_hex, fee_sat=reply.settlement.fee_sat)
    elif isinstance(reply, ChildReply):
        log.info("signed child", txid=OutPoint(reply.child.txid, 0).txid_hex, fee_sat=reply.child.fee_sat)
