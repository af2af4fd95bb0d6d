"""Demands: a 402 and the answer to a payment, read from the headers of either protocol (x402, MPP). It is pure.

Header names are in lower case. Texts of a server are data: they appear in errors, cut to a length, and decide nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct

from paychan.protocol.errors import PaychanError
from paychan.protocol.wire import mpp, x402, x402_json
from paychan.protocol.wire.challenge_header import FIELD
from paychan.protocol.wire.mpp_outcomes import RECEIPT_HEADER, read_receipt
from paychan.protocol.wire.offers import ChannelState, Offer, Settled, Voucher
from paychan.protocol.wire.x402_outcomes import read_settled, read_state

Headers: TypeAlias = Sequence[tuple[str, str]]
Protocol: TypeAlias = Literal["x402", "mpp"]

MOST_BODY_BYTES = 16_384
"""Part of the body of a 402 that is read for its reason."""

PAYMENT_HEADERS = ("payment-signature", "payment-authorization")
_REQUIRED, _RESPONSE = x402_json.REQUIRED_HEADER.lower(), x402_json.RESPONSE_HEADER.lower()
_RECEIPT, _CHALLENGE = RECEIPT_HEADER.lower(), FIELD.lower()
_MOST_TEXT = 300


_OWN_OF_A_REQUEST = ("idempotency-key", "accept", "range", "expect", "te", "trailer", "transfer-encoding", "connection")
"""Fields, beside those of a body, that are about the first request alone."""


def is_for_voucher(name: str) -> bool:
    """Say whether a header of a request belongs to a second request that only brings a payment."""
    name = name.lower()
    about_body = name.startswith(("content-", "if-"))
    return not about_body and name not in _OWN_OF_A_REQUEST


class Demand(Struct, frozen=True):
    """One offer of a 402, and the way to answer it."""

    protocol: Protocol
    offer: Offer
    state: ChannelState | None
    """The channel as the server has it, if it corrects a payment."""
    found: x402.Found | mpp.Found
    resource: x402_json.Resource | None = None
    takes_identifier: bool = False
    """The server reads x402's extension `payment-identifier`."""
    units: int = 1
    """Number of units to pay for, if the price is for an event, a second, a kilobyte or the like."""

    @property
    def price_sat(self) -> int:
        """Sum to pay for the request."""
        return self.offer.amount_sat * (1 if self.offer.unit == "request" else self.units)

    def headers(self, voucher: Voucher, request: str, taken: Collection[str]) -> Headers:
        """Write the headers of the paid request. `request` names it; `taken` are the names that the program has set."""
        if isinstance(self.found, x402.Found):
            named = request if self.takes_identifier else ""
            paid = ("PAYMENT-SIGNATURE", x402.payment_header(self.found, voucher, self.resource, named))
        else:
            wanted = (self.found.challenge.header or "").lower()
            other = "authorization" in taken or wanted == "payment-authorization"
            paid = (
                "Payment-Authorization" if other else "Authorization",
                mpp.credential_header(self.found.challenge, voucher),
            )
        by_header = not self.takes_identifier and "idempotency-key" not in taken
        return (paid, ("Idempotency-Key", f'"{request}"')) if by_header else (paid,)


class Problem(Struct, frozen=True):
    """The reason of a 402, as the server says it."""

    code: str
    reason: str


def is_paid_already(names: Iterable[str], authorization: str) -> bool:
    """Say whether the program pays by itself: then nothing is added to its request."""
    return any(name in PAYMENT_HEADERS for name in names) or authorization.lower().startswith("payment ")


def read_demands(headers: Headers, prefer: Protocol = "x402", units: int = 1) -> list[Demand]:
    """Return the offers of a 402 that this library can pay, the preferred protocol first; unreadable headers have none.

    `units` is the number to pay for where the price is for a unit of the answer.
    """
    found = {"x402": _x402_demands(headers, units), "mpp": _mpp_demands(headers, units)}
    other: Protocol = "mpp" if prefer == "x402" else "x402"
    return [*found[prefer], *found[other]]


def read_corrections(headers: Headers, paid: Demand) -> list[Demand]:
    """Return the offers of a refusal that show the channel's state; `paid` is the offer that the payment answered.

    A server of x402 that settles by a facilitator shows the state in `PAYMENT-RESPONSE`, and no offer.
    """
    found = [each for each in read_demands(headers, paid.protocol, paid.units) if each.state is not None]
    for value in _values(headers, _RESPONSE):
        try:
            response = x402_json.read_response(value)
            state = None if response.success else read_state(response.extra or {})
        except PaychanError:
            continue
        if state is not None:
            found.append(msgspec.structs.replace(paid, state=state))
    return found


def _x402_demands(headers: Headers, units: int) -> list[Demand]:
    demands = []
    for value in _values(headers, _REQUIRED):
        try:
            required = x402_json.read_required(value)
        except PaychanError:
            continue
        takes = x402.IDENTIFIER in (required.extensions or {})
        demands += [
            Demand("x402", each.offer, each.state, each, required.resource, takes, units)
            for each in x402.offers(required)
        ]
    return demands


def _mpp_demands(headers: Headers, units: int) -> list[Demand]:
    try:
        found = mpp.offers(_values(headers, _CHALLENGE))
    except PaychanError:
        return []
    return [Demand("mpp", each.offer, each.state, each, units=units) for each in found]


def read_outcome(headers: Headers) -> tuple[Settled, str] | None:
    """Return the success that an answer claims, and the header that says so; None without a readable one."""
    for name, value in headers:
        try:
            if name == _RESPONSE:
                return read_settled(x402_json.read_response(value)), value
            if name == _RECEIPT:
                return read_receipt(value).settled, value
        except PaychanError:
            continue
    return None


def read_problem(headers: Headers, body: bytes) -> Problem:
    """Return the reason of a 402: of problem+json, or else of x402's headers."""
    code = reason = ""
    try:
        content = json.loads(body[:MOST_BODY_BYTES])
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        code, reason = _text(content.get("code")), _text(content.get("detail") or content.get("title"))
    for value in (*_values(headers, _REQUIRED), *_values(headers, _RESPONSE)):
        said = _x402_error(value)
        code, reason = code or said, reason or said
    return Problem(code, reason or "it gave no reason")


def _x402_error(value: str) -> str:
    try:
        return _text(x402_json.read_required(value).error)
    except PaychanError:
        pass
    try:
        return _text(x402_json.read_response(value).error_reason)
    except PaychanError:
        return ""


def _text(value: object) -> str:
    """Return a text of a server without characters that could forge lines of a terminal or a log."""
    if not isinstance(value, str):
        return ""
    return "".join(each if each.isprintable() else " " for each in value[:_MOST_TEXT])


def _values(headers: Headers, name: str) -> list[str]:
    return [value for each, value in headers if each == name]
