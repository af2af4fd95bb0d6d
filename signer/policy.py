"""What the signer refuses: one rule per tag, each a pure function that returns the reason or None.

Rules are tried in the order of `POLICIES`, and each may rely on those before it. Those judge a request alone;
`replacement` then judges it by what was signed before, and `child_refusal` judges children. The rules that remember
more (policy-watermark, policy-rate) and policy-fee's caps will join them.

Values of inputs are the server's word: a legacy signature says nothing about them (BIP143 gave that to segwit alone). A
server that lies can have the difference burnt, of claims and of the reserve's coins alike, but not paid to anybody.

policy-sighash needs no rule: `settlement.sign_settlement`, which does all signing, knows SIGHASH_ALL only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from msgspec import structs

from paychan.protocol.address import key_script, p2pkh_script
from paychan.protocol.errors import PaychanError
from paychan.protocol.payment import PaymentVerifier, change_problem
from paychan.protocol.scripts import ChannelTerms, check_expiry, check_public_key, make_terms
from paychan.protocol.settlement import Claim, Reserve, received_sat
from paychan.protocol.signerwire import MAX_CLAIMS, ChildRequest, Refusal, SettlementRequest
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat
from signer.keys import Keys
from signer.signed import Entries, Signed, request_digest, request_size

_LEAST_CHANGE = Sat(1)
"""Dust limits are the server's business: a settlement that is not relayed loses nothing, a wrong flag can."""

MAX_COINS = 4
"""Of the reserve in one settlement: more than a fee needs, and few enough to bound its size."""

LEAST_CHILD_SAT = Sat(546)
"""Bitcoin Core relays no P2PKH output of less (policy/policy.cpp, GetDustThreshold)."""

Rule: TypeAlias = Callable[[SettlementRequest, Keys], str | None]

OwnKey: TypeAlias = tuple[bytes, Callable[[bytes], bytes]]
"""A public key of ours, and what signs 32 bytes with it."""


def channel_terms(client_key: bytes, expiry: int, keys: Keys) -> ChannelTerms:
    """Return the only terms on which this signer serves a client key and expiry: those with its own key.

    Raises:
        PaychanError: no compressed point, no time that fits nLockTime, or the client's key is the server's.
    """
    check_public_key(client_key)
    return make_terms(keys.public_key(client_key, check_expiry(expiry)), client_key, expiry)


def template(request: SettlementRequest, keys: Keys) -> str | None:
    """policy-template: own keys, values that exist, and a layout under which the clients' signatures hold."""
    claims = request.claims
    if not 1 <= len(claims) <= MAX_CLAIMS:
        return f"got {len(claims)} claims, want 1 to {MAX_CLAIMS}"
    for index, claim in enumerate(claims):
        problem = _terms_problem(claim, keys) or _output_problem(claim)
        if problem is not None:
            return f"claim {index}: {problem}"
    if any(claim.payment.change_sat for claim in claims[1:]):
        return "only claim 0 may leave change to its client"
    if len({claim.outpoint for claim in claims}) < len(claims):
        return "an outpoint is claimed twice"
    total = sum(claim.funding_sat for claim in claims)
    return f"claims of {total} sat, more than all bitcoins" if total > MAX_MONEY_SAT else None


def destination(request: SettlementRequest, keys: Keys) -> str | None:
    """policy-destination: the server's output goes where the configuration or the seed says, or back to the reserve."""
    script = request.destination_script
    if request.reserve is not None:
        if request.reserve.public_key != keys.reserve_key():
            return f"reserve key is {request.reserve.public_key.hex()}, ours is {keys.reserve_key().hex()}"
        own = {key_script(keys.reserve_key())}
    else:
        own = {keys.destination_script(claim.terms.client_key, claim.terms.expiry) for claim in request.claims}
    if script not in own:
        return f"destination script of {len(script)} bytes beginning {script[:25].hex()} is not ours"
    return None


