"""The life of one sold request as steps: reserve the price, deliver, charge the real cost or give the price back.

The steps are generators of messages to the server: `link.drive` and `link.drive_async` send them. An `Exchange` knows no
framework and no socket.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Generator
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from paychan.protocol.saidprice import said_price
from paychan.protocol.types import Sat
from paychan.protocol.wire import merchant as wire
from paychan.sell.requests import Headers, Price, Request, for_payer, is_payment, said

log = logging.getLogger("paychan.sell")

_RETRY_AFTER_SECONDS = "5"


class ServerAway(Exception):
    """The paychan server gave no answer, or refused the program's own request."""


class Send(Struct, frozen=True):
    """Send a message to the server; the answer is a `wire.Reply`, or None."""

    path: str
    message: wire.Ask | wire.Release | wire.Done


Steps: TypeAlias = Generator[Send, wire.Reply | None, Any]


class Rules(Struct, frozen=True):
    """The seller's choices for all requests."""

    gives_back: Callable[[int], bool]
    """Whether an answer with this status gives the price back."""
    free_when_away: bool
    """Whether requests are served for nothing while the server is away."""


class Exchange:
    """One request. `headers` are `requests.told` of it."""

    def __init__(self, rules: Rules, request: Request, headers: tuple[tuple[str, str], ...]) -> None:
        self.request = request
        self.answer: wire.Ready | None = None
        """Answer for the payer instead of the handler's."""
        self.charged: wire.Charged | None = None
        """The newest charge of the request."""
        self.ceiling_sat = 0
        self.actual_sat: int | None = None
        """Sum that the handler said by `charge`."""
        self._rules, self._headers = rules, headers
        self._visit = secrets.token_hex(8)
        self._is_settled = self._is_over = False

    @property
    def brings_payment(self) -> bool:
        return any(is_payment(name, value) for name, value in self._headers)

    def pay(self, price: Price, body_sha256: str | None) -> Steps:
        """Charge the price, or set the answer. `body_sha256` is None if the body was not read."""
        if self.charged is not None or self.answer is not None:
            msg = "the request has a price already: put one price on a handler, or on the whole application"
            raise RuntimeError(msg)
        if price.sat == 0:
            return
        ask = wire.Ask(
            method=self.request.method,
            url=self.request.url,
            price_sat=price.sat,
            is_ceiling=price.is_ceiling,
            unit=price.unit,
            realm=price.realm,
            description=price.description,
            mime_type=price.mime_type,
            headers=self._headers,
            body_sha256=body_sha256,
            visit=self._visit,
        )
        self.ceiling_sat = price.sat
        try:
            reply = yield Send("/charge", ask)
        except ServerAway as error:
            log.warning("no payments: %s", error)
            self.answer = None if self._rules.free_when_away else _AWAY
            return
        if isinstance(reply, wire.Charged):
            self.charged = reply
        elif isinstance(reply, wire.Ready):
            self.answer = reply
        else:
            self.answer = _AWAY

    def say(self, actual_sat: int) -> None:
        """Note what the request costs. Raises `ValueError`: more than the agreed price, or less than 0."""
        if not 0 <= actual_sat <= self.ceiling_sat:
            msg = f"charge: got {actual_sat} sat, want 0 to {self.ceiling_sat} sat, to which the payer agreed"
            raise ValueError(msg)
        self.actual_sat = actual_sat

    def begin(self, status: int, headers: Headers) -> Steps:
        """Settle the price before the handler's answer leaves; return the headers of the answer."""
        if self.charged is None:
            return for_payer(headers)
        if not self._is_settled:
            self._is_settled = True
            if self._rules.gives_back(status):
                yield from self.give_back()
            else:
                yield from self._lower(headers)
        return for_payer(headers, self.charged.headers)

    def _lower(self, headers: Headers) -> Steps:
        assert self.charged is not None
        price, overrides = said(headers)
        amount = self.actual_sat
        if amount is None and (price is not None or overrides is not None):
            found = said_price(price, overrides, Sat(self.ceiling_sat))
            amount = found.amount_sat
            if found.trouble:
                log.warning("%s", found.trouble)
        if amount is not None and amount < self.charged.charged_sat:
            yield from self._release(amount)
        return None

    def give_back(self) -> Steps:
        """Make the whole price credit again, unless the answer has begun to leave."""
        if self.charged is not None and not self._is_over:
            self._is_settled = self._is_over = True
            yield from self._release(0)

    def _release(self, to_sat: int) -> Steps:
        """Lower the charge; if the server is away, the charge stays, and the payer may repeat the request."""
        assert self.charged is not None
        paid = self.charged
        message = wire.Release(
            channel=paid.channel, request=paid.request, to_sat=to_sat, way=paid.way, challenge=paid.challenge
        )
        for _ in range(2):
            try:
                reply = yield Send("/release", message)
            except ServerAway as error:
                log.warning("a charge of %s sat stays: %s", paid.charged_sat, error)
                continue
            if isinstance(reply, wire.Charged):
                self.charged = reply
            return

    def delivered(self) -> Steps:
        """Tell the server that the answer has begun to leave: the charge is final."""
        if self.charged is not None and not self._is_over:
            self._is_over = True
            try:
                yield Send("/done", wire.Done(channel=self.charged.channel, request=self.charged.request))
            except ServerAway as error:
                log.warning("the server does not know of a delivery: %s", error)


_AWAY = wire.Refused(
    status=503,
    headers=(
        ("Content-Type", "application/problem+json"),
        ("Cache-Control", "no-store"),
        ("Retry-After", _RETRY_AFTER_SECONDS),
        ("Access-Control-Allow-Origin", "*"),
    ),
    body=msgspec.json.encode(
        {
            "type": "about:blank",
            "title": "Service Unavailable",
            "status": 503,
            "detail": "payments can't be taken now, nothing was charged; try again later",
            "code": "payments_away",
        }
    ).decode(),
)
