"""JSON between a seller's program and the server: the merchant interface. `gateway/merchant.py` answers, `paychan.sell` asks.

Decoding is strict: an unknown member is an error. Amounts are whole satoshi.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

MAX_BODY_BYTES = 65_536
"""Longest request: a payment with its offer and a funding transaction takes 16 kB, a URL 8 kB."""

PAYMENT_HEADERS = ("payment-signature", "payment-authorization", "authorization", "idempotency-key")
"""Headers of the payer's request that a charge depends on; of `Authorization` the scheme `Payment` alone."""

FACT_HEADERS = ("accept", "accept-payment")
"""Headers on which the form of a 402 depends."""

_Amount: TypeAlias = Annotated[int, Meta(ge=0, le=21 * 10**14)]
_Price: TypeAlias = Annotated[int, Meta(ge=1, le=21 * 10**14)]
_Channel: TypeAlias = Annotated[str, Meta(pattern="^[0-9a-f]{64}:(0|[1-9][0-9]{0,9})$")]
_RequestId: TypeAlias = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
_Line: TypeAlias = Annotated[str, Meta(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Realm: TypeAlias = Annotated[str, Meta(pattern="^([A-Za-z0-9][A-Za-z0-9.:_ /-]{0,99})?$")]
_Header: TypeAlias = tuple[Annotated[str, Meta(max_length=100)], Annotated[str, Meta(max_length=32_768)]]
Headers: TypeAlias = tuple[tuple[str, str], ...]
Way: TypeAlias = Literal["", "x402", "mpp"]
Unit: TypeAlias = Literal["request", "byte", "kilobyte", "second", "event", "token"]


class _Json(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A JSON object without members that have their default."""


class Ask(_Json, frozen=True):
    """A payer's request, and its price: `POST /offer` answers with a 402, `POST /charge` charges its payment."""

    method: Annotated[str, Meta(pattern="^[A-Z]{1,20}$")]
    url: Annotated[str, Meta(max_length=8192)]
    """As the payer sees it."""
    price_sat: _Price
    """Price, or the highest price if `is_ceiling`."""
    is_ceiling: bool = False
    unit: Unit = "request"
    realm: _Realm = ""
    """Name of the service; "": the host of the URL."""
    description: _Line = ""
    mime_type: Annotated[str, Meta(pattern="^([a-z0-9.+-]+/[a-z0-9.+-]+)?$", max_length=100)] = ""
    headers: Annotated[tuple[_Header, ...], Meta(max_length=64)] = ()
    """`PAYMENT_HEADERS` and `FACT_HEADERS` of the request."""
    body_sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    """None: the body was not read yet; then the request is never taken for a repetition."""
    visit: Annotated[str, Meta(max_length=64)] = ""
    """Drawn by the program for each request that it serves: it may ask again after a lost answer."""


class Release(_Json, frozen=True):
    """`POST /release`: the request costs `to_sat` only. `way` and `challenge` are those of the charge."""

    channel: _Channel
    request: _RequestId
    to_sat: _Amount = 0
    way: Way = ""
    challenge: Annotated[str, Meta(max_length=500)] = ""


class Done(_Json, frozen=True):
    """`POST /done`: the answer has begun to leave, and the charge is final."""

    channel: _Channel
    request: _RequestId


class Charged(Struct, frozen=True, kw_only=True, tag="charged", tag_field="outcome"):
    """A charge that is on disk, after `/charge` or `/release`."""

    channel: str
    request: str
    charged_sat: int
    """Sum that the request was charged, also by earlier calls."""
    credit_sat: int
    headers: Headers = ()
    """For the answer: `PAYMENT-RESPONSE` or `Payment-Receipt`."""
    way: Way = ""
    challenge: str = ""


class Ready(Struct, frozen=True, kw_only=True):
    """An answer for the payer, ready to be sent. A HEAD gets its headers only."""

    status: int
    headers: Headers
    body: str


class Offered(Ready, frozen=True, tag="offered", tag_field="outcome"):
    """The 402 of a request without a payment."""


class Refused(Ready, frozen=True, tag="refused", tag_field="outcome"):
    """The request was not charged, and nothing changed."""


class Closed(Ready, frozen=True, tag="closed", tag_field="outcome"):
    """The payer has closed its channel; nothing is to be delivered."""


class Failure(Struct, frozen=True, kw_only=True, tag="error", tag_field="outcome"):
    """The program's own request was wrong: status 4xx, and a stable code of `errors.py`."""

    code: str
    detail: str


Reply: TypeAlias = Charged | Offered | Refused | Closed | Failure
