"""The price that an upstream says in its answer, for a route with a ceiling."""

from __future__ import annotations

import re

import msgspec
from msgspec import Struct

from paychan.protocol.types import Sat

PRICE_HEADER = "X-Paychan-Price"
"""Header of the upstream's answer: whole satoshi, such as `17`. The gateway removes it."""

OVERRIDES_HEADER = "Settlement-Overrides"
"""The same by x402: `{"amount": "17"}` in satoshi, or a share of the ceiling such as `"40%"`. The gateway removes it."""

_SAT = re.compile(r"0|[1-9][0-9]{0,15}")
_PERCENT = re.compile(r"([0-9]{1,3})(?:\.([0-9]{1,6}))?%")


class SaidPrice(Struct, frozen=True):
    """The amount to charge, and a sentence for the seller's log if the upstream's word could not be followed."""

    amount_sat: Sat
    trouble: str = ""


class _Overrides(Struct):
    amount: str


def said_price(price: str | None, overrides: str | None, ceiling_sat: Sat) -> SaidPrice:
    """Return the amount to charge: never above the ceiling, to which the payer agreed.

    An upstream that says nothing, or nothing readable, charges the ceiling. `PRICE_HEADER` wins over `OVERRIDES_HEADER`.
    """
    if price is not None:
        text, header = price.strip(), PRICE_HEADER
    elif overrides is not None:
        text, header = _amount(overrides), OVERRIDES_HEADER
    else:
        return SaidPrice(
            ceiling_sat, f"the upstream's answer has no {PRICE_HEADER}: charged the ceiling, {ceiling_sat} sat"
        )
    percent = _PERCENT.fullmatch(text) if header == OVERRIDES_HEADER else None
    if percent:
        millionths = int(percent[1]) * 10**6 + int((percent[2] or "").ljust(6, "0"))
        amount = -(-ceiling_sat * millionths // (100 * 10**6))  # rounded up to whole satoshi
    elif _SAT.fullmatch(text):
        amount = int(text)
    else:
        return SaidPrice(ceiling_sat, f"{header} has no amount in satoshi: charged the ceiling, {ceiling_sat} sat")
    if amount > ceiling_sat:
        return SaidPrice(ceiling_sat, f"{header}: got {amount} sat, limit {ceiling_sat} sat: charged the ceiling")
    return SaidPrice(Sat(amount))


def _amount(overrides: str) -> str:
    try:
        return msgspec.json.decode(overrides, type=_Overrides).amount
    except msgspec.DecodeError:
        return ""
