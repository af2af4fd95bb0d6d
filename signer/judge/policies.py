"""Policies of the signer: one rule per tag, each a pure function that returns its objection or None.

Rules are tried in the order of `POLICIES`, and each may rely on those before it. They judge by facts that were shown,
signed and settled before (`Facts`), never by anything that the server claims about itself. Three tags have no rule
here: policy-sighash needs none, policy-peer concerns a connection and policy-deadline concerns time (`connections`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from msgspec import structs

from paychan.protocol.certificate import MOST_SECONDS
from paychan.protocol.errors import PaychanError
from paychan.protocol.keys import check_public_key
from paychan.protocol.settlement import CHILD_BYTES, LEAST_FEE_CAP_SAT, received_sat
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import CertificateRequest, ChildRequest, Refusal, SettlementRequest
from signer.judge.facts import Facts
from signer.judge.validation import available_sat, claims_problem, coins_problem, fee_problem, unshown
from signer.keys.ring import SigningKey
from signer.ledger.entries import DAY_SECONDS, HOUR_SECONDS, Signed, request_size

LEAST_CHILD_SAT = Sat(546)
"""Bitcoin Core relays no P2PKH output below this value (policy/policy.cpp, GetDustThreshold)."""

LAST_RESORT_SECONDS = 6 * HOUR_SECONDS
"""From this time before a channel's expiry its fee is bound by `max_fee_sat_per_vb` alone, no longer by the share."""


BEGIN_SECONDS = HOUR_SECONDS
"""A certificate begins at the present time, give or take this: clocks differ, and none may begin before a break-in."""


class Objection(NamedTuple):
    """The reason, and for an objection to the fee a fee that would pass: the least, or for policy-fee the most."""

    reason: str
    need_sat: Sat = Sat(0)


Rule: TypeAlias = Callable[[Facts], Objection | None]


def template(known: Facts) -> Objection | None:
    """policy-template: only the settlement template, the signer's own keys, and scripts of the funding outputs."""
    problem = claims_problem(known) or coins_problem(known) or fee_problem(known.request)
    return Objection(problem) if problem else None


def destination(known: Facts) -> Objection | None:
    """policy-destination: the server's output pays to the configured or derived destination, or to the reserve."""
    request = known.request
    script = request.destination_script
    if request.reserve is not None and known.own.reserve is None:
        return Objection(f"reserve key {request.reserve.public_key.hex()} is no key of this signer")
    own = known.own.destinations if known.own.reserve is None else (known.own.reserve,)
    place = next((each for each in own if each.script == script), None)
    if place is None:
        return Objection(f"destination script of {len(script)} bytes beginning {script[:25].hex()} is not allowed")
    if place.retired and any(claim.outpoint not in known.earlier for claim in request.claims):
        return Objection(f"destination script {script.hex()} is retired: no new settlement may pay to it")
    return None


def client_signature(known: Facts) -> Objection | None:
    """policy-client-signature: each client has signed for exactly this change value and address."""
    for index, claim in enumerate(known.request.claims):
        problem = claim.problem()
        if problem is not None:
            return Objection(f"claim {index}: {problem}")
    return None


def funding(known: Facts) -> Objection | None:
    """protocol-funding: all spent outputs were shown before. Not a policy: the server can show them and retry."""
    missing = [] if known.limits.debug else unshown(known)
    return (
        Objection(f"the transaction of {missing[0]} was not shown, nor {len(missing) - 1} others") if missing else None
    )


