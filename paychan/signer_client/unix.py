"""The server's client of the signer's Unix socket: many requests in flight, each with a deadline.

Requests that clients of unopened channels cause have a connection and a queue of their own: settling never waits for
them.

A connection is opened on demand, and again after a failure: the signer may restart at any time. Once a request has
timed out, new requests fail at once until a health probe succeeds; only requests sent before that wait for their own
deadline.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from paychan.protocol.certificate import Certificate
from paychan.protocol.channel import Adopt
from paychan.protocol.settlement import Claim, Reserve, Settlement
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    AgainReply,
    AgainRequest,
    BehindReply,
    BehindRequest,
    CertificateReply,
    CertificateRequest,
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
    ShownReply,
    ShownRequest,
    WireError,
    encode_frame,
    frame_size,
)
from paychan.signer_client.base import SignerAbsent, SignerBusy, SignerRefused, SignerUnfit
from paychan.signer_client.connection import Misfit, SignerLink, WrongSigner
from paychan.signer_client.reply_checks import (
    WRONG_REPLY,
    check_again,
    check_certificate,
    check_child,
    check_key,
    check_settlement,
)

_PASSING = (
    "policy-deadline",
    "policy-heartbeat",
    "policy-rate",
    "protocol-busy",
    "protocol-disk",
    "protocol-keys",
    "protocol-ledger",
)
"""Refusals that do not depend on the request: the same request may be sent again, for the last tag after the signer's restart."""

_STRANGERS_AT_ONCE = 8
_MOST_STRANGERS = 256
"""Most key requests for new channels in flight, and in all; further ones are refused.

No other request waits for these.
"""

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
    ShownReply,
    CertificateReply,
)


