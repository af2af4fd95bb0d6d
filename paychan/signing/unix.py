"""The server's client of the signer's Unix socket: one connection, many requests in flight, each with a deadline.

A connection is made when it is needed, and made again when it broke: the signer may restart at any time. What comes
back is checked before anybody uses it, because the first settlement stored is the one that will be published.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError
from coincurve import PublicKey

from paychan.protocol.address import key_script
from paychan.protocol.errors import PaychanError
from paychan.protocol.scripts import check_public_key
from paychan.protocol.settlement import (
    Claim,
    Reserve,
    Settlement,
    build_settlement,
    sign_child,
    sign_settlement,
    spends_by_server_branch,
)
from paychan.protocol.signerwire import (
    AgainRequest,
    ChildReply,
    ChildRequest,
    FundingReply,
    FundingRequest,
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
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

_PASSING = (
    "policy-deadline",
    "policy-heartbeat",
    "policy-rate",
    "protocol-busy",
    "protocol-keys",
    "protocol-ledger",
)
"""Refusals that say nothing against the request: the same one may be sent again, the last after the signer's restart."""

_WRONG_REPLY = "protocol-reply"

_KEY_BYTES = 33

_T = TypeVar("_T", HealthReply, KeyReply, ReserveReply, SettlementReply, ChildReply, FundingReply)


class UnixSigner:
    """A `paychan.signing.base.Signer` behind a socket at `path`; every call ends within `deadline_seconds`."""

    def __init__(self, path: Path, deadline_seconds: float) -> None:
        self._path = path
        self._deadline = deadline_seconds
        self._ids = itertools.count(1)  # 0 is the signer's, for what belongs to no request
        self._connecting = asyncio.Lock()
        self._connection: _Connection | None = None
        self._closed = False

    async def health(self) -> HealthReply:
        """Ask who the signer is."""
        return await self._ask(Health(next(self._ids)), HealthReply)

    async def public_key(self, client_key: bytes, expiry: UnixTime) -> KeyReply:
        """Ask for the server key of a channel, and the destination of its settlement."""
        reply = await self._ask(KeyRequest(next(self._ids), client_key, expiry), KeyReply)
        _check_key(reply.server_key, "server_key")
        return reply

    async def reserve_key(self) -> bytes:
        """Ask for the public key of the coins that may help to pay for settlements."""
        reply = await self._ask(ReserveRequest(next(self._ids)), ReserveReply)
        _check_key(reply.public_key, "reserve_key")
        return reply.public_key

    async def sign_settlement(
        self, claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, reserve: Reserve | None = None
    ) -> Settlement:
        """Ask for a signed settlement; the one returned is what claims, destination, fee and reserve mean."""
        request = SettlementRequest(next(self._ids), tuple(claims), destination_script, fee_sat, reserve)
        reply = await self._ask(request, SettlementReply)
        _check_rebuilt(reply.settlement, lambda: _rebuild(reply.settlement, request))
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
        _check_rebuilt(reply.child, lambda: _rebuild_child(reply.child, request))
        return reply.child

    async def show_funding(self, transaction: bytes, outputs: Sequence[int]) -> None:
        """Show what these outputs of a transaction hold."""
        await self._ask(FundingRequest(next(self._ids), transaction, tuple(outputs)), FundingReply)

    async def sign_again(self, outpoint: OutPoint) -> Settlement:
        """Ask for the newest settlement that was signed for this outpoint.

        The one returned spends it by the server's branch; what else it does is known only to who asked for it.
        """
        settlement = (await self._ask(AgainRequest(next(self._ids), outpoint), SettlementReply)).settlement
        try:
            ours = spends_by_server_branch(settlement.transaction, outpoint)
            same = bytes(CTransaction.deserialize(settlement.transaction).GetTxid()) == settlement.txid
        except (SerializationError, ValueError, IndexError) as error:
            raise SignerRefused(_WRONG_REPLY, f"not a transaction: {error}") from None
        if not ours or not same:
            raise SignerRefused(_WRONG_REPLY, "no settlement of this outpoint")
        return settlement

    async def close(self) -> None:
        """Let go of the connection; calls in flight and later ones end with `SignerAbsent`."""
        self._closed = True
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
            raise SignerRefused(_WRONG_REPLY, f"asked for {kind.__name__}, got {type(reply).__name__}")
        return reply

    async def _reply(self, request: Request) -> Reply | str:
        """Return the reply, or the reason why there is none."""
        frame = encode_frame(request)
        try:
            frame_size(frame[:4])  # too many claims: said here, where it costs the other calls nothing
            async with asyncio.timeout(self._deadline):
                return await self._exchange(frame, request.id)
        except WireError as error:
            return Refusal(request.id, "protocol-message", str(error))
        except TimeoutError:
            return f"no answer within {self._deadline} s"
        except OSError as error:
            return error.strerror or str(error)

    async def _exchange(self, frame: bytes, request_id: int) -> Reply:
        """Send and wait. A connection may have been closed since it was last used; a new one gets one more try."""
        if self._connection is not None and not self._connection.lost:
            with suppress(ConnectionError):
                return await self._connection.ask(frame, request_id)
        async with self._connecting:
            if self._closed:
                msg = "client was closed"
                raise ConnectionAbortedError(msg)
            if self._connection is None or self._connection.lost:
                self._connection = _Connection(*await asyncio.open_unix_connection(str(self._path)))
        return await self._connection.ask(frame, request_id)


