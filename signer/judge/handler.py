"""From a decoded request to a reply; a refusal is a reply, not an exception.

The order is: look up the signer's own keys, judge the request, record the decision on disk, sign. Judging is one step
without an await, from the reading of the ledger to the put: of two requests for an outpoint the second sees the first.
Deriving keys lets other requests run after every few, and so do the disk and a token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from paychan.protocol.certificate import certificate_digest
from paychan.protocol.errors import PaychanError
from paychan.protocol.expiry import check_expiry
from paychan.protocol.keys import check_public_key
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.settlement import Claim, Settlement, Unsigned, prepare_child, prepare_settlement
from paychan.protocol.types import UnixTime
from paychan.protocol.wire.signer_messages import (
    MAX_CLAIMS,
    AgainReply,
    AgainRequest,
    BehindRequest,
    CertificateReply,
    CertificateRequest,
    ChildReply,
    ChildRequest,
    FundingReply,
    FundingRequest,
    Health,
    KeyReply,
    KeyRequest,
    NewestReply,
    NewestRequest,
    OtherKeysReply,
    OtherKeysRequest,
    Refusal,
    Reply,
    Request,
    ReserveRequest,
    SettlementReply,
    SettlementRequest,
    ShownRequest,
    StatusRequest,
)
from signer.judge.behind import newer_than_signed
from signer.judge.facts import Facts, Limits, OwnKeys, gathered, has_readable_terms
from signer.judge.fundings import FundingProblem, shown_outputs
from signer.judge.journal import Journal
from signer.judge.newest import judge
from signer.judge.policies import certificate_refusal, child_refusal, output_key, refusals
from signer.judge.queries import Identity, Room, Teller
from signer.judge.rate import CERTIFICATES_PER_HOUR, NEWEST_PER_SECOND, Budget, Kind, kind_of
from signer.keys.ring import KeyRing, KeysFailed, SigningKey
from signer.ledger.base import Entry, Ledger, LedgerFailed
from signer.ledger.entries import DamagedEntry, entries_of

KEYS_IN_A_TURN = 8
"""Keys looked up before other requests get a turn: a channel that was never seen before takes up to a millisecond."""


class Handler:
    """Answers requests with the keys of a key ring, on one event loop; all state is in the ledger."""

    def __init__(
        self,
        keys: KeyRing,
        ledger: Ledger,
        identity: Identity,
        limits: Limits | None = None,
        *,
        heartbeat: Callable[[], UnixTime] = lambda: UnixTime(0),
        clock: Callable[[], float] = time.time,
        disk: Room | None = None,
    ) -> None:
        self._keys = keys
        self._ledger = ledger
        self._limits = limits or Limits(debug=identity.debug)
        self._disk = disk
        self._teller = Teller(keys, ledger, identity, self._limits, heartbeat, disk, UnixTime(int(clock())))
        self._heartbeat = heartbeat
        self._clock = clock
        rates = {
            Kind.SETTLING: self._limits.requests_per_second,
            Kind.KEYS: self._limits.keys_per_second,
            Kind.NEWEST: NEWEST_PER_SECOND,
        }
        self._budgets = {kind: Budget(rate, clock()) for kind, rate in rates.items()}
        self._budgets[Kind.CERTIFICATE] = Budget(CERTIFICATES_PER_HOUR, clock(), per_hour=True)
        self._journal = Journal(ledger, clock, lambda: bool(self._teller.shortage))

    async def handle(self, request: Request, peer_uid: int) -> Reply:
        """Answer any decoded request of a peer with this user. Does not raise, whatever the fields hold."""
        now = self._clock()
        try:
            return self._not_now(request, peer_uid, now) or await self._judged(request, peer_uid, UnixTime(int(now)))
        except DamagedEntry as error:
            return self._refuse(request, peer_uid, Refusal(request.id, "policy-watermark", str(error)))
        except KeysFailed as error:
            return Refusal(request.id, "protocol-keys", f"the key store: {error}")
        except LedgerFailed as error:
            return Refusal(request.id, "protocol-ledger", f"the ledger of what was signed: {error}")

    async def _judged(self, request: Request, peer_uid: int, now: UnixTime) -> Reply:
        match request:
            case Health() | StatusRequest() | ReserveRequest() | BehindRequest() | ShownRequest():
                return self._teller.answer(request, now)
            case KeyRequest() | OtherKeysRequest():
                return self._key(request, peer_uid)
            case FundingRequest():
                return await self._funding(request, peer_uid, now)
            case AgainRequest():
                return await self._again(request, peer_uid)
            case NewestRequest():
                return await self._newest(request, peer_uid)
            case SettlementRequest():
                return await self._settlement(request, peer_uid, now)
            case ChildRequest():
                return await self._child(request, peer_uid, now)
            case CertificateRequest():
                return await self._certificate(request, peer_uid, now)

    # --- answers without a signature ---------------------------------------------------------------------------------

    def _key(self, request: KeyRequest | OtherKeysRequest, peer_uid: int) -> Reply:
        reply: Reply
        try:
            client_key, expiry = check_public_key(request.client_key), check_expiry(request.expiry)
            if isinstance(request, OtherKeysRequest):
                reply = OtherKeysReply(request.id, tuple(self._keys.others(client_key, expiry)))
            else:
                key = self._keys.new(client_key, expiry).public_key
                make_terms(key, client_key, expiry)
                reply = KeyReply(request.id, key, next(self._keys.destinations(client_key, expiry)).script)
        except PaychanError as error:
            return self._refuse(request, peer_uid, Refusal(request.id, "policy-template", str(error)))
        self._journal.count(request, peer_uid, "given")
        return reply

    async def _funding(self, request: FundingRequest, peer_uid: int, now: UnixTime) -> Reply:
        if self._limits.debug:  # there are none, and no settlement will need them
            return FundingReply(request.id)
        try:
            outputs = shown_outputs(request.transaction, request.outputs, now)
        except FundingProblem as error:
            return self._refuse(request, peer_uid, Refusal(request.id, "policy-template", str(error)))
        outputs = {each: outputs[each] for each in outputs.keys() - self._ledger.outputs(outputs).keys()}
        if self._ledger.shown + len(outputs) > self._limits.max_fundings:
            reason = f"{self._ledger.shown} outputs were shown, want up to {self._limits.max_fundings}"
            return self._refuse(request, peer_uid, Refusal(request.id, "policy-rate", reason))
        lines = self._journal.lines(self._journal.decision(request, peer_uid, "given"), is_new=bool(outputs))
        await self._ledger.put(Entry(lines, outputs=outputs))
        return FundingReply(request.id)

    async def _newest(self, request: NewestRequest, peer_uid: int) -> Reply:
        claims, ledger = request.claims, self._ledger
        keys = await self._own_keys(claims)
        outpoints = [claim.outpoint for claim in claims]
        judged = judge(
            claims,
            keys,
            ledger.outputs(outpoints),
            ledger.read(outpoints),
            ledger.newest(outpoints),
            debug=self._limits.debug,
        )
        lines = self._journal.lines(self._journal.decision(request, peer_uid, "given"), is_new=bool(judged.kept))
        await ledger.put(Entry(lines, newest=judged.kept))
        return NewestReply(request.id, judged.unshown, judged.refused)

    # --- signatures -------------------------------------------------------------------------------------------------

    async def _settlement(self, request: SettlementRequest, peer_uid: int, now: UnixTime) -> Reply:
        own = await self._own(request)
        known = self._known(request, own, now)
        refused, tried = refusals(known)
        if refused is not None:
            return self._refuse(request, peer_uid, refused)
        await self._ledger.put(self._signing(known, peer_uid, tried))
        return SettlementReply(request.id, await self._signed(request, own, known.digest, is_first=not known.earlier))

    def _signing(self, known: Facts, peer_uid: int, tried: Sequence[Refusal]) -> Entry:
        """Build the entry that must be on disk before a settlement is signed."""
        request, digest = known.request, known.digest
        signed = entries_of(request, digest, known.size)
        decisions = [self._journal.decision(request, peer_uid, "would-refuse", each) for each in tried]
        decisions.append(self._journal.decision(request, peer_uid, "signed", digest=digest))
        if signed == known.earlier or any(each.tag in _LOWERING for each in tried):
            # the recorded limits are as strict already, or stricter
            return Entry(self._journal.lines(*decisions, is_new=bool(tried)))
        flow = known.flow.plus(*known.new_values_sat, known.now, attended=known.attended)
        return Entry(self._journal.lines(*decisions), signed, request, digest, flow=flow)

    async def _again(self, request: AgainRequest, peer_uid: int) -> Reply:
        outpoint = request.outpoint
        before = self._ledger.read([outpoint]).get(outpoint)
        shown = newer_than_signed(outpoint, before, self._ledger)
        if shown is not None:
            return AgainReply(request.id, shown)
        newest = None if before is None else self._ledger.request(before.digest)
        if before is None or newest is None:
            refusal = Refusal(request.id, "policy-template", f"nothing was signed for {outpoint}")
            return self._refuse(request, peer_uid, refusal)
        own, digest = await self._own(newest), before.digest
        claim = next(claim for claim in newest.claims if claim.outpoint == outpoint)
        lines = self._journal.lines(self._journal.decision(request, peer_uid, "signed", digest=digest), is_new=False)
        await self._ledger.put(Entry(lines))
        return AgainReply(request.id, claim, replace(newest, id=0), await self._signed(newest, own, digest))

    async def _child(self, request: ChildRequest, peer_uid: int, now: UnixTime) -> Reply:
        parent = request.parent
        own = await self._own(parent)
        known = self._known(parent, own, now)
        digest = known.digest
        refused = child_refusal(request, known, was_signed=self._ledger.request(digest) is not None)
        key = output_key(known)
        if refused is not None or key is None:
            return self._refuse(request, peer_uid, refused or Refusal(request.id, "policy-destination", "no key"))
        lines = self._journal.lines(self._journal.decision(request, peer_uid, "signed", digest=digest))
        await self._ledger.put(Entry(lines))
        child = prepare_child(await self._signed(parent, own, digest), key.public_key, request.fee_sat)
        return ChildReply(request.id, await _sign(child, [key]))

    async def _certificate(self, request: CertificateRequest, peer_uid: int, now: UnixTime) -> Reply:
        identity = self._keys.identity()
        refused = certificate_refusal(request, identity, now)
        if refused is not None:
            return self._refuse(request, peer_uid, refused)
        times = request.not_before, request.not_after
        digest = certificate_digest(request.receipt_key, *times)
        await self._ledger.put(
            Entry(self._journal.lines(self._journal.decision(request, peer_uid, "signed", digest=digest)))
        )
        return CertificateReply(request.id, identity, await self._keys.certify(request.receipt_key, *times))

    async def _signed(
        self, request: SettlementRequest, own: OwnKeys, digest: bytes, *, is_first: bool = False
    ) -> Settlement:
        """Sign; return an earlier settlement unchanged, because a token's signatures differ each time.

        `is_first`: nothing was signed for these claims before, so there is no earlier one to look up.
        """
        kept = None if is_first else self._ledger.settlement(digest)
        if kept is not None:
            return kept
        claims, reserve = request.claims, request.reserve
        unsigned = prepare_settlement(claims, request.destination_script, request.fee_sat, reserve)
        keys = [*own.claims, *[own.reserve.key if own.reserve else None for _ in (reserve.coins if reserve else ())]]
        settlement = await _sign(unsigned, keys)
        self._ledger.keep(digest, settlement)
        return settlement

    async def _own(self, request: SettlementRequest) -> OwnKeys:
        """Look up the signer's own keys that a request names."""
        if len(request.claims) > MAX_CLAIMS:
            return OwnKeys((None,) * len(request.claims), ())  # policy-template will refuse it
        claims = await self._own_keys(request.claims)
        places = []
        for number, terms in enumerate(
            dict.fromkeys(claim.terms for claim in request.claims if has_readable_terms(claim))
        ):
            if number % KEYS_IN_A_TURN == KEYS_IN_A_TURN - 1:
                await asyncio.sleep(0)
            for place in self._keys.destinations(terms.client_key, terms.expiry.unix_time):
                places.append(place)
                if place.script == request.destination_script:
                    break  # the later ones would have to be derived
        reserve = self._keys.find_reserve(request.reserve.public_key) if request.reserve else None
        return OwnKeys(claims, tuple(places), reserve)

    async def _own_keys(self, claims: Sequence[Claim]) -> tuple[SigningKey | None, ...]:
        keys = []
        for number, claim in enumerate(claims):
            if number % KEYS_IN_A_TURN == KEYS_IN_A_TURN - 1:
                await asyncio.sleep(0)
            keys.append(self._keys.find(claim.terms) if has_readable_terms(claim) else None)
        return tuple(keys)

    def _known(self, request: SettlementRequest, own: OwnKeys, now: UnixTime) -> Facts:
        heartbeat_at = self._heartbeat() if self._limits.heartbeat_seconds else UnixTime(0)
        return gathered(request, own, self._limits, self._ledger, heartbeat_at, now)

    # --- refusals ---------------------------------------------------------------------------------------------------

    def _not_now(self, request: Request, peer_uid: int, now: float) -> Refusal | None:
        """Refuse requests above the rate limit; on a nearly full disk, also those that settling does not need."""
        kind = kind_of(request)
        if kind is not Kind.FREE and not self._budgets[kind].take(now):
            return self._over_budget(request, peer_uid, kind, now)
        if kind in (Kind.KEYS, Kind.NEWEST, Kind.CERTIFICATE) and (shortage := self._teller.shortage):
            refusal = Refusal(request.id, "protocol-disk", shortage)
            self._journal.count(request, peer_uid, "refused", refusal)
            return refusal
        return None

    def _over_budget(self, request: Request, peer_uid: int, kind: Kind, now: float) -> Refusal:
        """Refuse a request above the rate limit; the log gets one such line per second."""
        budget = self._budgets[kind]
        asked = "requests" if kind is Kind.SETTLING else f"requests of {type(request).__name__}"
        refusal = Refusal(request.id, "policy-rate", f"more than {budget.rate} {asked} per {budget.period}")
        if kind is Kind.SETTLING and budget.may_tell(now):
            return self._refuse(request, peer_uid, refusal)
        self._journal.count(request, peer_uid, "refused", refusal)
        return refusal

    def _refuse(self, request: Request, peer_uid: int, refusal: Refusal) -> Refusal:
        try:
            self._journal.refuse(request, peer_uid, refusal)
        except LedgerFailed as error:
            return Refusal(request.id, "protocol-ledger", f"the ledger of what was signed: {error}")
        return refusal

    def close(self) -> None:
        """Write the decisions that are not written yet; the ledger must still be open. Raises `LedgerFailed`."""
        self._journal.close()


_LOWERING = ("policy-watermark", "policy-replacement")
"""On trial, these must not lower the recorded limits by a settlement that they would refuse."""


async def _sign(unsigned: Unsigned, keys: Sequence[SigningKey | None]) -> Settlement:
    """Have all inputs signed, side by side if there are several. Raises `KeysFailed`."""
    there = [_there(key) for key in keys]
    signing = [key.sign(digest) for key, digest in zip(there, unsigned.digests, strict=True)]
    return unsigned.signed([await signing[0]] if len(signing) == 1 else await asyncio.gather(*signing))


def _there(key: SigningKey | None) -> SigningKey:
    if key is None:
        msg = "a key that was found before is missing now"
        raise KeysFailed(msg)
    return key
