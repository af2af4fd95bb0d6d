"""What the signer refuses: one rule per tag, each a pure function that returns the reason or None.

Rules are tried in the order of `POLICIES`, and each may rely on those before it. Those here judge a request alone; the
rules that remember (policy-watermark, policy-replacement, policy-rate) and policy-fee's caps join the same table.

policy-sighash needs no rule: `settlement.sign_settlement`, which does all signing, knows SIGHASH_ALL only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from paychan.protocol.address import p2pkh_script
from paychan.protocol.errors import PaychanError
from paychan.protocol.payment import PaymentVerifier, change_problem
from paychan.protocol.scripts import ChannelTerms, check_expiry, check_public_key, make_terms
from paychan.protocol.settlement import Claim
from paychan.protocol.signerwire import MAX_CLAIMS, Refusal, SettlementRequest
from paychan.protocol.types import MAX_MONEY_SAT, Sat
from signer.keys import Keys

_LEAST_CHANGE = Sat(1)
"""Dust limits are the server's business: a settlement that is not relayed loses nothing, a wrong flag can."""

Rule: TypeAlias = Callable[[SettlementRequest, Keys], str | None]


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
    """policy-destination: the server's output goes where the configuration or the seed says."""
    own = {keys.destination_script(claim.terms.client_key, claim.terms.expiry) for claim in request.claims}
    script = request.destination_script
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
    """policy-fee: the fee comes out of what was received, and something is left to pay to."""
    received = sum(claim.received_sat for claim in request.claims)
    if not 0 <= request.fee_sat <= received:
        return f"fee of {request.fee_sat} sat, want 0 to the {received} sat received"
    if request.fee_sat == received and not request.claims[0].payment.change_sat:
        return f"fee of {request.fee_sat} sat leaves no output"
    return None


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
    if len(claim.outpoint.txid) != 32 or not 0 <= claim.outpoint.vout <= 0xFFFFFFFF:
        return f"no outpoint: {len(claim.outpoint.txid)} bytes of txid, index {claim.outpoint.vout}"
    if not 0 < claim.funding_sat <= MAX_MONEY_SAT:
        return f"funding of {claim.funding_sat} sat, want 1 to {MAX_MONEY_SAT}"
    if not 0 <= claim.payment.change_sat <= claim.funding_sat:
        return f"change of {claim.payment.change_sat} sat out of {claim.funding_sat} sat"
    if not _is_address_script(claim.change_script):
        return f"change script of {len(claim.change_script)} bytes is neither P2PKH nor P2SH"
    return None


def _is_address_script(script: bytes) -> bool:
    """P2PKH or P2SH: what the addresses of v1 and v2 stand for, and every node relays."""
    if len(script) == 25:
        return script == p2pkh_script(script[3:23])
    return len(script) == 23 and script[:2] == b"\xa9\x14" and script[22:] == b"\x87"