class _Connection:
    """One connection and those who wait for its replies. `ConnectionError` means: it broke, nothing is known."""

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
        reason = "connection closed by the signer"
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
        except (OSError, WireError) as error:
            reason = str(error)
        finally:
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ConnectionResetError(reason))

    def _hand_to_all(self, reply: Reply) -> None:
        """The signer turns this connection away: that answers everything asked on it."""
        for future in self._waiting.values():
            if not future.done():
                future.set_result(reply)


def _check_key(key: bytes, name: str) -> None:
    try:
        check_public_key(key, name)
    except PaychanError as error:
        raise SignerRefused(_WRONG_REPLY, str(error)) from None


def _check_rebuilt(came: Settlement, rebuild: Callable[[], Settlement]) -> None:
    try:
        rebuilt = rebuild()
    except (SerializationError, ValueError, IndexError) as error:
        raise SignerRefused(_WRONG_REPLY, f"not a transaction of these claims: {error}") from None
    if rebuilt != came:
        raise SignerRefused(_WRONG_REPLY, "another transaction than the one asked for")


def _rebuild(settlement: Settlement, request: SettlementRequest) -> Settlement:
    """Make the settlement again, with the server's signatures taken out of the one that came back.

    Raises:
        SerializationError, IndexError: no transaction, or none with these inputs.
        ValueError: a signature is not the server's over this transaction.
    """
    claims, reserve = request.claims, request.reserve
    scripts = [bytes(txin.scriptSig) for txin in CTransaction.deserialize(settlement.transaction).vin]

    def server_signature(index: int, digest: bytes) -> bytes:
        if reserve is not None and index >= len(claims):
            return _verified(scripts[index], 0, reserve.public_key, digest)
        claim = claims[index]
        return _verified(scripts[index], 1 + len(claim.payment.signature_with_flag), claim.terms.server_key, digest)

    return sign_settlement(claims, request.destination_script, request.fee_sat, server_signature, reserve)


def _rebuild_child(child: Settlement, request: ChildRequest) -> Settlement:
    """Make the child again; of its parent it shows the txid alone, and of the destination the key. Raises likewise."""
    parent = request.parent
    unsigned = build_settlement(parent.claims, parent.destination_script, parent.fee_sat, parent.reserve)
    txin = CTransaction.deserialize(child.transaction).vin[0]
    script, spent = bytes(txin.scriptSig), Settlement(unsigned.serialize(), bytes(txin.prevout.hash), parent.fee_sat)
    public_key = script[-_KEY_BYTES:]
    if key_script(public_key) != parent.destination_script:
        msg = "its key is not the destination's"
        raise ValueError(msg)
    return sign_child(spent, public_key, request.fee_sat, lambda _, digest: _verified(script, 0, public_key, digest))


def _verified(script: bytes, start: int, public_key: bytes, digest: bytes) -> bytes:
    """Take the signature that is pushed at `start` of a scriptSig, without its hash flag, once it verifies."""
    signature = script[start + 1 : start + script[start]]
    # libsecp256k1 takes strict DER with low S only; what can't be parsed is a ValueError
    if not PublicKey(public_key).verify(signature, digest, hasher=None):
        msg = f"no signature of {public_key.hex()}"
        raise ValueError(msg)
    return signature
