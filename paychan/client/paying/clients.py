"""Clients that pay, in one call; each is that of its library, with all its settings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from paychan.client.paying.bodies import BUFFER_BYTES
from paychan.client.paying.budget import Budget
from paychan.client.paying.exchange import Purse

if TYPE_CHECKING:
    import httpx


def paid_client(
    budget: Budget | Purse,
    wallet: str | os.PathLike[str] | None = None,
    *,
    transport: httpx.BaseTransport | None = None,
    buffer_bytes: int = BUFFER_BYTES,
    **options: Any,
) -> httpx.Client:
    """Return an `httpx.Client` that pays a 402 within a budget: `paid_client(Budget(per_request=50)).get(url)`.

    Args:
        budget: the limits; or a `Purse`, which has more settings and may serve several clients.
        wallet: directory of the channels; default as for `Payer`. Not beside a `Purse`.
        transport: sends the requests; default: one that takes proxies from the environment.
        buffer_bytes: longest streamed body that is kept for the paid request.
        options: settings of `httpx.Client`.
    """
    import httpx

    from paychan.client.paying.httpx import PaidTransport

    paid = PaidTransport(_purse(budget, wallet), transport, buffer_bytes=buffer_bytes)
    return httpx.Client(transport=paid, **options)


def paid_async_client(
    budget: Budget | Purse,
    wallet: str | os.PathLike[str] | None = None,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    buffer_bytes: int = BUFFER_BYTES,
    **options: Any,
) -> httpx.AsyncClient:
    """Return an `httpx.AsyncClient`; otherwise as `paid_client`."""
    import httpx

    from paychan.client.paying.httpx import AsyncPaidTransport

    paid = AsyncPaidTransport(_purse(budget, wallet), transport, buffer_bytes=buffer_bytes)
    return httpx.AsyncClient(transport=paid, **options)


def _purse(budget: Budget | Purse, wallet: str | os.PathLike[str] | None) -> Purse:
    if isinstance(budget, Budget):
        return Purse(budget, wallet)
    if wallet is not None:
        msg = "a wallet beside a purse, which has one: give one of them"
        raise ValueError(msg)
    return budget
