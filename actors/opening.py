"""Opening a channel: which key goes into it, which output funds it, and whether that is acceptable."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from msgspec import Struct

from actors.exposure import Reservation
from actors.registry import Registry
from actors.world import World
from paychan.chain.base import ChainFailed, Funding
from paychan.protocol.channel import Accepted, Adopt, Opening, Outcome, Rejected, State
from paychan.protocol.errors import (
    ChainUnavailable,
    FundingNotFound,
    KeyReuse,
    OutpointUsed,
    PaychanError,
    SignerUnavailable,
    SigningFailed,
    TooMuchUnconfirmed,
    WrongServerKey,
)
from paychan.protocol.opening import open_channel
from paychan.protocol.payment import Payment, PaymentVerifier, change_problem
from paychan.protocol.scripts import ChannelTerms, make_terms
from paychan.protocol.signerwire import Newest
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.signing.base import SignerAbsent, SignerRefused, news, show

_KEYS_KEPT = 10_000
"""Server keys remembered, so that funding info and opening ask the signer once; about 200 bytes each."""


_NOT_WHOLE = "channels are still being looked at after a start, so unconfirmed funding must wait"


class OpenRequest(Struct, frozen=True):
    """A client's wish. v1 names no outpoint: the one whose signature verifies is meant."""

    client_key: bytes
    expiry: UnixTime
    change_script: bytes
    payment: Payment
    price_sat: Sat
    outpoint: OutPoint | None = None
    server_key: bytes | None = None
    """The key in the client's redeem script (v2): it must be ours."""
    secret: bytes = b""


