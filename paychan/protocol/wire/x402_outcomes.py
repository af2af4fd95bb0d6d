"""Outcomes of an x402 payment: the state of a channel, successes, refusals and their codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paychan.protocol.errors import PaychanError
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.unpaid import MalformedPayment
from paychan.protocol.wire.members import proof_json, read_count, read_key, read_outpoint, read_proof, read_sat
from paychan.protocol.wire.offers import ChannelState, Settled
from paychan.protocol.wire.x402_json import RESPONSE_HEADER, SettleResponse, VerifyResponse

DYNAMIC = ("channelState", "voucherState")
"""Members of `extra` that only a corrective answer has; an offer is compared without them."""

_PREFIX = "invalid_batch_settlement_bitcoin_"
_CODES: dict[str, str] = {
    "cumulative_mismatch": "cumulative_mismatch",
    "unknown_channel": "channel_not_found",
    "payment_pending": "channel_busy",
    "channel_moving": "channel_busy",
    "too_many_deliveries": "channel_busy",
    "request_under_way": "channel_busy",
    "already_delivered": "already_settled",
    "bad_signature": "signature",
    "signature_encoding": "signature",
    "value_backwards": "value_backwards",
    "dust_change": "below_dust",
    "channel_expiring": "channel_expiring",
    "channel_closing": "channel_expiring",
    "channel_closed": "channel_expiring",
    "channel_lost": "channel_expiring",
    "channel_moved": "channel_expiring",
    "never_funded": "channel_expiring",
    "funding_unconfirmed": "unconfirmed",
    "bad_flag": "sighash",
    "flag_mismatch": "sighash",
}
"""Codes of `errors.py` that have a code of the binding; the rest of the code follows `_PREFIX`."""

_GENERIC = {
    "malformed_payment": "invalid_payload",
    "malformed": "invalid_payload",
    "payment_too_large": "invalid_payload",
    "payment_unsupported": "unsupported_scheme",
    "offer_mismatch": "invalid_payment_requirements",
    "credit_too_low": "insufficient_funds",
    "payment_short": "insufficient_funds",
}
"""Codes of `errors.py` that have one of x402's own codes."""


def error_code(error: PaychanError) -> str:
    """Return the code of a refusal for `error`, `errorReason` and `invalidReason`."""
    if error.code in _CODES:
        return _PREFIX + _CODES[error.code]
    return _GENERIC.get(error.code, "unexpected_settle_error")


def state_json(state: ChannelState) -> dict[str, Any]:
    """Write a channel as the member `channelState`."""
    return {
        "channel": str(state.channel),
        "capacitySat": str(state.capacity_sat),
        "changeSat": str(state.change_sat),
        "acceptedCumulativeSat": str(state.accepted_sat),
        "spentSat": str(state.spent_sat),
        "creditSat": str(state.credit_sat),
        "expiry": state.expiry,
    }


def read_state(extra: Mapping[str, Any]) -> ChannelState | None:
    """Read `channelState` and `voucherState` of an `extra`, or return None if it has no `channelState`.

    The payer must check its own signature over the proof before it believes the state.

    Raises:
        MalformedPayment: a member is missing or has another form, or the sums contradict each other.
    """
    shown, proof = (extra.get(name) for name in DYNAMIC)
    if shown is None:
        return None
    if not isinstance(shown, dict) or not (proof is None or isinstance(proof, dict)):
        raise MalformedPayment(field="channelState", reason="want objects")
    capacity, accepted, spent, credit, change = (
        read_sat(shown.get(name), name)
        for name in ("capacitySat", "acceptedCumulativeSat", "spentSat", "creditSat", "changeSat")
    )
    newest = None if proof is None else read_proof(proof)
    carried = credit + spent - accepted
    if accepted + change != capacity or carried < 0 or (newest is not None and newest.change_sat != change):
        raise MalformedPayment(field="channelState", reason="its sums contradict each other")
    return ChannelState(
        read_outpoint(shown.get("channel"), "channel"),
        capacity,
        accepted,
        spent,
        UnixTime(read_count(shown, "expiry")),
        newest,
        Sat(carried),
    )


def commitment(state: ChannelState) -> str:
    """Return the name of the newest payment, which is `transaction` of a success."""
    return f"paychan:{state.channel}:{state.change_sat}"


def settled_json(settled: Settled, chain: str) -> SettleResponse:
    """Write the success of a payment, for `PAYMENT-RESPONSE`."""
    return SettleResponse(
        success=True,
        transaction=commitment(settled.state),
        network=chain,
        payer=settled.client_key.hex() or None,
        amount="",
        extra={
            "chargedAmount": str(settled.charged_sat),
            "creditSat": str(settled.state.credit_sat),
            "channelState": state_json(settled.state),
        },
    )


def read_settled(response: SettleResponse) -> Settled:
    """Read a success of this binding.

    Raises:
        MalformedPayment: no success, or a member is missing or has another form.
    """
    extra = response.extra or {}
    state = read_state(extra)
    if not response.success or state is None:
        raise MalformedPayment(field=RESPONSE_HEADER, reason="no success with a channelState")
    key = b"" if response.payer is None else read_key(response.payer, "payer")
    return Settled(state, read_sat(extra.get("chargedAmount"), "chargedAmount"), key)


def correction_json(state: ChannelState) -> dict[str, Any]:
    """Write a channel's state, and its newest payment if there is one to show, as members of an `extra`."""
    proof = {} if state.newest is None else {"voucherState": proof_json(state.newest)}
    return {"channelState": state_json(state), **proof}


def refused_json(error: PaychanError, chain: str, state: ChannelState | None = None) -> SettleResponse:
    """Write the failure of a payment, for `PAYMENT-RESPONSE` and for a facilitator's answer; `state` corrects the payer."""
    return SettleResponse(
        success=False,
        transaction="",
        network=chain,
        error_reason=error_code(error),
        error_message=error.public_text or str(error),
        extra=None if state is None else correction_json(state),
    )


def verified_json(error: PaychanError | None, client_key: bytes = b"") -> VerifyResponse:
    """Write a facilitator's answer about a payment: valid, or the refusal."""
    if error is None:
        return VerifyResponse(is_valid=True, payer=client_key.hex() or None)
    return VerifyResponse(
        is_valid=False, invalid_reason=error_code(error), invalid_message=error.public_text or str(error)
    )