def client_signature(request: SettlementRequest, keys: Keys) -> str | None:  # noqa: ARG001 - all rules look alike
    """policy-client-signature: each client has signed for exactly this change value and address."""
    for index, claim in enumerate(request.claims):
        problem = change_problem(claim.payment, _LEAST_CHANGE)
        if problem is None:
            problem = PaymentVerifier(claim.terms, claim.outpoint, claim.change_script).problem(claim.payment)
        if problem is not None:
            return f"claim {index}: {problem}"
    return None


def fee(request: SettlementRequest, keys: Keys) -> str | None:  # noqa: ARG001
    """policy-fee: coins that can exist; no more than what was received becomes fee, whoever pays; an output is left."""
    return (_coins_problem(request, request.reserve) if request.reserve else None) or _fee_problem(request)


POLICIES: tuple[tuple[str, Rule], ...] = (
    ("policy-template", template),
    ("policy-destination", destination),
    ("policy-client-signature", client_signature),
    ("policy-fee", fee),
)


def refusal(request: SettlementRequest, keys: Keys) -> Refusal | None:
    """Return the first rule's objection, or None: the settlement may be signed."""
    for tag, rule in POLICIES:
        reason = rule(request, keys)
        if reason is not None:
            return Refusal(request.id, tag, reason)
    return None


def replacement(request: SettlementRequest, earlier: Entries) -> Refusal | None:
    """policy-replacement: what was signed before is signed again, or gives way to a settlement of a higher fee rate.

    The other settlement pays the client at the same script, and no more than before. A request that passes `POLICIES`.
    """
    digest, size = request_digest(request), request_size(request)
    replaced: list[Signed] = []
    for index, claim in enumerate(request.claims):
        before = earlier.get(claim.outpoint)
        if before is None or before.digest == digest:
            continue
        problem = _change_problem(claim, before)
        if problem is not None:
            return Refusal(request.id, "policy-replacement", f"claim {index}: {problem}")
        replaced.append(before)
    if all(before.pays_less_than(request.fee_sat, size) for before in replaced):
        return None
    need = _least_fee(request, replaced)
    reason = f"fee of {request.fee_sat} sat for {size} bytes is no higher rate than was signed before, need "
    return Refusal(
        request.id, "policy-replacement", reason + (f"{need} sat" if need else "more than was received"), need
    )


def _change_problem(claim: Claim, before: Signed) -> str | None:
    if claim.change_script != before.change_script:
        return "change goes to another script than was signed before"
    if claim.payment.change_sat > before.change_sat:
        return f"change of {claim.payment.change_sat} sat, more than the {before.change_sat} sat signed before"
    return None


def _least_fee(request: SettlementRequest, replaced: Sequence[Signed]) -> Sat:
    """Find the least fee that passes, which may be all that was received; 0 if none does."""
    size = request_size(structs.replace(request, fee_sat=Sat(0)))
    for fee_sat in (max(before.least_fee_above(size) for before in replaced), received_sat(request.claims)):
        other = structs.replace(request, fee_sat=fee_sat)
        if _fee_problem(other) is None and all(b.pays_less_than(fee_sat, request_size(other)) for b in replaced):
            return fee_sat
    return Sat(0)


def child_refusal(request: ChildRequest, keys: Keys, earlier: Entries) -> Refusal | None:
    """Judge a child of a settlement that passes `POLICIES`, by the same tags; None: it may be signed."""
    parent = request.parent
    if request_digest(parent) not in {before.digest for before in earlier.values()}:
        return Refusal(request.id, "policy-template", "the parent is no settlement that was signed before")
    try:
        output_key(parent, keys)
    except LookupError as error:
        return Refusal(request.id, "policy-destination", str(error))
    spent = _available_sat(parent) - parent.fee_sat
    most = min(spent - LEAST_CHILD_SAT, received_sat(parent.claims) - parent.fee_sat)
    if not 0 <= request.fee_sat <= most:
        reason = f"fee of {request.fee_sat} sat for a child, want 0 to {most} sat of the {spent} sat it spends"
        return Refusal(request.id, "policy-fee", reason)
    return None


