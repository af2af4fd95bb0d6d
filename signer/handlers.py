"""From message to reply: what is asked for comes as a value, and so does every refusal.

A request is judged, then what was decided is remembered, then it is signed. `Handler.begin` does the first and starts
the second; what it returns says whether a reply is there or waits for the disk. `Handler.take` takes the steps from there to
the reply. Who calls them decides where to wait, for the disk and for signatures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, TypeAlias

from paychan.protocol.errors import PaychanError
from paychan.protocol.scripts import check_expiry, check_public_key, make_terms
from paychan.protocol.settlement import Settlement, prepare_child, prepare_settlement
from paychan.protocol.signerwire import (
    MAX_CLAIMS,
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
    StatusReply,
    StatusRequest,
)
from paychan.protocol.types import UnixTime
from signer.audit import Decision, Verdict
from signer.budget import Budget
from signer.fundings import FundingProblem, shown_outputs
from signer.keys import KeyRing, KeysExhausted, KeysFailed, SigningKey
from signer.known import DAY_SECONDS, HOUR_SECONDS, Known, Limits, Own
from signer.ledger import Entry, Ledger, LedgerFailed
from signer.meaning import about
from signer.policy import child_refusal, new_value_sat, output_key, refusals
from signer.shape import has_readable_terms
from signer.signed import DamagedEntry, entries_of, request_digest


class Identity(NamedTuple):
    """What the signer tells of itself."""

    network: str
    key_mode: str
    debug: bool = False
    protections: tuple[str, ...] = ()


class Wanted(NamedTuple):
    """Signatures that are needed before it goes on with `then`, which gets them in the order of the digests."""

    digests: Sequence[tuple[SigningKey, bytes]]
    then: Callable[[Sequence[bytes]], Step]


Step: TypeAlias = Reply | Wanted
"""A reply is made in steps: each gives the reply, or says which signatures the next one needs."""


class Approved(NamedTuple):
    """It may be signed as soon as `durable` is done."""

    durable: Future[None]
    prepare: Callable[[], Step]

    def first(self) -> Step:
        """Take the first step; `durable` is done. Raises `LedgerFailed`: nothing was written."""
        self.durable.result()
        return self.prepare()


class Handler:
    """Answers requests with the keys it was given. Called from several threads; the ledger alone remembers anything."""

    def __init__(
        self,
        keys: KeyRing,
        ledger: Ledger,
        identity: Identity,
        limits: Limits | None = None,
        *,
        heartbeat: Callable[[], UnixTime] = lambda: UnixTime(0),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._ledger = ledger
        self._identity = identity
        self._limits = limits or Limits(debug=identity.debug)
        self._heartbeat = heartbeat
        self._clock = clock
        self._started_at = UnixTime(int(clock()))
        self._budget = Budget(self._limits.requests_per_second, clock())

    @property
    def blocking(self) -> bool:
        """Whether the key store can take long."""
        return self._keys.blocking

    def __call__(self, request: Request, peer_uid: int = 0) -> Reply:
        """Answer, and wait for the disk meanwhile."""
        answer = self.begin(request, peer_uid)
        return self.finish(request, answer) if isinstance(answer, Approved) else answer

    def finish(self, request: Request, approved: Approved) -> Reply:
        """Sign what was approved, once that is on disk, and wait for the key store meanwhile."""

        def following(step: Wanted) -> Step:
            return step.then([key.sign(digest) for key, digest in step.digests])

        step = self.take(request, approved.first)
        while isinstance(step, Wanted):
            step = self.take(request, partial(following, step))
        return step

    def take(self, request: Request, step: Callable[[], Step]) -> Step:
        """Take a step towards the reply, which it is where the step fails."""
        try:
            return step()
        except KeysFailed as error:
            return Refusal(request.id, "protocol-keys", f"the key store: {error}")
        except LedgerFailed as error:
            return Refusal(request.id, "protocol-ledger", f"the ledger of what was signed: {error}")

    def begin(self, request: Request, peer_uid: int) -> Reply | Approved:
        """Judge any message that could be read, and remember the decision. Whatever its fields hold, this does not raise."""
        try:
            return self._begin(request, peer_uid)
        except DamagedEntry as error:
            refusal = Refusal(request.id, "policy-watermark", str(error))
        except KeysExhausted as error:
            refusal = Refusal(request.id, "policy-rate", str(error))
        except KeysFailed as error:
            return Refusal(request.id, "protocol-keys", f"the key store: {error}")
        except LedgerFailed as error:
            return Refusal(request.id, "protocol-ledger", f"the ledger of what was signed: {error}")
        return self._refuse(request, peer_uid, refusal)

    def _begin(self, request: Request, peer_uid: int) -> Reply | Approved:
        now = self._clock()
        if not self._budget.take(now):
            return self._over_budget(request, peer_uid, now)
        match request:
            case Health():
                return HealthReply(request.id, self._identity.network, self._identity.key_mode, self._identity.debug)
            case StatusRequest():
                return self._status(request, UnixTime(int(now)))
            case ReserveRequest():
                return ReserveReply(request.id, self._keys.reserve().public_key)
            case KeyRequest():
                return self._key(request, peer_uid)
            case FundingRequest():
                return self._funding(request, peer_uid)
            case AgainRequest():
                return self._again(request, peer_uid)
            case SettlementRequest():
                return self._settlement(request, peer_uid, UnixTime(int(now)))
            case ChildRequest():
                return self._child(request, peer_uid, UnixTime(int(now)))

    # --- what is told -----------------------------------------------------------------------------------------------

    def _status(self, request: StatusRequest, now: UnixTime) -> Reply:
        head, flow = self._ledger.head, self._ledger.flow
        return StatusReply(
            request.id,
            self._started_at,
            head.count,
            head.hash,
            flow.within(HOUR_SECONDS, now),
            flow.within(DAY_SECONDS, now),
            self._heartbeat(),
            tuple(sorted(self._limits.trial)),
            self._identity.protections,
        )

    def _key(self, request: KeyRequest, peer_uid: int) -> Reply:
        try:
            client_key, expiry = check_public_key(request.client_key), check_expiry(request.expiry)
            key = self._keys.new(client_key, expiry).public_key
            make_terms(key, client_key, expiry)
        except PaychanError as error:
            return self._refuse(request, peer_uid, Refusal(request.id, "policy-template", str(error)))
        destination = next(self._keys.destinations(client_key, expiry))
        self._ledger.put(Entry([self._decision(request, peer_uid, "given")]))
        return KeyReply(request.id, key, destination.script)

    def _funding(self, request: FundingRequest, peer_uid: int) -> Reply | Approved:
        if self._limits.debug:  # there are none, and nobody is going to ask for them
            return FundingReply(request.id)
        try:
            outputs = shown_outputs(request.transaction, request.outputs)
        except FundingProblem as error:
            return self._refuse(request, peer_uid, Refusal(request.id, "policy-template", str(error)))
        with self._ledger.lock:
            outputs = {each: outputs[each] for each in outputs.keys() - self._ledger.outputs(outputs).keys()}
            if self._ledger.shown + len(outputs) > self._limits.max_fundings:
                reason = f"{self._ledger.shown} outputs were shown, want up to {self._limits.max_fundings}"
                return self._refuse(request, peer_uid, Refusal(request.id, "policy-rate", reason))
            durable = self._ledger.put(Entry([self._decision(request, peer_uid, "given")], outputs=outputs))
        return Approved(durable, lambda: FundingReply(request.id))

    # --- what is signed ---------------------------------------------------------------------------------------------

    def _settlement(self, request: SettlementRequest, peer_uid: int, now: UnixTime) -> Reply | Approved:
        own = self._own(request)
        with self._ledger.lock:
            known = self._known(request, own, now)
            refused, tried = refusals(request, known)
            if refused is not None:
                return self._refuse(request, peer_uid, refused)
            digest = request_digest(request)
            signed = entries_of(request, digest)
            decisions = [self._decision(request, peer_uid, "would-refuse", each) for each in tried]
            decisions.append(self._decision(request, peer_uid, "signed", digest=digest))
            if signed == known.earlier or any(each.tag in _LOWERING for each in tried):
                durable = self._ledger.put(Entry(decisions))  # what it remembers is as strict already, or stricter
            else:
                flow = known.flow.plus(new_value_sat(request, known), now, attended=known.attended)
                durable = self._ledger.put(Entry(decisions, signed, request, digest, flow=flow))
        return Approved(durable, lambda: self._signed(request, own, digest, partial(SettlementReply, request.id)))

    def _again(self, request: AgainRequest, peer_uid: int) -> Reply | Approved:
        before = self._ledger.read([request.outpoint]).get(request.outpoint)
        newest = None if before is None else self._ledger.request(before.digest)
        if before is None or newest is None:
            refusal = Refusal(request.id, "policy-template", f"nothing was signed for {request.outpoint}")
            return self._refuse(request, peer_uid, refusal)
        own, digest = self._own(newest), before.digest
        durable = self._ledger.put(Entry([self._decision(request, peer_uid, "signed", digest=digest)]))
        return Approved(durable, lambda: self._signed(newest, own, digest, partial(SettlementReply, request.id)))

    def _child(self, request: ChildRequest, peer_uid: int, now: UnixTime) -> Reply | Approved:
        parent = request.parent
        own = self._own(parent)
        with self._ledger.lock:
            known = self._known(parent, own, now)
        refused = child_refusal(request, known)
        key = output_key(parent, known)
        if refused is not None or key is None:
            return self._refuse(request, peer_uid, refused or Refusal(request.id, "policy-destination", "no key"))
        digest = request_digest(parent)
        durable = self._ledger.put(Entry([self._decision(request, peer_uid, "signed", digest=digest)]))

        def sign_child(settlement: Settlement) -> Step:
            child = prepare_child(settlement, key.public_key, request.fee_sat)
            digests = [(key, each) for each in child.digests]
            return Wanted(digests, lambda signatures: ChildReply(request.id, child.signed(signatures)))

        return Approved(durable, lambda: self._signed(parent, own, digest, sign_child))

    def _own(self, request: SettlementRequest) -> Own:
        """Look up what is ours of the keys that a request names, before anybody else has to wait for us."""
        if len(request.claims) > MAX_CLAIMS:
            return Own((None,) * len(request.claims), ())  # policy-template will say so
        readable = [claim.terms if has_readable_terms(claim) else None for claim in request.claims]
        claims = tuple(None if terms is None else self._keys.find(terms) for terms in readable)
        places = []
        for terms in dict.fromkeys(filter(None, readable)):
            for place in self._keys.destinations(terms.client_key, terms.expiry):
                places.append(place)
                if place.script == request.destination_script:
                    break  # those behind it would have to be derived
        reserve = self._keys.find_reserve(request.reserve.public_key) if request.reserve else None
        return Own(claims, tuple(places), reserve)

    def _known(self, request: SettlementRequest, own: Own, now: UnixTime) -> Known:
        outpoints = [claim.outpoint for claim in request.claims]
        coins = [coin.outpoint for coin in request.reserve.coins] if request.reserve else []
        ledger = self._ledger
        return Known(
            own=own,
            limits=self._limits,
            outputs=ledger.outputs([*outpoints, *coins]),
            earlier=ledger.read(outpoints),
            flow=ledger.flow,
            heartbeat_at=self._heartbeat() if self._limits.heartbeat_seconds else UnixTime(0),
            now=now,
        )

    def _signed(self, request: SettlementRequest, own: Own, digest: bytes, then: Callable[[Settlement], Step]) -> Step:
        """Have it signed; what was signed before is handed out as it was, for a token never signs the same bytes twice."""
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

    # --- what is refused --------------------------------------------------------------------------------------------

    def _over_budget(self, request: Request, peer_uid: int, now: float) -> Refusal:
        """Refuse what comes too fast; the log gets one line a second of it."""
        reason = f"more than {self._limits.requests_per_second} requests per second"
        refusal = Refusal(request.id, "policy-rate", reason)
        return self._refuse(request, peer_uid, refusal) if self._budget.may_tell(now) else refusal

    def _refuse(self, request: Request, peer_uid: int, refusal: Refusal) -> Refusal:
        try:
            self._ledger.put(Entry([self._decision(request, peer_uid, "refused", refusal)]))
        except LedgerFailed as error:
            return Refusal(request.id, "protocol-ledger", f"the ledger of what was signed: {error}")
        return refusal

    def _decision(
        self, request: Request, peer_uid: int, verdict: Verdict, refusal: Refusal | None = None, digest: bytes = b""
    ) -> Decision:
        if not digest and isinstance(request, SettlementRequest):
            digest = request_digest(request)
        return Decision(
            at_ms=int(self._clock() * 1000),
            peer_uid=peer_uid,
            asked=type(request).__name__,
            about=about(request),
            digest=digest.hex(),
            verdict=verdict,
            tag=refusal.tag if refusal else "",
            reason=refusal.reason if refusal else "",
        )


_LOWERING = ("policy-watermark", "policy-replacement")
"""Tried out, they must not lower what is remembered."""


def _there(key: SigningKey | None) -> SigningKey:
    if key is None:
        msg = "a key that was there is not there any more"
        raise KeysFailed(msg)
    return key
