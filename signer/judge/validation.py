"""The parts of policy-template: checks that a request can be built and signed, before any rule judges it.

Each function returns the reason, or None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paychan.protocol.address import ADDRESS_TYPES, is_address_script
from paychan.protocol.errors import PaychanError
from paychan.protocol.expiry import check_expiry
from paychan.protocol.keys import check_public_key
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.settlement import Claim, Reserve, layout_problem, received_sat
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat
from paychan.protocol.wire.signer_messages import MAX_CLAIMS, SettlementRequest
from signer.judge.facts import Facts
from signer.keys.ring import SigningKey
from signer.ledger.entries import Output

MAX_COINS = 4
"""Most coins of the reserve in one settlement: more than a fee needs, and few enough to bound its size."""


def claims_problem(known: Facts) -> str | None:
    """Check number, order and parts of the claims."""
    claims = known.request.claims
    if not 1 <= len(claims) <= MAX_CLAIMS:
        return f"got {len(claims)} claims, want 1 to {MAX_CLAIMS}"
    for index, (claim, key) in enumerate(zip(claims, known.own.claims, strict=True)):
        problem = terms_problem(claim, key) or output_problem(claim, known.outputs)
        if problem is not None:
            return f"claim {index}: {problem}"
    problem = layout_problem(claims)
    if problem is not None:
        return problem
    if len({claim.outpoint for claim in claims}) < len(claims):
        return "an outpoint is claimed twice"
    total = sum(claim.funding_sat for claim in claims)
    return f"claims of {total} sat, more than all bitcoins" if total > MAX_MONEY_SAT else None


def coins_problem(known: Facts) -> str | None:
    """Check the coins of the reserve."""
    request, reserve = known.request, known.request.reserve
    if reserve is None:
        return None
    if len(reserve.coins) > MAX_COINS:
        return f"got {len(reserve.coins)} coins, want up to {MAX_COINS}"
    for index, coin in enumerate(reserve.coins):
        problem = outpoint_problem(coin.outpoint) or _coin_problem(coin.outpoint, coin.value_sat, reserve, known)
        if problem is not None:
            return f"coin {index}: {problem}"
    spent = [claim.outpoint for claim in request.claims] + [coin.outpoint for coin in reserve.coins]
    if len(set(spent)) < len(spent):
        return "a coin is spent twice"
    total = available_sat(request)
    return f"received and coins are {total} sat, more than all bitcoins" if total > MAX_MONEY_SAT else None


def fee_problem(request: SettlementRequest) -> str | None:
    """Check the fee: at most the value received, even if reserve coins pay it, and at least one output remains."""
    received = received_sat(request.claims)
    if not 0 <= request.fee_sat <= received:
        return f"fee of {request.fee_sat} sat, want 0 to the {received} sat received"
    if request.fee_sat == available_sat(request) and not request.claims[0].payment.change_sat:
        return f"fee of {request.fee_sat} sat leaves no output"
    return None


def available_sat(request: SettlementRequest) -> Sat:
    """Value that pays the fee and the server's output, in satoshi."""
    return Sat(received_sat(request.claims) + (request.reserve.value_sat if request.reserve else 0))


def outpoint_problem(outpoint: OutPoint) -> str | None:
    """Check that it can be serialized."""
    if len(outpoint.txid) != 32 or not 0 <= outpoint.vout <= 0xFFFFFFFF:
        return f"not an outpoint: {len(outpoint.txid)} bytes of txid, index {outpoint.vout}"
    return None


def unshown(known: Facts) -> list[OutPoint]:
    """List outpoints that the request spends and that were not shown."""
    request = known.request
    coins: Iterable[OutPoint] = (coin.outpoint for coin in request.reserve.coins) if request.reserve else ()
    return [
        outpoint
        for outpoint in (*(claim.outpoint for claim in request.claims), *coins)
        if outpoint not in known.outputs
    ]


def terms_problem(claim: Claim, key: SigningKey | None) -> str | None:
    """Check that the terms are valid for a channel, and name this key of the signer."""
    terms = claim.terms
    try:
        check_public_key(terms.client_key)
        expiry = check_expiry(terms.expiry.lock_time)
        if key is not None:
            make_terms(key.public_key, terms.client_key, expiry, terms.tag)
    except PaychanError as error:
        return str(error)
    return None if key is not None else f"server key {terms.server_key.hex()} is no key of this signer for this channel"


def output_problem(claim: Claim, outputs: Mapping[OutPoint, Output]) -> str | None:
    """Check the funding output, and the change output that the client signed for."""
    problem = outpoint_problem(claim.outpoint)
    if problem is not None:
        return problem
    if not 0 < claim.funding_sat <= MAX_MONEY_SAT:
        return f"funding of {claim.funding_sat} sat, want 1 to {MAX_MONEY_SAT}"
    if not 0 <= claim.payment.change_sat <= claim.funding_sat:
        return f"change of {claim.payment.change_sat} sat out of {claim.funding_sat} sat"
    funding_script = claim.terms.funding_script
    if claim.change_script != funding_script and not is_address_script(claim.change_script):
        return f"change script of {len(claim.change_script)} bytes is not {ADDRESS_TYPES}"
    return _script_problem(claim.outpoint, funding_script, outputs)


def _coin_problem(outpoint: OutPoint, value_sat: int, reserve: Reserve, known: Facts) -> str | None:
    if not 0 < value_sat <= MAX_MONEY_SAT:
        return f"value of {value_sat} sat, want 1 to {MAX_MONEY_SAT}"
    # policy-destination refuses an unknown reserve
    return _script_problem(outpoint, reserve.funding_script, known.outputs) if known.own.reserve else None


def _script_problem(outpoint: OutPoint, script: bytes, outputs: Mapping[OutPoint, Output]) -> str | None:
    shown = outputs.get(outpoint)
    if shown is not None and shown.script != script:
        return f"{outpoint} pays to {shown.script.hex()}, not to {script.hex()}"
    return None
