"""Plug-ins for pympp, the stock SDK of MPP: `pay_with` for a payer's client, `Seller` for a server. Extra `mpp`.

The SDK is loaded when one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paychan.mpp.paying import ChannelPayments, pay_with

__all__ = ["ChannelPayments", "pay_with"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from paychan.mpp import paying

    return getattr(paying, name)
