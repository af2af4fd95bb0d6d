"""Places for payment streams.

A stream has a place only once its client has named the channel's secret. Streams that have not yet are in a waiting room:
it is small, the time in it is short, and when it is full the oldest stream of the address that has most in it leaves.

Places are bounded for each channel and for the server. A channel that opens more than its share loses the stream of its own
that has paid nothing for the longest. A full server gives a newcomer the place of the stream that has paid nothing for the
longest, if that is long ago; otherwise it refuses the newcomer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from time import monotonic
from typing import Protocol

from paychan.api.budgets.penalty import Penalty
from paychan.api.budgets.turns import Allowance
from paychan.protocol.errors import PaychanError, StreamReplaced, TooManyBadSignatures, TooManyStreams, UnknownChannel
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.payment_frames import MAX_FRAME_PAYMENTS

WAITING_ROOM = 32
"""Streams without a secret."""

WAITING_SECONDS = 5.0
"""Time for the first message."""

IDLE_SECONDS = 60.0
"""A stream that paid nothing for this time leaves a full house to others; its client opens another when it pays."""

_MANNERS_KEPT = 4096
"""Channels whose bad signatures, or payments of nothing, are remembered; of more the one whose last was longest ago is
forgotten."""

_MANNERS_SECONDS = 60.0
"""Bad signatures are forgotten when none came for this time."""

EMPTY_PAYMENTS, _EMPTY_A_SECOND = 2 * MAX_FRAME_PAYMENTS, 100
"""Payments of a channel that bring nothing. A client whose stream was lost may send all again that was not answered."""

_MOST_WAIT_SECONDS = 1.0


class Placed(Protocol):
    """A stream, as far as its place goes."""

    @property
    def address(self) -> str:
        """Of the client."""

    @property
    def paid_at(self) -> float:
        """Monotonic time of its newest payment, or of its beginning."""

    @property
    def is_busy(self) -> bool:
        """Whether payments of it have no answer yet."""

    @property
    def is_gone(self) -> bool:
        """Whether its connection has ended."""

    def close(self, code: int, reason: str) -> None:
        """Begin to close."""

    def end(self, error: PaychanError) -> None:
        """Begin to close with the code of an error."""

    def abort(self) -> None:
        """End the connection now."""

    def finish(self) -> None:
        """Read nothing more, and answer what was read."""


class Places:
    """Which streams there are."""

    def __init__(self, most: int, most_of_channel: int, max_bad_signatures: int) -> None:
        self._most, self._most_of_channel = most, most_of_channel
        self._max_bad_signatures = max_bad_signatures
        self._waiting: dict[Placed, None] = {}
        self._placed: dict[Placed, OutPoint] = {}
        self._channels: dict[OutPoint, list[Placed]] = {}
        self._manners: dict[OutPoint, tuple[Penalty, float]] = {}
        self._allowances: dict[OutPoint, Allowance] = {}
        """For payments that bring nothing, of channels that had some."""
        self._stops = False

    def __len__(self) -> int:
        return len(self._placed)

    @property
    def all(self) -> list[Placed]:
        """Every stream, with a place or waiting."""
        return [*self._placed, *self._waiting]

    def wait(self, stream: Placed) -> None:
        """Let a stream wait for its secret."""
        if len(self._waiting) >= WAITING_ROOM:
            crowd = Counter(each.address for each in self._waiting).most_common(1)[0][0]
            next(each for each in self._waiting if each.address == crowd).end(UnknownChannel())
        self._waiting[stream] = None
        if self._stops:
            stream.finish()

    def take(self, stream: Placed, outpoint: OutPoint) -> None:
        """Give a stream a place; its client knows the secret of that channel.

        Raises:
            TooManyStreams: all places are taken by streams that pay.
        """
        own = self._channels.get(outpoint, ())
        if own and len(own) >= self._most_of_channel:
            _idlest(own).end(StreamReplaced(got=len(own) + 1, limit=self._most_of_channel))
        elif len(self._placed) >= self._most:
            idlest = _idlest(self._placed) if self._placed else None
            if idlest is None or idlest.is_busy or monotonic() - idlest.paid_at < IDLE_SECONDS:
                raise TooManyStreams(limit=self._most)
            idlest.end(StreamReplaced(got=len(self._placed) + 1, limit=self._most))
        self._waiting.pop(stream, None)
        self._placed[stream] = outpoint
        self._channels.setdefault(outpoint, []).append(stream)
        if self._stops:
            stream.finish()

    def leave(self, stream: Placed) -> None:
        """Take a stream's place back, if it has one."""
        self._waiting.pop(stream, None)
        outpoint = self._placed.pop(stream, None)
        if outpoint is not None:
            own = self._channels[outpoint]
            own.remove(stream)
            if not own:
                del self._channels[outpoint]

    def stop(self) -> None:
        """The server stops: no stream, present or to come, is read any more, or one that pays on would hold it up."""
        self._stops = True
        for stream in self.all:
            stream.finish()

    # --- bad signatures ---------------------------------------------------------------------------------------------

    def bad_signature(self, outpoint: OutPoint) -> float:
        """Count one that came over a channel's streams; return for how many seconds this channel's streams have to wait.

        Only clients that know the channel's secret can have sent it. The count outlives its streams for some time, so that
        a new stream does not begin anew.
        """
        now = monotonic()
        manners, last = self._manners.pop(outpoint, (None, now))
        if manners is None or now - last > _MANNERS_SECONDS:
            manners = Penalty(self._max_bad_signatures)
        if len(self._manners) >= _MANNERS_KEPT:
            del self._manners[next(iter(self._manners))]
        self._manners[outpoint] = manners, now
        return manners.bad_signature()

    def problem(self, outpoint: OutPoint) -> TooManyBadSignatures | None:
        """Return why no payment over this channel's streams is looked at for now, or None."""
        manners, last = self._manners.get(outpoint, (None, 0.0))
        if manners is None or monotonic() - last > _MANNERS_SECONDS:
            return None
        return manners.problem()

    # --- payments that bring nothing --------------------------------------------------------------------------------

    def count(self, outpoint: OutPoint, empty: int, full: int) -> float:
        """Count payments that brought nothing, and others; return for how many seconds this channel's streams have to wait.

        Each costs the server as much as one that pays. There are so many for nothing, then so many a second, and one more
        for each payment that brought something.
        """
        allowance = self._allowances.get(outpoint)
        if allowance is None:
            if not empty:
                return 0.0
            allowance = Allowance(EMPTY_PAYMENTS, _EMPTY_A_SECOND, monotonic())
        else:
            del self._allowances[outpoint]
        if len(self._allowances) >= _MANNERS_KEPT:
            del self._allowances[next(iter(self._allowances))]
        self._allowances[outpoint] = allowance
        allowance.earn(full)
        return allowance.wait_seconds(empty, _MOST_WAIT_SECONDS, monotonic())


def _idlest(streams: Collection[Placed]) -> Placed:
    return min(streams, key=lambda each: (each.is_busy, each.paid_at))
