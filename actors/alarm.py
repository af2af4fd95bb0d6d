"""What needs the operator, as one value: of which kind, in words, and which channel it concerns."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import Enum

from msgspec import Struct

from paychan.protocol.types import OutPoint, UnixTime


class Kind(Enum):
    """Kinds of alarms, by the word that `/health` and `paychan status` show."""

    CLOCK = "clock"  # wall clock and newest block contradict each other
    CHAIN = "chain"  # the node can't be asked, or its newest block is old
    NODE = "node"  # the node lacks something, which is done without
    SIGNER = "signer"  # the signer is away, can't write, or is short of room
    WATCHER = "watcher"  # a look failed
    TASK = "task"  # a long-lived task of the server was started again, or does nothing
    DISK = "disk"  # the disk is nearly full
    LOG = "log"  # lines of the log are being lost
    UNSIGNED = "unsigned"  # a settlement could not be signed for some time
    LATE = "late"  # received value that is not settled although expiry is near
    PINNED = "pinned"  # what others attached to a settlement makes its replacement too expensive
    FEE = (
        "fee"  # a settlement past its deadline costs more than settlement.max_fee_percent, or more than the rate's cap
    )
    LOST = "lost"  # something else spent the funding output


class Alarm(Struct, frozen=True):
    """One alarm; `channel` is a funding outpoint, or empty."""

    kind: Kind
    text: str
    channel: str = ""

    @property
    def shown(self) -> dict[str, str]:
        """As `/health` shows it."""
        return {"kind": self.kind.value, "text": self.text, "channel": self.channel}


def about(kind: Kind, outpoint: OutPoint, text: str) -> Alarm:
    """Make an alarm that concerns one channel."""
    return Alarm(kind, text, str(outpoint))


def utc(moment: UnixTime) -> str:
    """Show a time for an operator, in UTC; a clock may say anything."""
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return f"{moment} (Unix time)"