def output_key(request: SettlementRequest, keys: Keys) -> OwnKey:
    """Find our key behind the server's output, and how to sign with it.

    Raises:
        LookupError: the operator alone has it.
    """
    script = request.destination_script
    if script == key_script(keys.reserve_key()):
        return keys.reserve_key(), keys.sign_reserve
    for terms in (claim.terms for claim in request.claims):
        key = keys.destination_key(terms.client_key, terms.expiry)
        if key is not None and script == key_script(key):
            return key, partial(keys.sign_destination, terms.client_key, terms.expiry)
    msg = "the parent pays to an address of the operator's, whose key is not here"
    raise LookupError(msg)


def _terms_problem(claim: Claim, keys: Keys) -> str | None:
    try:
        own = channel_terms(claim.terms.client_key, claim.terms.expiry, keys)
    except PaychanError as error:
        return str(error)
    if claim.terms != own:
        return f"server key is {claim.terms.server_key.hex()}, ours for this channel is {own.server_key.hex()}"
    return None


def _output_problem(claim: Claim) -> str | None:
    """Check the funding output, and the change output that the client signed for."""
    problem = _outpoint_problem(claim.outpoint)
    if problem is not None:
        return problem
    if not 0 < claim.funding_sat <= MAX_MONEY_SAT:
        return f"funding of {claim.funding_sat} sat, want 1 to {MAX_MONEY_SAT}"
    if not 0 <= claim.payment.change_sat <= claim.funding_sat:
        return f"change of {claim.payment.change_sat} sat out of {claim.funding_sat} sat"
    if not _is_address_script(claim.change_script):
        return f"change script of {len(claim.change_script)} bytes is neither P2PKH nor P2SH"
    return None


def _outpoint_problem(outpoint: OutPoint) -> str | None:
    if len(outpoint.txid) != 32 or not 0 <= outpoint.vout <= 0xFFFFFFFF:
        return f"no outpoint: {len(outpoint.txid)} bytes of txid, index {outpoint.vout}"
    return None


def _coins_problem(request: SettlementRequest, reserve: Reserve) -> str | None:
    """Check the coins of the reserve."""
    if len(reserve.coins) > MAX_COINS:
        return f"got {len(reserve.coins)} coins, want up to {MAX_COINS}"
    for index, coin in enumerate(reserve.coins):
        problem = _outpoint_problem(coin.outpoint)
        if problem is None and not 0 < coin.value_sat <= MAX_MONEY_SAT:
            problem = f"value of {coin.value_sat} sat, want 1 to {MAX_MONEY_SAT}"
        if problem is not None:
            return f"coin {index}: {problem}"
    spent = [claim.outpoint for claim in request.claims] + [coin.outpoint for coin in reserve.coins]
    if len(set(spent)) < len(spent):
        return "a coin is spent twice"
    total = _available_sat(request)
    return f"received and coins are {total} sat, more than all bitcoins" if total > MAX_MONEY_SAT else None


def _fee_problem(request: SettlementRequest) -> str | None:
    received = received_sat(request.claims)
    if not 0 <= request.fee_sat <= received:
        return f"fee of {request.fee_sat} sat, want 0 to the {received} sat received"
    if request.fee_sat == _available_sat(request) and not request.claims[0].payment.change_sat:
        return f"fee of {request.fee_sat} sat leaves no output"
    return None


def _available_sat(request: SettlementRequest) -> Sat:
    """What fee and server's output are paid from."""
    return Sat(received_sat(request.claims) + (request.reserve.value_sat if request.reserve else 0))


def _is_address_script(script: bytes) -> bool:
    """P2PKH or P2SH: what the addresses of v1 and v2 stand for, and every node relays."""
    if len(script) == 25:
        return script == p2pkh_script(script[3:23])
    return len(script) == 23 and script[:2] == b"\xa9\x14" and script[22:] == b"\x87"
