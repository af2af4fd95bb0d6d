"""Paid requests: what a channel's record remembers of them, and the commands for them. `credit` has the rules."""

from __future__ import annotations

from msgspec import Struct

from paychan.protocol.payment import Payment
from paychan.protocol.types import Sat, UnixTime


class Delivery(Struct, frozen=True, array_like=True):
    """A paid request: what it was charged, in satoshi, and when; see `credit`."""

    request: bytes
    """Its id, 16 bytes (`request_id`)."""
    charged_sat: Sat
    at: UnixTime
    """Time of its last charge."""
    is_done: bool = False
    """Whether the answer has begun to leave; until then the charge may have to be released."""


class Charge(Struct, frozen=True):
    """A request is charged `total_sat` in all; `payment` comes with it, or the credit covers the price."""

    request: bytes
    total_sat: Sat
    payment: Payment | None = None
    done: frozenset[bytes] = frozenset()
    """Requests whose answers have begun to leave since the last charge."""


class Release(Struct, frozen=True):
    """A request costs `to_sat` only, because less or nothing was delivered; the rest is credit again."""

    request: bytes
    to_sat: Sat = Sat(0)


class Delivered(Struct, frozen=True):
    """The answers of these requests have begun to leave; their charges are final."""

    requests: frozenset[bytes]