def fee(known: Facts) -> Objection | None:
    """policy-fee: the coins have the claimed values, and the fee is within the operator's share, cap and rate.

    A legacy signature does not cover the input values (BIP143 added that for segwit only): a value that a server
    understates is lost as fee. So the values are those of the transactions that were shown.
    """
    request = known.request
    if not known.limits.debug:
        coins = request.reserve.coins if request.reserve else ()
        claimed = [(claim.outpoint, claim.funding_sat) for claim in request.claims]
        for outpoint, value_sat in claimed + [(coin.outpoint, coin.value_sat) for coin in coins]:
            holds_sat = known.outputs[outpoint].value_sat
            if holds_sat != value_sat:
                return Objection(f"{outpoint} is claimed to hold {value_sat} sat, and holds {holds_sat} sat")
    most_sat = fee_cap_sat(known)
    if request.fee_sat > most_sat:
        return Objection(f"fee of {request.fee_sat} sat, want up to {most_sat} sat", most_sat)
    return None


def watermark(known: Facts) -> Objection | None:
    """policy-watermark: no client gets more than by the newest payment that was signed for or shown."""
    for index, claim in enumerate(known.request.claims):
        shown = known.newest.get(claim.outpoint)
        if shown is not None and claim.payment.change_sat > shown.payment.change_sat:
            return Objection(
                f"claim {index}: change of {claim.payment.change_sat} sat, more than the {shown.payment.change_sat} sat "
                "of the newest payment that was shown"
            )
        before = known.earlier.get(claim.outpoint)
        if before is not None and claim.payment.change_sat > before.change_sat:
            return Objection(
                f"claim {index}: change of {claim.payment.change_sat} sat, more than the {before.change_sat} sat "
                "signed before"
            )
    return None


def replacement(known: Facts) -> Objection | None:
    """policy-replacement: sign the same request again, or a replacement with a higher fee rate.

    The replacement may pay the client no more (policy-watermark), but at any script that the client signed for: a
    client that closed to another address for no fee has signed for both, and either one costs the server the same. Only
    the server can know which of them came last. The server's own output is checked by policy-destination.

    A request may leave out some input of the earlier settlement if that settlement can't confirm any more, because the
    input is spent or gone. Then it pays no less than its channels' share of the earlier fee, by value or by size,
    whichever is less. Every channel can pay the share by value, because the whole fee was within the whole value. The
    share by size is within the cap of the rate, which a channel that brought nearly all of the value would otherwise
    have to exceed.
    """
    if not known.earlier:
        return None
    request, size = known.request, known.size
    if known.built_upon and any(before.digest != known.digest for before in known.earlier.values()):
        outpoint = known.built_upon[0]
        return Objection(
            f"payments of the channel {outpoint} depend on the settlement signed before: use a child to pay more"
        )
    replaced, broken_up = _replaced(known)
    share_sat = max((_share_of_sat(known, old) for old in broken_up), default=Sat(0))
    if request.fee_sat < share_sat:
        reason = f"fee of {request.fee_sat} sat is less than these channels' share of the fee of their joint settlement"
        return Objection(f"{reason}, need {share_sat} sat", share_sat)
    if all(before.pays_less_than(request.fee_sat, size) for before in replaced):
        return None
    need = _least_fee(request, replaced, share_sat)
    reason = f"fee of {request.fee_sat} sat for {size} bytes is no higher rate than was signed before, need "
    return Objection(reason + (f"{need} sat" if need else "more than the channels received"), need)


def rate(known: Facts) -> Objection | None:
    """policy-rate: at most the value per hour and per day that the operator set. A settlement signed again counts once.

    An attacker on the server can invent channels whose funding is on no chain, and settle them to use up the limit. So
    a channel counts against the full limit only if its funding was shown `policy.aged_minutes` ago; all younger
    channels share a separate limit of half the size.
    """
    aged_sat, young_sat = known.new_values_sat
    return _rate(aged_sat, known, 1, young=False) or _rate(young_sat, known, 2, young=True)


def _rate(new_sat: Sat, known: Facts, share: int, *, young: bool) -> Objection | None:
    if not new_sat:
        return None
    limits = known.limits
    for name, seconds, most_sat in (
        ("hour", HOUR_SECONDS, limits.value_per_hour_sat),
        ("day", DAY_SECONDS, limits.value_per_day_sat),
    ):
        if not most_sat:
            continue
        before_sat = known.flow.within(seconds, known.now, young=young)
        if before_sat + new_sat > most_sat // share:
            of = " of recently shown channels" if young else ""
            return Objection(
                f"{new_sat} sat{of} after {before_sat} sat in the last {name}, want up to {most_sat // share} sat"
            )
    return None


