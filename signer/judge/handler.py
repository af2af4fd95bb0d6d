"""From a decoded request to a reply; a refusal is a reply, not an exception.

The order is: judge the request, record the decision on disk, sign. `Handler.begin` does the first and starts the
second; it returns a reply, or an `Approved` that waits for the disk. `Handler.take` runs the steps from there to the
reply. The caller decides where to wait for the disk and for signatures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, TypeAlias

from msgspec.structs import replace

from paychan.protocol.errors import PaychanError
from paychan.protocol.expiry import check_expiry
from paychan.protocol.keys import check_public_key
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.settlement import Claim, Settlement, prepare_child, prepare_settlement
from paychan.protocol.types import UnixTime
from paychan.protocol.wire.signer_messages import (
    MAX_CLAIMS,
    AgainReply,
    AgainRequest,
    BehindRequest,
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
from signer.judge.behind import built_upon, newer_than_signed
from signer.judge.facts import Facts, Limits, OwnKeys
from signer.judge.fundings import FundingProblem, shown_outputs
from signer.judge.journal import Journal
from signer.judge.newest import judge
from signer.judge.policies import child_refusal, new_values_sat, output_key, refusals
from signer.judge.queries import Identity, Room, Teller
from signer.judge.rate import NEWEST_PER_SECOND, Budget, Kind, kind_of
from signer.judge.validation import has_readable_terms
from signer.keys.ring import KeyRing, KeysFailed, SigningKey
from signer.ledger.base import Entry, Ledger, LedgerFailed
from signer.ledger.entries import DamagedEntry, entries_of, request_digest


class Wanted(NamedTuple):
    """Signatures that are needed next; `then` takes them in the order of the digests and returns the next step."""

    digests: Sequence[tuple[SigningKey, bytes]]
    then: Callable[[Sequence[bytes]], Step]


Step: TypeAlias = Reply | Wanted
"""A step on the way to a reply: the reply itself, or the signatures that the next step needs."""


class Approved(NamedTuple):
    """A request that may be signed as soon as `durable` is done."""

    durable: Future[None]
    prepare: Callable[[], Step]

    def first(self) -> Step:
        """Run the first step after `durable` is done. Raises `LedgerFailed`: the decision was not written."""
        self.durable.result()
        return self.prepare()


class Handler:
    """Answers requests with the keys of a key ring. Called from several threads; all state is in the ledger."""

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
        self._journal = Journal(ledger, clock, lambda: bool(self._teller.shortage))

    @property
    def blocking(self) -> bool:
        """Whether the key store can take long."""
        return self._keys.blocking

    def __call__(self, request: Request, peer_uid: int = 0) -> Reply:
        """Answer, and block until the decision is on disk."""
        answer = self.begin(request, peer_uid)
        return self.finish(request, answer) if isinstance(answer, Approved) else answer

    def finish(self, request: Request, approved: Approved) -> Reply:
        """Sign an approved request after its decision is on disk; block until the key store has signed."""

        def following(step: Wanted) -> Step:
            return step.then([key.sign(digest) for key, digest in step.digests])

        step = self.take(request, approved.first)
        while isinstance(step, Wanted):
            step = self.take(request, partial(following, step))
        return step

    def take(self, request: Request, step: Callable[[], Step]) -> Step:
        """Run a step towards the reply; if the step fails, return a refusal."""
        try:
            return step()
        except KeysFailed as error:
            return Refusal(request.id, "protocol-keys", f"the key store: {error}")
        except LedgerFailed as error:
            return Refusal(request.id, "protocol-ledger", f"the ledger of what was signed: {error}")

    def begin(self, request: Request, peer_uid: int) -> Reply | Approved:
        """Judge any decoded request, and start to record the decision. Does not raise, whatever the fields hold."""
        try:
            return self._begin(request, peer_uid)
        except DamagedEntry as error:
            refusal = Refusal(request.id, "policy-watermark", str(error))
        except KeysFailed as error:
            return Refusal(request.id, "protocol-keys", f"the key store: {error}")
        except LedgerFailed as error:
            return Refusal(request.id, "protocol-ledger", f"the ledger of what was signed: {error}")
        return self._refuse(request, peer_uid, refusal)

    def _begin(self, request: Request, peer_uid: int) -> Reply | Approved:
        now = self._clock()
        return self._not_now(request, peer_uid, now) or self._judged(request, peer_uid, UnixTime(int(now)))

    def _judged(self, request: Request, peer_uid: int, now: UnixTime) -> Reply | Approved:
        match request:
            case Health() | StatusRequest() | ReserveRequest() | BehindRequest() | ShownRequest():
                return self._teller.answer(request, now)
            case KeyRequest() | OtherKeysRequest():
                return self._key(request, peer_uid)
            case FundingRequest():
                return self._funding(request, peer_uid, now)
            case AgainRequest():
                return self._again(request, peer_uid)
            case NewestRequest():
                return self._newest(request, peer_uid)
            case SettlementRequest():
                return self._settlement(request, peer_uid, now)
            case ChildRequest():
                return self._child(request, peer_uid, now)

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

    def _funding(self, request: FundingRequest, peer_uid: int, now: UnixTime) -> Reply | Approved:
        if self._limits.debug:  # there are none, and no settlement will need them
            return FundingReply(request.id)
        try:
            outputs = shown_outputs(request.transaction, request.outputs, now)
        except FundingProblem as error:
            return self._refuse(request, peer_uid, Refusal(request.id, "policy-template", str(error)))
        with self._ledger.lock:
            outputs = {each: outputs[each] for each in outputs.keys() - self._ledger.outputs(outputs).keys()}
            if self._ledger.shown + len(outputs) > self._limits.max_fundings:
                reason = f"{self._ledger.shown} outputs were shown, want up to {self._limits.max_fundings}"
                return self._refuse(request, peer_uid, Refusal(request.id, "policy-rate", reason))
            lines = self._journal.lines(self._journal.decision(request, peer_uid, "given"), is_new=bool(outputs))
            durable = self._ledger.put(Entry(lines, outputs=outputs))
        return Approved(durable, lambda: FundingReply(request.id))

    def _newest(self, request: NewestRequest, peer_uid: int) -> Reply | Approved:
        claims = request.claims
        keys = self._own_keys(claims)
        outpoints = [claim.outpoint for claim in claims]
        with self._ledger.lock:
            ledger = self._ledger
            judged = judge(
                claims,
                keys,
                ledger.outputs(outpoints),
                ledger.read(outpoints),
                ledger.newest(outpoints),
                debug=self._limits.debug,
            )
            lines = self._journal.lines(self._journal.decision(request, peer_uid, "given"), is_new=bool(judged.kept))
            durable = ledger.put(Entry(lines, newest=judged.kept))
        return Approved(durable, lambda: NewestReply(request.id, judged.unshown, judged.refused))

    # --- signatures -------------------------------------------------------------------------------------------------

    def _settlement(self, request: SettlementRequest, peer_uid: int, now: UnixTime) -> Reply | Approved:
        own = self._own(request)
        with self._ledger.lock:
            known = self._known(request, own, now)
            refused, tried = refusals(request, known)
            if refused is not None:
                return self._refuse(request, peer_uid, refused)
            digest = request_digest(request)
            signed = entries_of(request, digest)
            decisions = [self._journal.decision(request, peer_uid, "would-refuse", each) for each in tried]
            decisions.append(self._journal.decision(request, peer_uid, "signed", digest=digest))
            if signed == known.earlier or any(each.tag in _LOWERING for each in tried):
                lines = self._journal.lines(*decisions, is_new=bool(tried))
                durable = self._ledger.put(Entry(lines))  # the recorded limits are as strict already, or stricter
            else:
                aged_sat, young_sat = new_values_sat(request, known)
                flow = known.flow.plus(aged_sat, young_sat, now, attended=known.attended)
                durable = self._ledger.put(Entry(self._journal.lines(*decisions), signed, request, digest, flow=flow))
        return Approved(durable, lambda: self._signed(request, own, digest, partial(SettlementReply, request.id)))

    def _again(self, request: AgainRequest, peer_uid: int) -> Reply | Approved:
        outpoint = request.outpoint
        before = self._ledger.read([outpoint]).get(outpoint)
        shown = newer_than_signed(outpoint, before, self._ledger)
        if shown is not None:
            return AgainReply(request.id, shown)
        newest = None if before is None else self._ledger.request(before.digest)
        if before is None or newest is None:
            refusal = Refusal(request.id, "policy-template", f"nothing was signed for {outpoint}")
            return self._refuse(request, peer_uid, refusal)
        own, digest, named = self._own(newest), before.digest, replace(newest, id=0)
        claim = next(claim for claim in newest.claims if claim.outpoint == outpoint)
        lines = self._journal.lines(self._journal.decision(request, peer_uid, "signed", digest=digest), is_new=False)
        durable = self._ledger.put(Entry(lines))
        return Approved(
            durable, lambda: self._signed(newest, own, digest, partial(AgainReply, request.id, claim, named))
        )

    def _child(self, request: ChildRequest, peer_uid: int, now: UnixTime) -> Reply | Approved:
        parent = request.parent
        own = self._own(parent)
        with self._ledger.lock:
            known = self._known(parent, own, now)
        digest = request_digest(parent)
        refused = child_refusal(request, known, was_signed=self._ledger.request(digest) is not None)
        key = output_key(parent, known)
        if refused is not None or key is None:
            return self._refuse(request, peer_uid, refused or Refusal(request.id, "policy-destination", "no key"))
        durable = self._ledger.put(
            Entry(self._journal.lines(self._journal.decision(request, peer_uid, "signed", digest=digest)))
        )

        def sign_child(settlement: Settlement) -> Step:
            child = prepare_child(settlement, key.public_key, request.fee_sat)
            digests = [(key, each) for each in child.digests]
            return Wanted(digests, lambda signatures: ChildReply(request.id, child.signed(signatures)))

        return Approved(durable, lambda: self._signed(parent, own, digest, sign_child))

    def _own(self, request: SettlementRequest) -> OwnKeys:
        """Look up the signer's own keys that a request names, before taking the ledger's lock."""
        if len(request.claims) > MAX_CLAIMS:
            return OwnKeys((None,) * len(request.claims), ())  # policy-template will refuse it
        claims = self._own_keys(request.claims)
        places = []
        for terms in dict.fromkeys(claim.terms for claim in request.claims if has_readable_terms(claim)):
            for place in self._keys.destinations(terms.client_key, terms.expiry.unix_time):
                places.append(place)
                if place.script == request.destination_script:
                    break  # the later ones would have to be derived
        reserve = self._keys.find_reserve(request.reserve.public_key) if request.reserve else None
        return OwnKeys(claims, tuple(places), reserve)

    def _own_keys(self, claims: Sequence[Claim]) -> tuple[SigningKey | None, ...]:
        return tuple(self._keys.find(claim.terms) if has_readable_terms(claim) else None for claim in claims)

    def _known(self, request: SettlementRequest, own: OwnKeys, now: UnixTime) -> Facts:
        outpoints = [claim.outpoint for claim in request.claims]
        coins = [coin.outpoint for coin in request.reserve.coins] if request.reserve else []
        ledger = self._ledger
        earlier = ledger.read(outpoints)
        digests = {before.digest for before in earlier.values()}
        return Facts(
            own=own,
            limits=self._limits,
            outputs=ledger.outputs([*outpoints, *coins]),
            earlier=earlier,
            flow=ledger.flow,
            heartbeat_at=self._heartbeat() if self._limits.heartbeat_seconds else UnixTime(0),
            now=now,
            newest=ledger.newest(outpoints),
            requests={digest: old for digest in digests if (old := ledger.request(digest)) is not None},
            built_upon=built_upon(request, earlier, ledger),
        )

    def _signed(
        self, request: SettlementRequest, own: OwnKeys, digest: bytes, then: Callable[[Settlement], Step]
    ) -> Step:
        """Have it signed; return an earlier settlement unchanged, because a token's signatures differ each time."""
        kept = self._ledger.settlement(digest)
        if kept is not None:
            return then(kept)
        claims, reserve = request.claims, request.reserve
        unsigned = prepare_settlement(claims, request.destination_script, request.fee_sat, reserve)
        keys = [*own.claims, *[own.reserve.key if own.reserve else None for _ in (reserve.coins if reserve else ())]]

        def go_on(signatures: Sequence[bytes]) -> Step:
            settlement = unsigned.signed(signatures)
            self._ledger.keep(digest, settlement)
            return then(settlement)

        return Wanted([(_there(key), each) for key, each in zip(keys, unsigned.digests, strict=True)], go_on)

    # --- refusals ---------------------------------------------------------------------------------------------------

    def _not_now(self, request: Request, peer_uid: int, now: float) -> Refusal | None:
        """Refuse requests above the rate limit; on a nearly full disk, also those that settling does not need."""
        kind = kind_of(request)
        if kind is not Kind.FREE and not self._budgets[kind].take(now):
            return self._over_budget(request, peer_uid, kind, now)
        if kind in (Kind.KEYS, Kind.NEWEST) and (shortage := self._teller.shortage):
            refusal = Refusal(request.id, "protocol-disk", shortage)
            self._journal.count(request, peer_uid, "refused", refusal)
            return refusal
        return None

    def _over_budget(self, request: Request, peer_uid: int, kind: Kind, now: float) -> Refusal:
        """Refuse a request above the rate limit; the log gets one such line per second."""
        budget = self._budgets[kind]
        asked = "requests" if kind is Kind.SETTLING else f"requests of {type(request).__name__}"
        refusal = Refusal(request.id, "policy-rate", f"more than {budget.rate} {asked} per second")
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


def _there(key: SigningKey | None) -> SigningKey:
    if key is None:
        msg = "a key that was found before is missing now"
        raise KeysFailed(msg)
    return key
