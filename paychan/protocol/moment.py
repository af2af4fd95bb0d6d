"""Trust in the wall clock.

The chain decides when a refund becomes valid: by the median time past (MTP) of its newest block (BIP113). The wall
clock runs ahead of the MTP, but the clock of a machine may be wrong by days: at start, for a second, or permanently. So
there are three times:

    refusing   the later of wall clock and MTP. The server refuses requests by it; a client can ask again.
    acting     the same while a witness agrees with the wall clock; else MTP alone. The server closes channels by it.
    paying     the later of both, but at most `LEAD_SECONDS` past MTP. Fee rates rise by it.

Two witnesses can agree with the wall clock. The first is the newest block: the clock leads it by at most
`LEAD_SECONDS`. The second, while no block comes, is the steady clock: since the wall clock last agreed with a block, it
ran ahead of the steady clock by at most `STEP_SECONDS`. So a gap of many hours between two blocks delays nothing. The
steady clock of a suspended machine may stop: then the node's next blocks agree. Acting by MTP alone is never too late
for the chain: the refund needs MTP to pass the expiry, and payments end a whole settlement period before that.

A clock that is behind has no effect: MTP is the later one.
"""

from __future__ import annotations

from msgspec import Struct

from paychan.protocol.types import UnixTime

LEAD_SECONDS = 7200
"""Nodes accept blocks up to two hours ahead of their clock, and a gap of two hours between two blocks is rare."""

STEP_SECONDS = 600
"""Corrections of a running clock are smaller; a larger step needs a block that agrees."""


class Reading(Struct, frozen=True):
    """Wall clock (Unix seconds) and steady clock (seconds since an arbitrary moment), read together."""

    wall: UnixTime
    steady: float


def leads(wall: UnixTime, block_time: UnixTime) -> bool:
    """Say whether the wall clock leads the newest block by more than a late block explains."""
    return wall - block_time > LEAD_SECONDS


def stepped(reading: Reading, earlier: Reading) -> bool:
    """Say whether the wall clock ran ahead of the steady clock since an earlier reading."""
    return reading.wall - earlier.wall > reading.steady - earlier.steady + STEP_SECONDS


def is_believed(reading: Reading, block_time: UnixTime, agreed: Reading | None) -> bool:
    """Say whether a witness agrees with the wall clock; `agreed` is the last reading that a block agreed with."""
    return not leads(reading.wall, block_time) or (agreed is not None and not stepped(reading, agreed))


def paying_time(now: UnixTime, median_time: UnixTime | None) -> UnixTime:
    """Return the time by which fee rates rise; without a chain there is only `now`."""
    return now if median_time is None else min(now, UnixTime(median_time + LEAD_SECONDS))
