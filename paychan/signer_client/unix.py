"""The server's client of the signer's Unix socket: many requests in flight, each with a deadline.

What strangers cause has a connection and a queue of its own: nothing that is due waits for it.

A connection is made when it is needed, and made again when it broke: the signer may restart at any time. One that hangs is
waited for by those alone who asked before that showed; who asks then hears at once that it is absent, until it has answered
a question of our own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from paychan.protocol.channel import Adopt
from paychan.protocol.settlement import Claim, Reserve, Settlement
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
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
    OtherKeysReply,
    OtherKeysRequest,
    Refusal,
    Reply,
    Request,
    ReserveReply,
    ReserveRequest,
    SettlementReply,
    SettlementRequest,
    WireError,
    encode_frame,
    frame_size,
)
from paychan.signer_client.base import SignerAbsent, SignerBusy, SignerRefused, SignerUnfit
from paychan.signer_client.connection import Misfit, NotOurs, SignerLink
from paychan.signer_client.reply_checks import WRONG_REPLY, check_again, check_child, check_key, check_settlement

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

_STRANGERS_AT_ONCE = 8
_MOST_STRANGERS = 256
"""Questions that strangers cause, sent at a time, and in all; more are refused at once. Nothing else waits for these."""

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
    OtherKeysReply,
)


class UnixSigner:
    """A `paychan.signer_client.base.Signer` behind a socket at `path`; every call ends within `deadline_seconds`."""

    def __init__(self, path: Path, deadline_seconds: float, misfit: Misfit | None = None) -> None:
        """`misfit` says what is wrong with a signer, by what it says of itself; each connection asks it first."""
        self._path = path
        self._deadline = deadline_seconds
        self._ids = itertools.count(1)  # 0 is the signer's, for what belongs to no request
        self._link = SignerLink(path, misfit)
        self._strangers_link = SignerLink(path, misfit)
        self._strangers = 0
        self._room_for_strangers = asyncio.Semaphore(_STRANGERS_AT_ONCE)
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

    async def other_keys(self, client_key: bytes, expiry: UnixTime, *, settling: bool = False) -> tuple[bytes, ...]:
        """Ask for the server keys that earlier generations have for a channel, the newest first."""
        reply = await self._ask(OtherKeysRequest(next(self._ids), client_key, expiry, settling), OtherKeysReply)
        for key in reply.server_keys:
            check_key(key, "server_keys")
        return reply.server_keys

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
        await self._link.close()
        await self._strangers_link.close()

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
        of_strangers = isinstance(request, KeyRequest | OtherKeysRequest) and not request.settling
        frame = encode_frame(request)
        try:
            frame_size(frame[:4])  # too many claims: said here, where it costs the other calls nothing
            async with asyncio.timeout(self._deadline):
                if of_strangers:
                    return await self._exchange_for_stranger(frame, request.id)
                return await self._link.exchange(frame, request.id)
        except WireError as error:
            return Refusal(request.id, "protocol-message", str(error))
        except TimeoutError:
            # a token may be slow to make keys: that strangers' questions wait says nothing about others
            if self._probing is None and not self._closed and not of_strangers:
                self._probing = asyncio.create_task(self._probe())
            return hangs
        except NotOurs as error:
            raise SignerUnfit(str(error)) from None
        except OSError as error:
            return error.strerror or str(error)

    async def _exchange_for_stranger(self, frame: bytes, request_id: int) -> Reply:
        """Send what a stranger causes: on a connection of its own, few at a time. Raises `SignerBusy`."""
        if self._strangers >= _MOST_STRANGERS:
            raise SignerBusy(self._strangers, _MOST_STRANGERS)
        self._strangers += 1
        try:
            async with self._room_for_strangers:
                return await self._strangers_link.exchange(frame, request_id)
        finally:
            self._strangers -= 1

    async def _probe(self) -> None:
        """Ask a signer that hangs for its health until there is an answer, or nobody there who could hang."""
        try:
            while True:
                request = Health(next(self._ids))
                try:
                    async with asyncio.timeout(self._deadline):
                        await self._link.exchange(encode_frame(request), request.id)
                except TimeoutError:
                    continue
                except OSError:
                    return
                return
        finally:
            self._probing = None
