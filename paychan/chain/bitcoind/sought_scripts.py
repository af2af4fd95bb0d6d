"""Scripts that may be paid, and the outputs that were seen to pay to them: in memory, bounded, lost at the end.

A server gives an address to every client that requests one. It stores only an entry here for each: a new entry replaces
the least recently used one. A scan of all unspent outputs finds the data of a lost entry again.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable

from paychan.protocol.types import OutPoint

MOST_OUTPUTS = 100
"""Most outputs of one address that are read, the most valuable first: dust sent there must not keep the node busy."""

MOST_SCRIPTS = 20_000
"""Entries; each takes about 500 bytes."""

_PAY_TO_SCRIPT_HASH = re.compile(r"(?=(a914[0-9a-f]{40}87))")
"""BIP16: OP_HASH160 [20-byte-hash-value] OP_EQUAL, in hex. A look-ahead, so that matches may overlap."""


class Sought:
    """One script, in hex."""

    __slots__ = ("is_complete", "outpoints", "script")

    def __init__(self, script: str) -> None:
        self.script = script
        self.outpoints: OrderedDict[OutPoint, None] = OrderedDict()
        self.is_complete = False
        """Whether a scan has listed the outputs that existed before this entry."""

    def add(self, outpoints: Iterable[OutPoint]) -> None:
        """Add outputs; beyond the limit the newest stay, because the payer could have opened with the older ones before."""
        for outpoint in outpoints:
            self.outpoints[outpoint] = None
        while len(self.outpoints) > 2 * MOST_OUTPUTS:
            self.outpoints.popitem(last=False)


class SoughtScripts:
    """All entries, by script in hex."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, Sought] = OrderedDict()
        self._unpaid: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, script: str) -> Sought:
        """Return the entry of a script, or a new one.

        When the table is full, an entry without a payment is removed first.
        """
        found = self._entries.get(script)
        if found is None:
            if len(self._entries) >= MOST_SCRIPTS:
                oldest = next(iter(self._unpaid), None) or next(iter(self._entries))
                self._unpaid.pop(oldest, None)
                del self._entries[oldest]
            found = self._entries[script] = Sought(script)
            self._unpaid[script] = None
        self._entries.move_to_end(script)
        if found.outpoints:
            self._unpaid.pop(script, None)
        else:
            self._unpaid.move_to_end(script)
        return found

    def drop(self, script: str) -> None:
        """Remove a script: the node follows it now."""
        self._entries.pop(script, None)
        self._unpaid.pop(script, None)

    def note(self, script: str, outpoints: Iterable[OutPoint]) -> None:
        """Add outputs that were seen to pay to a script, if it is sought."""
        entry = self._entries.get(script)
        if entry is not None:
            entry.add(outpoints)
            self._unpaid.pop(script, None)

    def named_in(self, serialized: str) -> bool:
        """Return whether a sought script occurs anywhere in a serialized transaction or block, in hex: a hint, not a parse."""
        return any(match[1] in self._entries for match in _PAY_TO_SCRIPT_HASH.finditer(serialized))

    def doubt_all(self) -> None:
        """Mark all entries as incomplete, because blocks were missed."""
        for entry in self._entries.values():
            entry.is_complete = False
