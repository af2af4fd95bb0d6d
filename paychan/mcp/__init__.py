"""Paid tools for MCP: `PaidTools` for a server of the stock SDK, `PaidSession` for a client. Extra `mcp`.

The SDK is loaded when one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paychan.mcp.paying import PaidSession
    from paychan.mcp.selling import PaidTools

__all__ = ["PaidSession", "PaidTools"]


def __getattr__(name: str) -> Any:
    if name == "PaidSession":
        from paychan.mcp.paying import PaidSession

        return PaidSession
    if name == "PaidTools":
        from paychan.mcp.selling import PaidTools

        return PaidTools
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