class Opener:
    """Judges requests for new channels."""

    def __init__(self, world: World, registry: Registry) -> None:
        self._world = world
        self._registry = registry
        self._keys: OrderedDict[tuple[bytes, UnixTime], bytes] = OrderedDict()

    async def terms(self, client_key: bytes, expiry: UnixTime) -> ChannelTerms:
        """Combine a client's key and expiry with the server key that the signer chose for them.

        Raises:
            SignerUnavailable, SigningFailed: no key to be had now.
            ExpiryNotATime, KeyReuse: see `make_terms`.
        """
        key = self._keys.get((client_key, expiry))
        if key is None:
            try:
                key = (await self._world.signer.public_key(client_key, expiry)).server_key
            except SignerAbsent as error:
                raise SignerUnavailable(reason=str(error)) from error
            except SignerRefused as error:
                if error.tag == "policy-template":  # key and expiry were checked, so the two keys are one
                    raise KeyReuse(server_key=client_key.hex()) from error
                raise SigningFailed(reason=str(error)) from error
            self._keys[client_key, expiry] = key
            if len(self._keys) > _KEYS_KEPT:
                self._keys.popitem(last=False)
        terms = make_terms(key, client_key, expiry)
        self._world.chain.expect(terms)
        return terms

    async def funding(self, terms: ChannelTerms, at: OutPoint | None = None) -> tuple[Funding, ...]:
        """List the unspent outputs that pay to the script of these terms, or the one `at`. Raises `ChainUnavailable`."""
        try:
            return await self._world.chain.funding(terms, at)
        except ChainFailed as error:
            raise ChainUnavailable(reason=str(error)) from error

    async def open(self, request: OpenRequest) -> Outcome:
        """Judge, store and answer; a refusal stores nothing."""
        try:
            terms = await self.terms(request.client_key, request.expiry)
            if request.server_key not in (None, terms.server_key):
                raise WrongServerKey(got=(request.server_key or b"").hex(), need=terms.server_key.hex())
            funding = await self._funding(terms, request)
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
        outcome = open_channel(opening, self._world.view())
        if isinstance(outcome, Rejected):
            return outcome
        in_the_way = await self._registry.in_the_way(funding.outpoint)  # told to the one who signed, not to all
        if in_the_way is not None:
            return Rejected(in_the_way)
        try:
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
        """Return what the signer knows of a channel that the store does not: the store is from a backup.

        The record begins where the signer's knowledge ends. One that was settled takes no payments; its record is made
        only to carry that settlement out.
        """
        try:
            return await news(self._world.signer, [Newest(outpoint, payment.change_sat)])
        except SignerAbsent as error:
            raise SignerUnavailable(reason=str(error)) from error
        except SignerRefused as error:
            raise SigningFailed(reason=str(error)) from error

    async def _show(self, funding: Funding) -> None:
        """Show the signer the funding transaction while the chain has it: it signs no settlement of what it never saw.

        Raises:
            SignerUnavailable, SigningFailed, ChainFailed: then no channel is opened that could not be settled.
        """
        try:
            await show(self._world.signer, [funding.outpoint], self._world.chain.transaction)
        except SignerAbsent as error:
            raise SignerUnavailable(reason=str(error)) from error
        except SignerRefused as error:
            raise SigningFailed(reason=str(error)) from error

    async def _create(self, opened: Accepted, funding: Funding) -> Outcome:
        """Store the channel; what is funded without a confirmation counts against a limit while it is so."""
        if funding.usable_confirmations:
            return await self._store(opened, funding)
        if not self._world.chain_view.is_whole:
            return Rejected(ChainUnavailable(reason=_NOT_WHOLE))
        reserved = self._world.exposure.reserve(funding.outpoint, funding.value_sat)
        if isinstance(reserved, TooMuchUnconfirmed):
            return Rejected(reserved)
        # a task of its own: whatever ends the request, the reservation lives until it is known whether the channel does
        return await asyncio.shield(asyncio.create_task(self._store_reserved(opened, funding, reserved)))

    async def _store_reserved(self, opened: Accepted, funding: Funding, reserved: Reservation) -> Outcome:
        try:
            outcome = await self._store(opened, funding)
        except BaseException:
            reserved.opened()  # it may be stored or not: the chain watch finds out
            raise
        if isinstance(outcome, Accepted):
            reserved.opened()
        else:
            reserved.release()
        return outcome

    async def _store(self, opened: Accepted, funding: Funding) -> Outcome:
        """Have the chain follow what funds the channel, show it to the signer, and store the channel."""
        try:
            await self._world.chain.adopt(opened.channel.terms, [funding.outpoint])
            await self._show(funding)
        except ChainFailed as error:
            return Rejected(ChainUnavailable(reason=str(error)))
        except PaychanError as error:
            return Rejected(error)
        return await self._registry.create(opened)

    async def _funding(self, terms: ChannelTerms, request: OpenRequest) -> Funding:
        """Find the output that the client means, among the unspent ones that pay to the script of these terms.

        Raises:
            FundingNotFound, ChainUnavailable, or what is wrong with the payment for the only candidate.
        """
        address = terms.funding_address(self._world.network)
        found = await self.funding(terms, request.outpoint)
        if request.outpoint is None:
            if not found:
                raise FundingNotFound(address=address, detail="")
            return _signed_one(terms, request, found, self._world.rules.dust_sat)
        if found:
            return found[0]
        _check_signature(terms, request.outpoint, request, self._world.rules.dust_sat)
        raise await self._registry.in_the_way(request.outpoint) or FundingNotFound(
            address=address, detail=f" at {request.outpoint}"
        )


def _signed_one(terms: ChannelTerms, request: OpenRequest, found: tuple[Funding, ...], dust_sat: Sat) -> Funding:
    """Of several outputs on one address, the signature names one (PROTOCOL §7.2)."""
    for funding in found[:-1]:
        try:
            _check_signature(terms, funding.outpoint, request, dust_sat)
        except PaychanError:
            continue
        return funding
    _check_signature(terms, found[-1].outpoint, request, dust_sat)
    return found[-1]


def _check_signature(terms: ChannelTerms, outpoint: OutPoint, request: OpenRequest, dust_sat: Sat) -> None:
    """Raise what is wrong with the opening payment, taken as one out of this outpoint."""
    problem = change_problem(request.payment, dust_sat)
    if problem is None:
        problem = PaymentVerifier(terms, outpoint, request.change_script).problem(request.payment)
    if problem is not None:
        raise problem
