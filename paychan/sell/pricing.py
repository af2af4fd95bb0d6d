"""`@priced` and `charge` for handlers: they find the request that is being served by a context variable.

A refused request leaves the handler by `PaymentDue`, which the middleware answers. It derives from `BaseException`, so a
framework neither logs it nor makes an error page of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import msgspec

from paychan.protocol.wire.merchant import Unit
from paychan.sell.exchange import Exchange
from paychan.sell.requests import Price, Priced, price_of

_Handler = TypeVar("_Handler", bound=Callable[..., Any])


class PaymentDue(BaseException):
    """The request is not paid; the middleware has the answer."""


class Sold:
    """The payment of a request, as handlers see it: also `scope["paychan"]` and `environ["paychan"]`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @property
    def channel(self) -> str:
        """The payer's channel, `txid:vout`; "" for a request that was not paid."""
        charged = self._exchange.charged
        return "" if charged is None else charged.channel

    @property
    def charged_sat(self) -> int:
        charged = self._exchange.charged
        return 0 if charged is None else charged.charged_sat

    @property
    def credit_sat(self) -> int:
        """Credit that the channel has after this charge."""
        charged = self._exchange.charged
        return 0 if charged is None else charged.credit_sat


class Visit(Protocol):
    """A request that a middleware serves."""

    exchange: Exchange

    def pay(self, price: Price) -> None:
        """Charge the request; raises `PaymentDue`. Called on a thread of its own."""

    async def pay_async(self, price: Price) -> None:
        """Charge the request; raises `PaymentDue`."""


current: ContextVar[Visit | None] = ContextVar("paychan.sell.current", default=None)


def priced(
    price: Priced | None = None,
    *,
    ceiling: int | None = None,
    unit: Unit = "request",
    realm: str = "",
    description: str = "",
    mime_type: str = "",
) -> Callable[[_Handler], _Handler]:
    """Put a price on a handler, which may be a coroutine function. Write it below the framework's own decorator.

    Args:
        price: satoshi, a `Price`, or a function of the `Request` that returns either.
        ceiling: instead of `price`: the highest price; the handler says the real one by `charge`.
        unit: word for that which is sold, as in `Price`.
        realm: name of the service; "": the host of the request.
        description: one sentence for payers.
        mime_type: type of the answers.

    Raises:
        TypeError: neither or both of `price` and `ceiling`.
    """
    if (price is None) == (ceiling is None):
        msg = "priced: want either a price or a ceiling"
        raise TypeError(msg)

    def found(arguments: dict[str, Any]) -> Price:
        visit = _visit("priced")
        request = msgspec.structs.replace(visit.exchange.request, arguments=arguments)
        chosen = price_of(price if price is not None else Price(ceiling or 0, is_ceiling=True), request)
        if isinstance(price, Price):
            return chosen
        return msgspec.structs.replace(
            chosen,
            unit=chosen.unit if unit == "request" else unit,
            realm=chosen.realm or realm,
            description=chosen.description or description,
            mime_type=chosen.mime_type or mime_type,
        )

    def decorate(handler: _Handler) -> _Handler:
        if inspect.iscoroutinefunction(handler):

            @functools.wraps(handler)
            async def coroutine(*args: Any, **kwargs: Any) -> Any:
                await _visit("priced").pay_async(found(kwargs))
                return await handler(*args, **kwargs)

            return coroutine  # type: ignore[return-value] # the same signature

        @functools.wraps(handler)
        def function(*args: Any, **kwargs: Any) -> Any:
            _visit("priced").pay(found(kwargs))
            return handler(*args, **kwargs)

        return function  # type: ignore[return-value] # the same signature

    return decorate


def charge(actual_sat: int) -> None:
    """Say in a handler what its request costs, before the answer begins: the rest of the price is credit again.

    Raises:
        ValueError: more than the price to which the payer agreed, or less than 0.
        RuntimeError: the request has no price.
    """
    _visit("charge").exchange.say(actual_sat)


def sold() -> Sold:
    """Return what was paid for the request that is being served. Raises `RuntimeError`: no middleware serves it."""
    return Sold(_visit("sold").exchange)


def _visit(caller: str) -> Visit:
    visit = current.get()
    if visit is None:
        msg = f"{caller}: no Paywall serves this request: add the middleware; a WebSocket has no price"
        raise RuntimeError(msg)
    return visit
