"""Outcomes of an MPP payment: receipts, problems, snapshots of a channel, and the event of a stream without credit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from paychan.protocol.errors import PaychanError
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.unpaid import CreditTooLow, MalformedPayment
from paychan.protocol.wire.canonical import (
    from_base64url,
    json_object,
    read_time,
    time_text,
    to_base64url,
)
from paychan.protocol.wire.members import proof_json, read_count, read_outpoint, read_proof, read_sat, read_text
from paychan.protocol.wire.offers import ChannelState, Settled

RECEIPT_HEADER = "Payment-Receipt"
MAX_RECEIPT_BYTES = 8192
NEED_VOUCHER_EVENT, RECEIPT_EVENT = "payment-need-voucher", "payment-receipt"
"""Events of a metered stream: the credit is used up; the stream has ended."""
PROBLEMS = "https://paymentauth.org/problems/"
PROBLEM_TYPE = "application/problem+json"

_SLUGS = {
    "malformed_payment": "malformed-credential",
    "payment_too_large": "malformed-credential",
    "malformed": "malformed-credential",
    "payment_unsupported": "method-unsupported",
    "offer_mismatch": "invalid-challenge",
    "invalid_challenge": "invalid-challenge",
    "challenge_expired": "payment-expired",
    "payment_short": "payment-insufficient",
    "credit_too_low": "session/insufficient-balance",
    "cumulative_mismatch": "session/amount-exceeds-deposit",
    "bad_signature": "session/invalid-signature",
    "signature_encoding": "session/invalid-signature",
    "bad_flag": "session/invalid-signature",
    "flag_mismatch": "session/invalid-signature",
    "value_backwards": "session/delta-too-small",
    "unknown_channel": "session/channel-not-found",
    "channel_expiring": "session/channel-finalized",
    "channel_closing": "session/channel-finalized",
    "channel_closed": "session/channel-finalized",
    "channel_lost": "session/channel-finalized",
    "channel_moved": "session/channel-finalized",
    "never_funded": "session/channel-finalized",
}
"""Problem type of each code of `errors.py` that has one in MPP; the others are `verification-failed`."""


class Receipt(Struct, frozen=True):
    """Proof of a paid request, as the server writes it."""

    settled: Settled
    challenge_id: str
    time: UnixTime


def snapshot_json(state: ChannelState) -> dict[str, Any]:
    """Write a channel as `sessionSnapshot` of a challenge, with its newest payment as proof."""
    proof = {} if state.newest is None else {"highestVoucher": proof_json(state.newest)}
    return {**_sums_json(state), **proof}


def _sums_json(state: ChannelState) -> dict[str, Any]:
    return {
        "channelId": str(state.channel),
        "deposit": str(state.capacity_sat),
        "acceptedCumulative": str(state.accepted_sat),
        "spent": str(state.spent_sat),
        "credit": str(state.credit_sat),
        "expiry": state.expiry,
    }


def read_snapshot(request: Mapping[str, Any]) -> ChannelState | None:
    """Read the snapshot in the request of a challenge, or return None if it has none.

    The payer must check its own signature over the proof before it believes the snapshot.

    Raises:
        MalformedPayment: a member is missing or has another form, or the sums contradict each other.
    """
    details = request.get("methodDetails")
    shown = details.get("sessionSnapshot") if isinstance(details, dict) else None
    if shown is None:
        return None
    if not isinstance(shown, dict):
        raise MalformedPayment(field="sessionSnapshot", reason="want an object")
    proof = shown.get("highestVoucher")
    if not isinstance(proof, dict | None):
        raise MalformedPayment(field="highestVoucher", reason="want an object")
    return _state(shown, proof)


def _state(shown: Mapping[str, Any], proof: Mapping[str, Any] | None) -> ChannelState:
    deposit, accepted, spent, credit = (
        read_sat(shown.get(name), name) for name in ("deposit", "acceptedCumulative", "spent", "credit")
    )
    newest = None if proof is None else read_proof(proof)
    carried = credit + spent - accepted
    if accepted > deposit or carried < 0 or (newest is not None and newest.change_sat != deposit - accepted):
        raise MalformedPayment(field="acceptedCumulative", reason="the sums contradict each other")
    return ChannelState(
        read_outpoint(shown.get("channelId"), "channelId"),
        deposit,
        accepted,
        spent,
        UnixTime(read_count(shown, "expiry")),
        newest,
        Sat(carried),
    )


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    """Write a receipt, for the header and for the last event of a stream."""
    state = receipt.settled.state
    return {
        "status": "success",
        "method": "bitcoin",
        "intent": "session",
        "timestamp": time_text(receipt.time),
        "reference": str(state.channel),
        "challengeId": receipt.challenge_id,
        **_sums_json(state),
        "changeSat": str(state.change_sat),
        "charged": str(receipt.settled.charged_sat),
    }


def receipt_header(receipt: Receipt) -> str:
    """Write `Payment-Receipt`."""
    return to_base64url(msgspec.json.encode(receipt_json(receipt)))


def read_receipt(header: str) -> Receipt:
    """Read `Payment-Receipt`.

    Raises:
        PaymentTooLarge, MalformedPayment: too long, no success of this method, or a member has another form.
    """
    shown = json_object(from_base64url(header.strip(" \t"), RECEIPT_HEADER, MAX_RECEIPT_BYTES), RECEIPT_HEADER)
    if (shown.get("status"), shown.get("method"), shown.get("intent")) != ("success", "bitcoin", "session"):
        raise MalformedPayment(field=RECEIPT_HEADER, reason="no success of bitcoin/session")
    settled = Settled(_state(shown, None), read_sat(shown.get("charged"), "charged"))
    time = read_time(read_text(shown, "timestamp", 40), "timestamp")
    return Receipt(settled, read_text(shown, "challengeId", 256), time)


def need_voucher_json(state: ChannelState, needed_sat: Sat) -> dict[str, Any]:
    """Write the data of `NEED_VOUCHER_EVENT`: the stream waits until the accepted value grows to the required one.

    `needed_sat` is the price of the next unit.
    """
    missing_sat = max(0, needed_sat - state.credit_sat)
    return {
        "channelId": str(state.channel),
        "requiredCumulative": str(state.accepted_sat + missing_sat),
        "acceptedCumulative": str(state.accepted_sat),
        "deposit": str(state.capacity_sat),
    }


def problem_slug(error: PaychanError | None) -> str:
    """Return the last part of the problem's type."""
    return "payment-required" if error is None else _SLUGS.get(error.code, "verification-failed")


def problem_json(
    status: int, challenge_id: str, error: PaychanError | None = None, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the body of a 402 (RFC 9457): why a payment is needed, or why it was refused.

    It has the refusal's own code as `code`, and the members of `more`.
    """
    slug = problem_slug(error)
    shown: dict[str, Any] = {
        "type": PROBLEMS + slug,
        "title": slug.rpartition("/")[2].replace("-", " ").capitalize(),
        "status": status,
        "detail": "This resource has a price." if error is None else error.public_text or str(error),
        "challengeId": challenge_id,
    }
    if error is not None:
        shown["code"] = error.code
    if isinstance(error, CreditTooLow):
        shown["requiredTopUp"] = str(max(0, error.fields["need_sat"] - error.fields["got_sat"]))
    return shown | dict(more or {})
