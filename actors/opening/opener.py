"""Opening a channel: gives out addresses, finds the funding output of a request, judges it and stores the channel."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec import Struct, structs

from actors.context import Context
from actors.exposure import Reservation
from actors.opening.readiness import Readiness
from actors.opening.server_keys import ServerKeys
from actors.registry import Registry
from paychan.chain.base import ChainFailed, Funding
from paychan.protocol.channel import Accepted, Adopt, Opening, Outcome, Rejected, State
from paychan.protocol.errors import (
    BadSignature,
    ChainUnavailable,
    ExpiryTooLate,
    ExpiryTooSoon,
    FundingNotFound,
    FundingTooLarge,
    FundingUnconfirmed,
    OutpointUsed,
    PaychanError,
    PaymentShort,
    SignerUnavailable,
    SigningFailed,
    TooMuchUnconfirmed,
    WrongServerKey,
)
from paychan.protocol.kinds.base import ChannelTerms, make_terms
from paychan.protocol.opening import open_channel
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.settlement import base_size
from paychan.protocol.terms import expiry_problem, lead_seconds
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import MAX_FUNDING_BYTES, Newest
from paychan.signer_client.base import SignerAbsent, SignerRefused, news, show

_NOT_WHOLE = "the server is still checking its channels after a start, so unconfirmed funding must wait"

_CHANGEABLE = (ExpiryTooSoon, ExpiryTooLate, FundingUnconfirmed, PaymentShort)
"""Refusals that depend on the terms: earlier terms may accept the opening."""


class OpenRequest(Struct, frozen=True):
    """A client's request for a channel. v1 names no outpoint: the request means the one whose signature verifies."""

    client_key: bytes
    expiry: UnixTime
    change_script: bytes
    payment: Payment
    price_sat: Sat
    outpoint: OutPoint | None = None
    server_key: bytes | None = None
    """The server key in the client's redeem script (v2): it must be the signer's, of any generation."""
    secret: bytes = b""


