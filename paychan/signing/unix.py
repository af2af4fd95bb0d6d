"""The server's client of the signer's Unix socket: one connection, many requests in flight, each with a deadline.

A connection is made when it is needed, and made again when it broke: the signer may restart at any time. One that hangs is
waited for by those alone who asked before that showed; who asks then hears at once that it is absent, until it has answered
a question of our own.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from paychan.protocol.channel import Adopt
from paychan.protocol.settlement import Claim, Reserve, Settlement
from paychan.protocol.signerwire import (
    AgainReply,
    AgainRequest,
    BehindReply,
    BehindRequest,
    ChildReply,
    ChildRequest,
    FundingReply,
    FundingRequest,
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
    Newest,
    NewestReply,
    NewestRequest,
    Refusal,
    Reply,
    Request,
    ReserveReply,
    ReserveRequest,
    SettlementReply,
    SettlementRequest,
    WireError,
    decode_reply,
    encode_frame,
    frame_size,
)
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.signing.base import SignerAbsent, SignerRefused
from paychan.signing.checks import WRONG_REPLY, check_again, check_child, check_key, check_settlement

_PASSING = (
    "policy-deadline",
    "policy-heartbeat",
    "policy-rate",
    "protocol-busy",
    "protocol-disk",
    "protocol-keys",
    "protocol-ledger",
)
"""Refusals that say nothing against the request: the same one may be sent again, the last after the signer's restart."""

_TRIES = 6
"""The signer closes connections to make room for others when it has to; and each of these pauses is twice the last."""

_PAUSE_SECONDS = 0.02

_T = TypeVar(
    "_T",
    HealthReply,
    KeyReply,
    ReserveReply,
    SettlementReply,
    ChildReply,
    FundingReply,
    AgainReply,
    BehindReply,
    NewestReply,
)


class UnixSigner:
    """A `paychan.signing.base.Signer` behind a socket at `path`; every call ends within `deadline_seconds`."""

    def __init__(self, path: Path, deadline_seconds: float) -> None:
        self._path = path
        self._deadline = deadline_seconds
        self._ids = itertools.count(1)  # 0 is the signer's, for what belongs to no request
        self._connecting = asyncio.Lock()
        self._connection: _Connection | None = None
        self._probing: asyncio.Task[None] | None = None
        """It hangs, as far as we know."""
        self._closed = False

    async def health(self) -> HealthReply:
        """Ask who the signer is."""
        return await self._ask(Health(next(self._ids)), HealthReply)

    async def public_key(self, client_key: bytes, expiry: UnixTime, *, settling: bool = False) -> KeyReply:
        """Ask for the server key of a channel, and the destination of its settlement."""
        reply = await self._ask(KeyRequest(next(self._ids), client_key, expiry, settling), KeyReply)
        check_key(reply.server_key, "server_key")
        return reply

    async def reserve_key(self) -> bytes:
        """Ask for the public key of the coins that may help to pay for settlements."""
        reply = await self._ask(ReserveRequest(next(self._ids)), ReserveReply)
        check_key(reply.public_key, "reserve_key")
        return reply.public_key

    async def sign_settlement(
        self, claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, reserve: Reserve | None = None
    ) -> Settlement:
        """Ask for a signed settlement; the one returned is what claims, destination, fee and reserve mean."""
        request = SettlementRequest(next(self._ids), tuple(claims), destination_script, fee_sat, reserve)
        reply = await self._ask(request, SettlementReply)
        check_settlement(reply.settlement, request)
        return reply.settlement

    async def sign_child(
        self,
        claims: Sequence[Claim],
        destination_script: bytes,
        fee_sat: Sat,
        child_fee_sat: Sat,
        reserve: Reserve | None = None,
    ) -> Settlement:
        """Ask for a child of the settlement that was signed for these claims, destination, fee and reserve.

        The one returned is that, but for the txid that it spends: whoever keeps the settlement knows its txid.
        """
        parent = SettlementRequest(0, tuple(claims), destination_script, fee_sat, reserve)
        request = ChildRequest(next(self._ids), parent, child_fee_sat)
        reply = await self._ask(request, ChildReply)
        check_child(reply.child, request)
        return reply.child

    async def show_funding(self, transaction: bytes, outputs: Sequence[int]) -> None:
        """Show what these outputs of a transaction hold."""
        await self._ask(FundingRequest(next(self._ids), transaction, tuple(outputs)), FundingReply)

    async def show_newest(self, claims: Sequence[Claim]) -> NewestReply:
        """Show the newest payments of channels."""
        return await self._ask(NewestRequest(next(self._ids), tuple(claims)), NewestReply)

    async def behind(self, payments: Sequence[Newest]) -> tuple[OutPoint, ...]:
        """Ask of which of these channels a settlement was signed, or a newer payment was shown."""
        return (await self._ask(BehindRequest(next(self._ids), tuple(payments)), BehindReply)).outpoints

    async def sign_again(self, outpoint: OutPoint) -> Adopt:
        """Ask for the newest claim of this outpoint, and for the newest settlement that was signed for it.

        The settlement returned is what its request means, and the request has that claim; the client's signature
        in the claim is checked by who adopts it.
        """
        reply = await self._ask(AgainRequest(next(self._ids), outpoint), AgainReply)
        check_again(reply, outpoint)
        return Adopt(reply.claim, reply.settlement)

    async def close(self) -> None:
        """Let go of the connection; calls in flight and later ones end with `SignerAbsent`."""
        self._closed = True
        if self._probing is not None:
            self._probing.cancel()
        if self._connection is not None:
            await self._connection.close()

    async def _ask(self, request: Request, kind: type[_T]) -> _T:
        reply = await self._reply(request)
        if isinstance(reply, Refusal) and reply.tag not in _PASSING:
            raise SignerRefused(reply.tag, reply.reason, reply.need_sat)
        if isinstance(reply, str | Refusal):
            msg = f"{self._path}: {reply if isinstance(reply, str) else reply.reason}"
            raise SignerAbsent(msg)
        if not isinstance(reply, kind):
            raise SignerRefused(WRONG_REPLY, f"asked for {kind.__name__}, got {type(reply).__name__}")
        return reply

    async def _reply(self, request: Request) -> Reply | str:
        """Return the reply, or the reason why there is none."""
        hangs = f"no answer within {self._deadline} s"
        if self._probing is not None and not isinstance(request, Health):
            return f"{hangs} lately, and none since"
        frame = encode_frame(request)
        try:
            frame_size(frame[:4])  # too many claims: said here, where it costs the other calls nothing
            async with asyncio.timeout(self._deadline):
                return await self._exchange(frame, request.id)
        except WireError as error:
            return Refusal(request.id, "protocol-message", str(error))
        except TimeoutError:
            if self._probing is None and not self._closed:
                self._probing = asyncio.create_task(self._probe())
            return hangs
        except OSError as error:
            return error.strerror or str(error)

    async def _probe(self) -> None:
        """Ask a signer that hangs for its health until there is an answer, or nobody there who could hang."""
        try:
            while True:
                request = Health(next(self._ids))
                try:
                    async with asyncio.timeout(self._deadline):
                        await self._exchange(encode_frame(request), request.id)
                except TimeoutError:
                    continue
                except OSError:
                    return
                return
        finally:
            self._probing = None

    async def _exchange(self, frame: bytes, request_id: int) -> Reply:
        """Send and wait; when a connection ends before the reply, try another one a few times."""
        pause = _PAUSE_SECONDS
        for _ in range(_TRIES - 1):
            try:
                return await (await self._connected()).ask(frame, request_id)
            except (ConnectionResetError, BrokenPipeError):
                await asyncio.sleep(pause)
                pause *= 2
        return await (await self._connected()).ask(frame, request_id)

    async def _connected(self) -> _Connection:
        if self._connection is not None and not self._connection.lost:
            return self._connection
        async with self._connecting:
            if self._closed:
                msg = "client was closed"
                raise ConnectionAbortedError(msg)
            if self._connection is None or self._connection.lost:
                self._connection = _Connection(*await _connect(self._path))
        return self._connection


