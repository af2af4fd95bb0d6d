"""A ledger of the signer's that forgets with the process, for tests that don't need a disk."""

from __future__ import annotations

import threading
from collections.abc import Collection

from paychan.protocol.types import OutPoint
from signer.signed import Entries


class MemoryLedger:
    """A `signer.ledger.Ledger`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entries: Entries = {}

    def read(self, outpoints: Collection[OutPoint]) -> Entries:
        return {outpoint: self.entries[outpoint] for outpoint in outpoints if outpoint in self.entries}

    def write(self, entries: Entries) -> None:
        self.entries.update(entries)
