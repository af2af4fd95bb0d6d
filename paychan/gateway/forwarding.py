"""Headers on their way through the gateway, in both directions.

RFC 9110, 7.6.1: "Intermediaries are required to remove or replace" the fields that hold for one connection. Payment
fields end here as well: the upstream sees no payment, and the payer sees no payment answer but the gateway's own.
"""

from __future__ import annotations

from collections.abc import Iterable

from multidict import CIMultiDict, CIMultiDictProxy

from paychan.gateway.cashier import is_payment
from paychan.gateway.charging import Charged
from paychan.protocol.saidprice import OVERRIDES_HEADER, PRICE_HEADER

CHANNEL_HEADER, CHARGED_HEADER, CREDIT_HEADER = "X-Paychan-Channel", "X-Paychan-Charged", "X-Paychan-Credit"
"""Fields of a paid request for the upstream: channel, satoshi charged, satoshi of credit left."""

_OF_ONE_CONNECTION = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
    | {"proxy-authenticate", "proxy-authorization", "proxy-authentication-info", "http2-settings"}
)

_OF_PAYERS = frozenset({"payment-signature", "payment-authorization", "accept-payment", "expect", "host"})
_OF_SELLERS = frozenset(
    {"payment-required", "payment-response", "payment-receipt", OVERRIDES_HEADER.lower(), PRICE_HEADER.lower()}
)
_OWN_PREFIX = "x-paychan-"
_TRUSTED = frozenset({"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded", "content-length"})
"""Fields that the gateway writes or replaces by these names."""

_NOT_UPSTREAM, _NOT_TO_PAYER = _OF_ONE_CONNECTION | _OF_PAYERS, _OF_ONE_CONNECTION | _OF_SELLERS


def to_upstream(headers: CIMultiDictProxy[str], paid: Charged | None) -> CIMultiDict[str]:
    """Return the fields of a request for the upstream; `paid` is the charge, None on a free path.

    `Host`, `X-Forwarded-*` and `Forwarded` are the caller's business.
    """
    dropped = _with_named(_NOT_UPSTREAM, headers)
    kept: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        lower = _as_applications_read(name)
        if lower in dropped or lower.startswith(_OWN_PREFIX) or (lower == "authorization" and is_payment(value)):
            continue
        if "_" in name and lower in _TRUSTED:
            continue
        kept.add(name, value)
    if paid is not None:
        kept[CHANNEL_HEADER] = str(paid.outpoint)
        kept[CHARGED_HEADER] = str(paid.charged_sat)
        kept[CREDIT_HEADER] = str(paid.channel.credit_sat)
    return kept


def to_payer(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return the fields of the upstream's answer for the payer."""
    dropped = _with_named(_NOT_TO_PAYER, headers)
    if "Transfer-Encoding" in headers:
        dropped |= {"content-length"}  # RFC 9112, 6.3: the coding overrides it
    kept: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        lower = name.lower()
        if lower not in dropped and not lower.startswith(_OWN_PREFIX):
            kept.add(name, value)
    return kept


def private(headers: CIMultiDict[str]) -> None:
    """Let no shared cache store the answer of a paid request; a stricter word of the upstream stays."""
    present = headers.get("Cache-Control", "").lower()
    if "no-store" not in present and "private" not in present:
        headers["Cache-Control"] = "private"


def _with_named(dropped: frozenset[str], headers: CIMultiDictProxy[str]) -> frozenset[str]:
    """Add the fields that `Connection` names as those of this connection."""
    values = headers.getall("Connection", None)
    return dropped if values is None else dropped.union(_tokens(values))


def _as_applications_read(name: str) -> str:
    """Return the name of a field as CGI, WSGI and PHP make it: there `X_Paychan_Credit` is `X-Paychan-Credit`."""
    return name.lower().replace("_", "-") if "_" in name else name.lower()


def _tokens(values: Iterable[str]) -> Iterable[str]:
    return (token.strip().lower() for value in values for token in value.split(","))
