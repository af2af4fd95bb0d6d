"""Exposure: the unconfirmed funding of channels that are open or being opened. It could vanish, so it has a limit.

An output counts once, even if several requests try to open it. It counts while one of two things holds it: a
`Reservation`, which belongs to one opening and which only that opening can end; or the mark that a channel is open on
the output, which the chain watch sets and removes as blocks come and go. So a scan of the chain never drops an output
whose channel is still being stored, and a refused request never drops the output of another request that was accepted.
"""

from __future__ import annotations

from collections.abc import Collection

from paychan.protocol.errors import TooMuchUnconfirmed
from paychan.protocol.types import OutPoint, Sat


class _Entry:
    """One output: its value, the number of openings that hold it, and whether a channel is open on it."""

    __slots__ = ("is_open", "reservations", "value_sat")

    def __init__(self, value_sat: Sat) -> None:
        self.value_sat = value_sat
        self.reservations = 0
        self.is_open = False


class Reservation:
    """One opening's part of the limit. Its owner ends it by `opened` or `release`; a second call has no effect."""

    __slots__ = ("_exposure", "_outpoint", "_over")

    def __init__(self, exposure: Exposure, outpoint: OutPoint) -> None:
        self._exposure, self._outpoint, self._over = exposure, outpoint, False

    def opened(self) -> None:
        """Note that the channel is stored: from now on the chain watch decides how long its output counts."""
        if not self._over:
            self._exposure.mark_open(self._outpoint)
        self.release()

    def release(self) -> None:
        """Note that the opening ended: the output no longer counts, unless something else holds it."""
        if not self._over:
            self._over = True
            self._exposure.let_go(self._outpoint)


class Exposure:
    """The outputs that count, and their sum. Call it only on the event loop."""

    def __init__(self, limit_sat: Sat = Sat(0)) -> None:
        self._limit_sat = limit_sat
        self._entries: dict[OutPoint, _Entry] = {}
        self._sum_sat = 0

    @property
    def is_allowed(self) -> bool:
        """Whether any channel may be open without a confirmation."""
        return self._limit_sat > 0

    @property
    def sum_sat(self) -> Sat:
        """Value of all outputs that are reserved or open."""
        return Sat(self._sum_sat)

    @property
    def open(self) -> Collection[OutPoint]:
        """Outputs on which a channel is open."""
        return [outpoint for outpoint, entry in self._entries.items() if entry.is_open]

    def problem(self, outpoint: OutPoint, value_sat: Sat) -> TooMuchUnconfirmed | None:
        """Return why there is no room for an output now."""
        sum_sat = self._sum_sat + (0 if outpoint in self._entries else value_sat)
        return TooMuchUnconfirmed(got_sat=sum_sat, need_sat=self._limit_sat) if sum_sat > self._limit_sat else None

    def reserve(self, outpoint: OutPoint, value_sat: Sat) -> Reservation | TooMuchUnconfirmed:
        """Reserve room for an opening, or return the refusal if that would exceed the limit."""
        problem = self.problem(outpoint, value_sat)
        if problem is not None:
            return problem
        self._entry(outpoint, value_sat).reservations += 1
        return Reservation(self, outpoint)

    def note_open(self, outpoint: OutPoint, value_sat: Sat) -> None:
        """Count the output of an open channel, which the chain shows unconfirmed, even above the limit."""
        self._entry(outpoint, value_sat).is_open = True

    def note_safe(self, outpoint: OutPoint) -> None:
        """Stop counting an output that the chain shows confirmed or permanently gone, unless an opening holds it."""
        entry = self._entries.get(outpoint)
        if entry is not None:
            entry.is_open = False
            self._drop_unheld(outpoint, entry)

    def mark_open(self, outpoint: OutPoint) -> None:
        """Mark the output as open. Only for `Reservation`."""
        self._entries[outpoint].is_open = True

    def let_go(self, outpoint: OutPoint) -> None:
        """End one reservation. Only for `Reservation`."""
        entry = self._entries[outpoint]
        entry.reservations -= 1
        self._drop_unheld(outpoint, entry)

    def _entry(self, outpoint: OutPoint, value_sat: Sat) -> _Entry:
        entry = self._entries.get(outpoint)
        if entry is None:
            entry = self._entries[outpoint] = _Entry(value_sat)
            self._sum_sat += value_sat
        return entry

    def _drop_unheld(self, outpoint: OutPoint, entry: _Entry) -> None:
        if not entry.reservations and not entry.is_open:
            del self._entries[outpoint]
            self._sum_sat -= entry.value_sat