def heartbeat(known: Facts) -> Objection | None:
    """policy-heartbeat: without a fresh heartbeat of the operator, only a small sum."""
    if known.attended:
        return None
    new_sat, most_sat = sum(known.new_values_sat), known.limits.value_without_heartbeat_sat
    unattended_sat = known.flow.unattended_sat
    if not new_sat or unattended_sat + new_sat <= most_sat:
        return None
    hours = known.limits.heartbeat_seconds // 3600
    return Objection(
        f"{new_sat} sat after {unattended_sat} sat without a heartbeat for {hours} h, want up to {most_sat} sat: "
        "`paychan-signer heartbeat`"
    )


POLICIES: tuple[tuple[str, Rule], ...] = (
    ("policy-template", template),
    ("policy-destination", destination),
    ("policy-client-signature", client_signature),
    ("protocol-funding", funding),
    ("policy-fee", fee),
    ("policy-watermark", watermark),
    ("policy-replacement", replacement),
    ("policy-rate", rate),
    ("policy-heartbeat", heartbeat),
)


OTHER_POLICIES: tuple[tuple[str, str], ...] = (
    (
        "policy-certificate",
        "the identity key signs certificates of receipt keys alone: from now on, up to 100 days long",
    ),
    ("policy-sighash", "SIGHASH_ALL only: `settlement.Unsigned`, which makes all digests, supports no other type"),
    ("policy-peer", "the peer's uid, as the kernel reports it, is allowed; an invalid request ends the connection"),
    ("policy-deadline", "a request must arrive, and be answered, within the time limit; it delays no other request"),
)
"""Checks that other modules make: tag and rule."""


def refusals(known: Facts) -> tuple[Refusal | None, list[Refusal]]:
    """Return the first objection, or None if it may be signed; and the objections of policies on trial."""
    tried: list[Refusal] = []
    for tag, rule in POLICIES:
        objection = rule(known)
        if objection is None:
            continue
        refusal = Refusal(known.request.id, tag, objection.reason, objection.need_sat)
        if tag not in known.limits.trial:
            return refusal, tried
        tried.append(refusal)
    return None, tried


def child_refusal(request: ChildRequest, known: Facts, *, was_signed: bool) -> Refusal | None:
    """Judge a child by the same tags; None: sign it. Its parent was signed before, so it passed the rules then.

    The parent need not be the newest: a node that does not replace it keeps the earlier one, and only one can confirm.
    """
    parent = known.request
    if not parent.claims or not was_signed:
        return Refusal(request.id, "policy-template", "the parent is no settlement that was signed before")
    if output_key(known) is None:
        reason = "the parent pays to an address whose key the operator holds, not this signer"
        return Refusal(request.id, "policy-destination", reason)
    spent = available_sat(parent) - parent.fee_sat
    cap = min(fee_cap_sat(known, CHILD_BYTES), received_sat(parent.claims))  # the reserve's coins don't become fee here
    most = min(spent - LEAST_CHILD_SAT, cap - parent.fee_sat)
    if not 0 <= request.fee_sat <= most:
        reason = f"fee of {request.fee_sat} sat for a child, want 0 to {most} sat of the {spent} sat it spends"
        return Refusal(request.id, "policy-fee", reason, Sat(max(most, 0)))
    return None


