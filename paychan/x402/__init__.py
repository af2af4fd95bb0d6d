"""Plug-ins for the stock x402 SDK: `pay_with` for a payer's client, `Seller` for a seller's middleware. Extra `x402`.

The SDK is loaded when one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paychan.x402.paying import ChannelScheme, own_binding, pay_with
    from paychan.x402.selling import Seller, SellingScheme

__all__ = ["ChannelScheme", "Seller", "SellingScheme", "own_binding", "pay_with"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from paychan.x402 import paying, selling

    return getattr(selling if name.startswith("Sell") else paying, name)
