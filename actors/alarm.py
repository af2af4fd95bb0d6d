"""Alarms for the operator: kind, text, and the channel concerned, if it is about one."""

from __future__ import annotations

from enum import Enum

from msgspec import Struct

from paychan.protocol.types import OutPoint


class Kind(Enum):
    """Kinds of alarms; the value is the word that `/health` and `paychan status` show."""

    CLOCK = "clock"  # wall clock and newest block contradict each other
    CHAIN = "chain"  # the node does not answer, or its newest block is old
    NODE = "node"  # the node lacks a feature; the server works without it
    SIGNER = "signer"  # the signer is away, can't write, or is short of disk space
    WATCHER = "watcher"  # a scan of the watcher failed
    TASK = "task"  # the server restarted one of its long-lived tasks, or the task makes no progress
    STORE = "store"  # records can't be read, were rebuilt from what could be read, or are missing
    DISK = "disk"  # the disk is nearly full
    MEMORY = "memory"  # memory is nearly used up: new connections and channels are refused
    LOG = "log"  # the server loses lines of its log
    UNSIGNED = "unsigned"  # a settlement could not be signed for some time
    LATE = "late"  # received value is not settled although expiry is near
    PINNED = "pinned"  # transactions that others attached to a settlement make its replacement too expensive
    # a settlement past its deadline costs more than settlement.max_fee_percent, or the relay minimum is above the cap
    FEE = "fee"
    APPLICATION = "application"  # the operator's application gives no valid answers
    LOST = "lost"  # a transaction of another party spent the funding output

    @property
    def is_critical(self) -> bool:
        """Whether coins are in danger, or may soon be, until the operator acts; the other kinds are warnings."""
        return self in _CRITICAL


_CRITICAL = frozenset(
    (Kind.CHAIN, Kind.CLOCK, Kind.LATE, Kind.SIGNER, Kind.STORE, Kind.TASK, Kind.UNSIGNED, Kind.WATCHER)
)


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
