"""Receipts: the paid requests of a wallet with the answers' receipts, from the lines of its spending log. It is pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct

from paychan.client.paying.account import Answered, Carried, Line, Paid


class PaidRequest(Struct, frozen=True):
    """A paid request and its answer; amounts in satoshi."""

    at: int
    """Unix time of the answer."""
    host: str
    """`host:port`, as requested."""
    method: str
    url: str
    status: int
    price_sat: int
    charged_sat: int
    channel: str
    """Outpoint of the channel, `txid:vout`."""
    receipt: str
    """`PAYMENT-RESPONSE` or `Payment-Receipt`, as received; "" if there was none."""


def paid_requests(lines: Iterable[Line]) -> Iterator[PaidRequest]:
    """Return the paid requests that were answered, the oldest first; each with its newest answer."""
    paid: dict[str, Paid] = {}
    for line in lines:
        match line:
            case Paid():
                paid[line.request] = line
            case Carried():
                paid |= {each.request: each for each in line.open}
            case Answered() if line.request in paid:
                asked = paid.pop(line.request)
                yield PaidRequest(
                    line.at,
                    asked.host,
                    asked.method,
                    asked.url,
                    line.status,
                    asked.price_sat,
                    line.charged_sat,
                    line.channel,
                    line.receipt,
                )
            case _:
                pass
