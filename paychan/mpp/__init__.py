"""Plug-ins for pympp, the stock SDK of MPP: `pay_with` for a payer's client, `ChannelSales` for a server. Extra `mpp`.

The SDK is loaded when one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paychan.mpp.paying import ChannelPayments, pay_with
    from paychan.mpp.selling import ChannelSales

__all__ = ["ChannelPayments", "ChannelSales", "pay_with"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    if name == "ChannelSales":
        from paychan.mpp import selling

        return selling.ChannelSales
    from paychan.mpp import paying

    return getattr(paying, name)
