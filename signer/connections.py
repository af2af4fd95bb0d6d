"""Connections of the signer's socket: frames in, frames out, and nobody who can keep the others waiting.

Requests of one connection are worked on side by side, in worker threads: libsecp256k1 lets go of the interpreter lock,
and a key store that hangs holds up nobody but those who ask it. A peer that sends what is no request is told why, with
request id 0, and the connection ends.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import structlog
from msgspec import Struct

from paychan.protocol.signerwire import (
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
from signer.socketfile import peer_uid

WORKERS = 8
"""More than cores: what they wait for may be a hardware module."""

REQUESTS_IN_FLIGHT = 16
"""Of one connection; further ones stay in the socket. With 64 connections of 64 KiB frames this bounds us to 64 MiB."""

_FAREWELL_SECONDS = 1.0
"""A connection that is closed with unread input loses what was sent to the peer, so we read on for this long."""

log = structlog.get_logger()


class Limits(Struct, frozen=True):
    """Who is answered, and how long anybody may take."""

    allowed_uids: frozenset[int]
    request_seconds: float
    idle_seconds: float
    max_connections: int


class Connections:
    """Serves the connections of one socket. `serve` is the callback that asyncio's servers take."""

    def __init__(self, handle: Callable[[Request], Reply], limits: Limits) -> None:
        self._handle = handle
        self._limits = limits
        self._admitted = 0
        self._workers = ThreadPoolExecutor(WORKERS, "signer")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection until it ends. A peer's failure is its own."""
        try:
            # What is still open when the process stops is cancelled; asyncio would report that as a failed callback.
            with suppress(ConnectionError, TimeoutError, asyncio.CancelledError):
                refusal = self._admission(writer) or await self._converse(reader, writer)
                if refusal is not None:
                    log.warning("turned away", tag=refusal.tag, reason=refusal.reason)
                    await _turn_away(reader, writer, refusal)
        finally:
            writer.close()

    def close(self) -> None:
        """Begin no further work."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _admission(self, writer: asyncio.StreamWriter) -> Refusal | None:
        uid = peer_uid(writer.get_extra_info("socket"))
        if uid not in self._limits.allowed_uids:
            return Refusal(0, "policy-peer", f"uid {uid} is not in socket.allowed_uids")
        if self._admitted >= self._limits.max_connections:
            return Refusal(0, "protocol-busy", f"{self._admitted} connections are open")
        return None

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Refusal | None:
        """Answer requests until the peer ends (None), or sends what is no request."""
        slots = asyncio.Semaphore(REQUESTS_IN_FLIGHT)
        self._admitted += 1
        try:
            async with asyncio.TaskGroup() as answers:
                while True:
                    await slots.acquire()
                    request = await self._next_request(reader)
                    if not isinstance(request, Request):
                        return request
                    answers.create_task(self._answer(request, writer)).add_done_callback(lambda _: slots.release())
        finally:
            self._admitted -= 1

    async def _next_request(self, reader: asyncio.StreamReader) -> Request | Refusal | None:
        try:
            try:
                async with asyncio.timeout(self._limits.idle_seconds):
                    prefix = await reader.readexactly(4)
            except TimeoutError:
                return None
            async with asyncio.timeout(self._limits.request_seconds):
                return decode_request(await reader.readexactly(frame_size(prefix)))
        except asyncio.IncompleteReadError:
            return None
        except TimeoutError:
            return Refusal(0, "policy-deadline", f"half a frame within {self._limits.request_seconds} s")
        except WireError as error:
            return Refusal(0, "protocol-message", str(error))

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        reply = await self._reply(request)
        if isinstance(reply, Refusal):
            log.warning("refused", tag=reply.tag, reason=reply.reason)
        elif isinstance(reply, SettlementReply):
            log.info("signed", txid=OutPoint(reply.settlement.txid, 0).txid_hex, fee_sat=reply.settlement.fee_sat)
        elif isinstance(reply, ChildReply):
            log.info("signed child", txid=OutPoint(reply.child.txid, 0).txid_hex, fee_sat=reply.child.fee_sat)
        try:
            writer.write(encode_frame(reply))
            async with asyncio.timeout(self._limits.request_seconds):
                await writer.drain()
        except (ConnectionError, TimeoutError):
            writer.transport.abort()

    async def _reply(self, request: Request) -> Reply:
        """Work on a request in a thread, but not longer than it may take."""
        work = asyncio.get_running_loop().run_in_executor(self._workers, self._handle, request)
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                return await work
        except TimeoutError:
            return Refusal(request.id, "policy-deadline", f"not done within {self._limits.request_seconds} s")
        except Exception as error:  # noqa: BLE001 - a bug must not take the signer down, nor show what it handled
            where = traceback.extract_tb(error.__traceback__)[-1]
            log.error("bug", kind=type(error).__name__, file=where.filename, line=where.lineno)  # noqa: TRY400
            return Refusal(request.id, "protocol-internal", "the signer failed")


async def _turn_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, refusal: Refusal) -> None:
    writer.write(encode_frame(refusal))
    writer.write_eof()
    async with asyncio.timeout(_FAREWELL_SECONDS):
        while await reader.read(4096):
            pass