class UnixSigner:
    """A `paychan.signer_client.base.Signer` behind a socket at `path`; each call ends within `deadline_seconds`."""

    def __init__(self, path: Path, deadline_seconds: float, misfit: Misfit | None = None) -> None:
        """`misfit` returns why a signer's settings do not fit; each connection calls it first."""
        self._path = path
        self._deadline = deadline_seconds
        self._ids = itertools.count(1)  # the signer uses 0 for replies that belong to no request
        self._link = SignerLink(path, misfit)
        self._strangers_link = SignerLink(path, misfit)
        self._strangers = 0
        self._room_for_strangers = asyncio.Semaphore(_STRANGERS_AT_ONCE)
        self._probing: asyncio.Task[None] | None = None
        """Set while the signer hangs: the task that probes it."""
        self._closed = False

    async def health(self) -> HealthReply:
        """Ask for the signer's settings and state."""
        return await self._ask(Health(next(self._ids)), HealthReply)

    async def public_key(self, client_key: bytes, expiry: UnixTime, *, settling: bool = False) -> KeyReply:
        """Ask for the server key of a channel, and the destination of its settlement."""
        reply = await self._ask(KeyRequest(next(self._ids), client_key, expiry, settling), KeyReply)
        check_key(reply.server_key, "server_key")
        return reply

    async def other_keys(self, client_key: bytes, expiry: UnixTime, *, settling: bool = False) -> tuple[bytes, ...]:
        """Ask for the server keys of a channel from earlier seeds, the newest first."""
        reply = await self._ask(OtherKeysRequest(next(self._ids), client_key, expiry, settling), OtherKeysReply)
        for key in reply.server_keys:
            check_key(key, "server_keys")
        return reply.server_keys

    async def reserve_key(self) -> bytes:
        """Ask for the public key of the reserve, whose coins may help to pay for settlements."""
        reply = await self._ask(ReserveRequest(next(self._ids)), ReserveReply)
        check_key(reply.public_key, "reserve_key")
        return reply.public_key

    async def certify(self, receipt_key: bytes, not_before: UnixTime, not_after: UnixTime) -> Certificate:
        """Ask the identity key to certify a key for receipts; the returned certificate is valid."""
        request = CertificateRequest(next(self._ids), receipt_key, not_before, not_after)
        return check_certificate(await self._ask(request, CertificateReply), request)

    async def sign_settlement(
        self, claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, reserve: Reserve | None = None
    ) -> Settlement:
        """Ask for a signed settlement; the returned one is determined by claims, destination, fee and reserve."""
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

        The returned child is that, except for the txid that it spends: the caller knows the settlement's txid.
        """
        parent = SettlementRequest(0, tuple(claims), destination_script, fee_sat, reserve)
        request = ChildRequest(next(self._ids), parent, child_fee_sat)
        reply = await self._ask(request, ChildReply)
        check_child(reply.child, request)
        return reply.child

    async def show_funding(self, transaction: bytes, outputs: Sequence[int]) -> None:
        """Show the signer what these outputs of a transaction hold."""
        await self._ask(FundingRequest(next(self._ids), transaction, tuple(outputs)), FundingReply)

    async def show_newest(self, claims: Sequence[Claim]) -> NewestReply:
        """Show the signer the newest payments of channels."""
        return await self._ask(NewestRequest(next(self._ids), tuple(claims)), NewestReply)

    async def behind(self, payments: Sequence[Newest]) -> tuple[OutPoint, ...]:
        """Return those of these channels whose settlement was signed, or whose newer payment the signer has seen."""
        return (await self._ask(BehindRequest(next(self._ids), tuple(payments)), BehindReply)).outpoints

    async def shown(
        self, expires_after: UnixTime, after: OutPoint | None
    ) -> tuple[tuple[OutPoint, ...], OutPoint | None]:
        """Return a page of the channels that were shown and expire later than this, and where the next page begins."""
        reply = await self._ask(ShownRequest(next(self._ids), expires_after, after), ShownReply)
        return reply.outpoints, reply.after

    async def sign_again(self, outpoint: OutPoint) -> Adopt:
        """Ask for the newest claim of this outpoint, and for the newest settlement that was signed for it.

        The returned settlement follows from its request, and the request holds that claim. The caller that adopts the
        claim checks the client's signature in it.
        """
        reply = await self._ask(AgainRequest(next(self._ids), outpoint), AgainReply)
        check_again(reply, outpoint)
        return Adopt(reply.claim, reply.settlement)

    async def close(self) -> None:
        """Close the connections; pending and later calls raise `SignerAbsent`."""
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
        """Return the reply, or the reason for its absence."""
        hangs = f"no answer within {self._deadline} s"
        if self._probing is not None and not isinstance(request, Health):
            return f"{hangs} lately, and none since"
        of_strangers = isinstance(request, KeyRequest | OtherKeysRequest) and not request.settling
        frame = encode_frame(request)
        try:
            frame_size(frame[:4])  # too many claims: refused here, where other calls lose nothing by it
            async with asyncio.timeout(self._deadline):
                if of_strangers:
                    return await self._exchange_for_stranger(frame, request.id)
                return await self._link.exchange(frame, request.id)
        except WireError as error:
            return Refusal(request.id, "protocol-message", str(error))
        except TimeoutError:
            # a token may be slow at making keys: a time-out of a key request for a new channel proves nothing about
            # other requests
            if self._probing is None and not self._closed and not of_strangers:
                self._probing = asyncio.create_task(self._probe())
            return hangs
        except WrongSigner as error:
            raise SignerUnfit(str(error)) from None
        except OSError as error:
            return error.strerror or str(error)

    async def _exchange_for_stranger(self, frame: bytes, request_id: int) -> Reply:
        """Send a key request for a new channel: on a separate connection, a few at a time. Raises `SignerBusy`."""
        if self._strangers >= _MOST_STRANGERS:
            raise SignerBusy(self._strangers, _MOST_STRANGERS)
        self._strangers += 1
        try:
            async with self._room_for_strangers:
                return await self._strangers_link.exchange(frame, request_id)
        finally:
            self._strangers -= 1

    async def _probe(self) -> None:
        """Ask a signer that hangs for its health until it answers or its socket has no listener."""
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
