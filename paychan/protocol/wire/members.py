"""Members of JSON objects that x402 and MPP have in common: amounts, outpoints, keys, signatures, openings, proofs.

All readers raise `MalformedPayment`, which names the member.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from paychan.protocol.errors import Malformed
from paychan.protocol.keys import parse_public_key
from paychan.protocol.payment import Payment
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat, UnixTime
from paychan.protocol.unpaid import MalformedPayment
from paychan.protocol.wire.offers import Open, Voucher

MAX_SCRIPT_BYTES = 34
"""Longest change script that has an address."""
MAX_TX_BYTES = 4000
"""Longest funding transaction in a header; a longer one is broadcast by the payer, or sent to the RBPCP server."""

_AMOUNT = re.compile(r"0|[1-9][0-9]{0,15}")
_OUTPOINT = re.compile(r"([0-9a-f]{64}):(0|[1-9][0-9]{0,9})")
_HEX = re.compile(r"(?:[0-9a-f]{2})*")


def read_sat(text: Any, field: str) -> Sat:
    """Read an amount in satoshi: decimal digits without sign or leading zero, at most all bitcoins.

    Raises:
        MalformedPayment: another text.
    """
    if not isinstance(text, str) or not _AMOUNT.fullmatch(text) or int(text) > MAX_MONEY_SAT:
        raise MalformedPayment(field=field, reason=f"want a decimal text of 0 to {MAX_MONEY_SAT} sat")
    return Sat(int(text))


def read_outpoint(text: Any, field: str) -> OutPoint:
    """Read `txid:index`.

    Raises:
        MalformedPayment: another text.
    """
    found = _OUTPOINT.fullmatch(text) if isinstance(text, str) else None
    if found is None or int(found[2]) > 0xFFFFFFFF:
        raise MalformedPayment(field=field, reason="want 64 lower-case hex digits, a colon and an index of 32 bits")
    return OutPoint.parse(found[1], int(found[2]))


def read_hex(text: Any, field: str, least: int, most: int) -> bytes:
    """Read lower-case hex digits of `least` to `most` bytes.

    Raises:
        MalformedPayment: another text.
    """
    if not isinstance(text, str) or not _HEX.fullmatch(text) or not least <= len(text) // 2 <= most:
        raise MalformedPayment(field=field, reason=f"want lower-case hex digits of {least} to {most} bytes")
    return bytes.fromhex(text)


def read_key(text: Any, field: str) -> bytes:
    """Read a compressed public key.

    Raises:
        MalformedPayment: another text, or no point on secp256k1.
    """
    try:
        return parse_public_key(text if isinstance(text, str) else "", field)
    except Malformed as error:
        raise MalformedPayment(**error.fields) from None


def read_count(values: Mapping[str, Any], field: str) -> int:
    """Read a whole number of 0 to 2^32 - 1.

    Raises:
        MalformedPayment: missing, or another value.
    """
    value = values.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 0xFFFFFFFF:
        raise MalformedPayment(field=field, reason="want a whole number of 0 to 4294967295")
    return value


def read_text(values: Mapping[str, Any], field: str, most: int) -> str:
    """Read a text of 1 to `most` characters.

    Raises:
        MalformedPayment: missing, or another value.
    """
    value = values.get(field)
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        raise MalformedPayment(field=field, reason=f"want a text of 1 to {most} characters")
    return value


def proof_json(payment: Payment) -> dict[str, Any]:
    """Write change value, flag and signature of a payment."""
    return {"changeSat": str(payment.change_sat), "sighash": payment.flag, "signature": payment.signature.hex()}


def read_proof(values: Mapping[str, Any]) -> Payment:
    """Read what `proof_json` writes.

    Raises:
        MalformedPayment: a member is missing or has another form; no check of the signature itself.
    """
    flag = read_count(values, "sighash")
    if flag > 0xFF:
        raise MalformedPayment(field="sighash", reason=f"got {flag}, want 130 or 131")
    return Payment(
        read_sat(values.get("changeSat"), "changeSat"), read_hex(values.get("signature"), "signature", 8, 72), flag
    )


def read_voucher(values: Mapping[str, Any], channel: str, cumulative: str) -> Voucher:
    """Read a payment; `channel` and `cumulative` are the names that the protocol gives these members.

    Raises:
        MalformedPayment: a member is missing or has another form.
    """
    payment = read_proof(values)
    return Voucher(
        read_outpoint(values.get(channel), channel),
        payment.change_sat,
        read_sat(values.get(cumulative), cumulative),
        payment.signature_with_flag,
    )


def opening_json(opening: Open) -> dict[str, Any]:
    """Write the members of an opening beside its payment."""
    return {
        "fundingTx": None if opening.funding_tx is None else opening.funding_tx.hex(),
        "clientKey": opening.client_key.hex(),
        "expiry": opening.expiry,
        "changeScript": opening.change_script.hex(),
    }


def read_opening(values: Mapping[str, Any], voucher: Voucher) -> Open:
    """Read what `opening_json` writes.

    Raises:
        MalformedPayment: a member is missing or has another form.
    """
    transaction = values.get("fundingTx")
    return Open(
        voucher,
        read_key(values.get("clientKey"), "clientKey"),
        UnixTime(read_count(values, "expiry")),
        read_hex(values.get("changeScript"), "changeScript", 1, MAX_SCRIPT_BYTES),
        None if transaction is None else read_hex(transaction, "fundingTx", 60, MAX_TX_BYTES),
    )