def certificate_refusal(request: CertificateRequest, identity: bytes, now: UnixTime) -> Refusal | None:
    """Judge the certificate of a receipt key; None: sign it.

    A server that was taken over can have a key certified that it keeps: the times bound how long that key is good for,
    and no certificate is dated back to before the break-in, or ahead to after its end.
    """

    def refusal(reason: str) -> Refusal:
        return Refusal(request.id, "policy-certificate", reason)

    try:
        check_public_key(request.receipt_key, "receipt_key")
    except PaychanError as error:
        return refusal(str(error))
    if request.receipt_key == identity:
        return refusal("the receipt key is the identity key itself")
    begin, seconds = request.not_before, request.not_after - request.not_before
    if begin < 0 or abs(begin - now) > BEGIN_SECONDS:
        return refusal(f"it would begin at {begin}, want within {BEGIN_SECONDS} s of {now}")
    if not 0 < seconds <= MOST_SECONDS:
        return refusal(f"it would last {seconds} s, want 1 to {MOST_SECONDS} s")
    return None


def output_key(known: Facts) -> SigningKey | None:
    """Find the signer's key of the server's output; None: only the operator has it."""
    own = known.own.destinations if known.own.reserve is None else (known.own.reserve,)
    return next((each.key for each in own if each.script == known.request.destination_script), None)


def fee_cap_sat(known: Facts, child_bytes: int = 0) -> Sat:
    """Most that a settlement with a child of this size may pay, in satoshi: the least of share, sum and rate.

    The cap of the rate stops an attacker on the server, who could otherwise burn half of every channel. Near the expiry
    of all its channels, by the signer's clock, the share no longer applies: an unconfirmed settlement is refunded to
    the client whole, and the cap of the rate bounds the loss.
    """
    request, limits, size = known.request, known.limits, known.size
    is_last_resort = all(known.now >= claim.terms.expiry.unix_time - LAST_RESORT_SECONDS for claim in request.claims)
    share_sat = received_sat(request.claims) * (100 if is_last_resort else limits.max_fee_percent) // 100
    rate_sat = (size + child_bytes) * limits.max_fee_sat_per_vb
    return Sat(max(min(share_sat, limits.max_fee_sat, rate_sat), size + LEAST_FEE_CAP_SAT))


def _replaced(known: Facts) -> tuple[list[Signed], list[SettlementRequest]]:
    """Return settlements that this one must outbid, and earlier requests that spend more inputs than this one."""
    spent = _spent(known.request)
    replaced, broken_up = list[Signed](), dict[bytes, SettlementRequest]()
    for before in known.earlier.values():
        old = known.requests.get(before.digest)
        if old is not None and not _spent(old) <= spent:
            broken_up[before.digest] = old
        elif before.digest != known.digest:
            replaced.append(before)
    return replaced, list(broken_up.values())


def _spent(request: SettlementRequest) -> set[OutPoint]:
    coins = request.reserve.coins if request.reserve else ()
    return {claim.outpoint for claim in request.claims} | {coin.outpoint for coin in coins}


def _share_of_sat(known: Facts, old: SettlementRequest) -> Sat:
    """Return the share of a request's channels in the fee of an earlier one, by value or by size: the smaller one."""
    outpoints = {claim.outpoint for claim in known.request.claims}
    brought_sat = received_sat([claim for claim in old.claims if claim.outpoint in outpoints])
    by_value_sat = old.fee_sat * brought_sat // max(available_sat(old), 1)
    return Sat(min(by_value_sat, old.fee_sat * known.size // request_size(old)))


def _least_fee(request: SettlementRequest, replaced: Sequence[Signed], least_sat: Sat) -> Sat:
    """Find the least fee that passes, up to all that was received; 0 if none does."""
    size = request_size(structs.replace(request, fee_sat=Sat(0)))
    outbid_sat = max(before.least_fee_above(size) for before in replaced)
    for fee_sat in (Sat(max(outbid_sat, least_sat)), received_sat(request.claims)):
        other = structs.replace(request, fee_sat=fee_sat)
        if fee_problem(other) is None and all(b.pays_less_than(fee_sat, request_size(other)) for b in replaced):
            return fee_sat
    return Sat(0)