class Opener:
    """Judges requests for new channels."""

    def __init__(self, context: Context, registry: Registry) -> None:
        self._context = context
        self._registry = registry
        self._ready = Readiness(context)
        self._keys = ServerKeys(context)

    async def offer(self, client_key: bytes, expiry: UnixTime, *, any_time: bool = False) -> ChannelTerms:
        """Give out an address, but only if `open` would accept its channel: a payer that funds it must get a channel.

        `any_time` is debug mode, where funding needs no time and expiries are not checked (RBPCP §6.1).

        Raises:
            ChainUnavailable, SignerUnavailable, StorageFull: no channel can be opened now.
            ExpiryTooSoon, ExpiryTooLate: also if it will be too soon by the time at which funding can be deep enough.
            The errors of `terms`.
        """
        await self._ready.check()
        view = self._context.view()
        problem = None if any_time else expiry_problem(expiry, view, lead_seconds(view.rules))
        if problem is not None:
            raise problem
        return await self.terms(client_key, expiry)

    async def terms(self, client_key: bytes, expiry: UnixTime) -> ChannelTerms:
        """Combine a client's key and expiry with the server key for them; see `ServerKeys.terms`."""
        return await self._keys.terms(client_key, expiry)

    async def funding(self, terms: ChannelTerms, at: OutPoint | None = None) -> tuple[Funding, ...]:
        """List the unspent outputs that pay to these terms' script, or the one `at`. Raises `ChainUnavailable`."""
        try:
            return await self._context.chain.funding(terms, at)
        except ChainFailed as error:
            raise ChainUnavailable(reason=str(error)) from error

    async def open(self, request: OpenRequest) -> Outcome:
        """Judge, store and answer; a refusal stores nothing."""
        try:
            self._ready.check_disk()
            terms, funding = await self._find(request)
        except PaychanError as error:
            return Rejected(error)
        opening = Opening(
            terms=terms,
            outpoint=funding.outpoint,
            funding_sat=funding.value_sat,
            confirmations=funding.usable_confirmations,
            change_script=request.change_script,
            payment=request.payment,
            price_sat=request.price_sat,
            secret=request.secret,
        )
        outcome = self._judge(opening)
        if isinstance(outcome, Rejected):
            return await self._explained(outcome, terms)
        in_the_way = await self._registry.in_the_way(funding.outpoint)  # only a caller with a valid signature learns it
        if in_the_way is not None:
            return Rejected(in_the_way)
        no_room = self._no_room(funding)
        if no_room is not None:
            return Rejected(no_room)
        try:
            await self._check_key(terms, paid=True)  # the output is on the chain, and the payment is valid
            known = await self._known_before(funding.outpoint, request.payment)
        except PaychanError as error:
            return Rejected(error)
        created = await self._create(outcome, funding)
        if not known or isinstance(created, Rejected):
            return created
        adopted = await self._registry.ask(funding.outpoint, known[0])
        is_open = isinstance(adopted, Accepted) and adopted.channel.state is State.OPEN
        return adopted if is_open else Rejected(OutpointUsed(outpoint=str(funding.outpoint)))

    async def _known_before(self, outpoint: OutPoint, payment: Payment) -> list[Adopt]:
        """Return the signer's claim of a channel that the store lacks, if there is one: the store is from a backup.

        The new record starts with the signer's claim. If the signer has settled the channel, it accepts no payments;
        its record is made only to carry that settlement out.
        """
        try:
            return await news(self._context.signer, [Newest(outpoint, payment.change_sat)])
        except SignerAbsent as error:
            raise SignerUnavailable(reason=str(error)) from error
        except SignerRefused as error:
            raise SigningFailed(reason=str(error)) from error

    def _judge(self, opening: Opening) -> Outcome:
        """Judge by the present terms, or by earlier ones that are still valid; the present ones give the refusal."""
        view = self._context.view()
        outcome = open_channel(opening, view)
        if isinstance(outcome, Accepted) or not isinstance(outcome.error, _CHANGEABLE):
            return outcome
        for terms in self._context.terms.earlier(view.now):
            other = structs.replace(opening, price_sat=terms.price_sat(v2=bool(opening.secret)))
            judged = open_channel(other, structs.replace(view, rules=terms.rules(view.rules)))
            if isinstance(judged, Accepted):
                return judged
        return outcome

    async def _explained(self, refused: Rejected, terms: ChannelTerms) -> Rejected:
        """Return `WrongServerKey` instead of a bad signature, if the script has another server's key."""
        if isinstance(refused.error, BadSignature):
            try:
                await self._check_key(terms, paid=False)
            except WrongServerKey as error:
                return Rejected(error)
            except PaychanError:
                pass
        return refused

    async def _check_key(self, terms: ChannelTerms, *, paid: bool) -> None:
        """Check that the server key is the signer's, of any generation. Raises `WrongServerKey`, and like `terms`."""
        ours = await self._keys.terms(terms.client_key, terms.expiry.unix_time, paid=paid)
        if terms != ours and terms not in await self._keys.other_terms(
            terms.client_key, terms.expiry.unix_time, paid=paid
        ):
            raise WrongServerKey(got=terms.server_key.hex(), need=ours.server_key.hex())

    async def _show(self, funding: Funding) -> None:
        """Show the signer the funding transaction while the chain has it: the signer settles only outputs it has seen.

        Raises:
            SignerUnavailable, SigningFailed, ChainFailed, FundingTooLarge: the channel could not be settled, so it must
            not be opened.
        """
        try:
            await show(self._context.signer, [funding.outpoint], self._transaction)
        except SignerAbsent as error:
            raise SignerUnavailable(reason=str(error)) from error
        except SignerRefused as error:
            raise SigningFailed(reason=str(error)) from error

    async def _transaction(self, txid: bytes) -> bytes:
        """Return a funding transaction. Raises `ChainFailed`, and `FundingTooLarge`: the signer reads no such message."""
        raw = await self._context.chain.transaction(txid)
        if len(raw) > MAX_FUNDING_BYTES and (size := base_size(raw)) > MAX_FUNDING_BYTES:
            raise FundingTooLarge(got_bytes=size, need_bytes=MAX_FUNDING_BYTES)
        return raw

    def _no_room(self, funding: Funding) -> PaychanError | None:
        """Say why no further channel may open with unconfirmed funding; checked before the signer is asked."""
        if funding.usable_confirmations:
            return None
        if not self._context.chain_view.is_whole:
            return ChainUnavailable(reason=_NOT_WHOLE)
        return self._context.exposure.problem(funding.outpoint, funding.value_sat)

    async def _create(self, opened: Accepted, funding: Funding) -> Outcome:
        """Store the channel; unconfirmed funding counts against a limit until it confirms."""
        if funding.usable_confirmations:
            return await self._store(opened, funding)
        reserved = self._context.exposure.reserve(funding.outpoint, funding.value_sat)
        if isinstance(reserved, TooMuchUnconfirmed):
            return Rejected(reserved)
        # a separate task: if the request is cancelled, the reservation must last until the channel is stored or refused
        return await asyncio.shield(asyncio.create_task(self._store_reserved(opened, funding, reserved)))

    async def _store_reserved(self, opened: Accepted, funding: Funding, reserved: Reservation) -> Outcome:
        try:
            outcome = await self._store(opened, funding)
        except BaseException:
            reserved.opened()  # unknown whether it was stored: the chain watch finds out
            raise
        if isinstance(outcome, Accepted):
            reserved.opened()
        else:
            reserved.release()
        return outcome

    async def _store(self, opened: Accepted, funding: Funding) -> Outcome:
        """Have the chain follow the funding output, show its transaction to the signer, and store the channel."""
        try:
            await self._context.chain.adopt(opened.channel.terms, [funding.outpoint])
            await self._show(funding)
        except ChainFailed as error:
            return Rejected(ChainUnavailable(reason=str(error)))
        except PaychanError as error:
            return Rejected(error)
        return await self._registry.create(opened)

    async def _find(self, request: OpenRequest) -> tuple[ChannelTerms, Funding]:
        """Find the script and output of a request: v2 names both, in v1 the output is the one whose signature verifies.

        Raises:
            FundingNotFound, ChainUnavailable, or the refusal of the payment for the last candidate.
        """
        if request.outpoint is not None and request.server_key is not None:
            terms = make_terms(request.server_key, request.client_key, request.expiry)
            found = await self.funding(terms, request.outpoint)
            if found:
                return terms, found[0]
            await self._check_key(terms, paid=False)
            if not terms.kind.signs_value:  # else the signature can't be checked without the output
                unknown = Funding(request.outpoint, Sat(0), 0)
                _check_signature(terms, unknown, request, self._context.rules.dust_sat)
            in_the_way = await self._registry.in_the_way(request.outpoint)
            raise in_the_way or self._not_found(terms, f" at {request.outpoint}")
        terms = await self.terms(request.client_key, request.expiry)
        candidates = [(terms, funding) for funding in await self.funding(terms)]
        problem: PaychanError = self._not_found(terms, "")
        if candidates:
            try:
                return _signed_one(request, candidates, self._context.rules.dust_sat)
            except PaychanError as error:
                problem = error
        others = await self._keys.other_terms(request.client_key, request.expiry)
        listed = await asyncio.gather(*(self.funding(other) for other in others))
        candidates = [(other, funding) for other, found in zip(others, listed, strict=True) for funding in found]
        if not candidates:
            raise problem
        return _signed_one(request, candidates, self._context.rules.dust_sat)

    def _not_found(self, terms: ChannelTerms, detail: str) -> FundingNotFound:
        return FundingNotFound(address=terms.funding_address(self._context.network), detail=detail)


def _signed_one(
    request: OpenRequest, candidates: Sequence[tuple[ChannelTerms, Funding]], dust_sat: Sat
) -> tuple[ChannelTerms, Funding]:
    """Return the output for which the signature verifies (RBPCP §7.2); if none does, raise the refusal of the last."""
    for terms, funding in candidates[:-1]:
        try:
            _check_signature(terms, funding, request, dust_sat)
        except PaychanError:
            continue
        return terms, funding
    terms, funding = candidates[-1]
    _check_signature(terms, funding, request, dust_sat)
    return terms, funding


def _check_signature(terms: ChannelTerms, funding: Funding, request: OpenRequest, dust_sat: Sat) -> None:
    """Raise the refusal of the opening payment, if it is no valid payment from this outpoint."""
    verifier = PaymentVerifier(terms, funding.outpoint, funding.value_sat, request.change_script)
    problem = verifier.problem(request.payment, dust_sat)
    if problem is not None:
        raise problem