async def _connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, and wait while the signer's queue is full; asyncio would take that for a connection that is being made."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        while True:
            try:
                connection.connect(str(path))
                break
            except BlockingIOError:
                await asyncio.sleep(_PAUSE_SECONDS)
        return await asyncio.open_unix_connection(sock=connection)
    except BaseException:
        connection.close()
        raise


class _Connection:
    """One connection and those who wait for its replies. `ConnectionResetError` means: it ended, nothing is known."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._receiving = asyncio.create_task(self._receive())

    @property
    def lost(self) -> bool:
        return self._receiving.done() or self._writer.is_closing()

    async def ask(self, frame: bytes, request_id: int) -> Reply:
        """Send a request and wait for the reply to it."""
        await self._writer.drain()  # first, so that a signer that reads nothing does not make us buffer without end
        if self.lost:
            msg = "connection was closed"
            raise ConnectionResetError(msg)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            self._writer.write(frame)
            return await future
        finally:
            self._waiting.pop(request_id, None)

    async def close(self) -> None:
        self._receiving.cancel()
        with suppress(asyncio.CancelledError):
            await self._receiving
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _receive(self) -> None:
        """Hand out replies until the connection ends. A late reply, which nobody waits for any more, is dropped."""
        problem: OSError = ConnectionResetError("connection closed by the signer")
        try:
            while True:
                size = frame_size(await self._reader.readexactly(4))
                reply = decode_reply(await self._reader.readexactly(size))
                if reply.id == 0:
                    self._hand_to_all(reply)
                elif (future := self._waiting.get(reply.id)) is not None and not future.done():
                    future.set_result(reply)
        except asyncio.IncompleteReadError:
            pass
        except WireError as error:  # whoever that is, another try would not be better
            problem = ConnectionAbortedError(str(error))
        except OSError as error:
            problem = ConnectionResetError(str(error))
        finally:
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(problem)

    def _hand_to_all(self, reply: Reply) -> None:
        """The signer turns this connection away: that answers everything asked on it."""
        for future in self._waiting.values():
            if not future.done():
                future.set_result(reply)
