"""Slots for payment streams.

A stream gets a slot only when its client has named the channel's secret. Until then the stream is in a waiting room,
which is small and has a short timeout. If the waiting room is full, the address with the most streams in it loses its
oldest one.

The number of slots is limited for each channel and for the server. If a channel opens more streams than its limit, its
stream with the oldest payment is closed. If all slots of the server are in use, a new stream replaces the stream with
the oldest payment if that stream has been idle for `IDLE_SECONDS`; otherwise the new stream is refused.
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
"""Streams whose client has not named the secret."""

WAITING_SECONDS = 5.0
"""Timeout of the first message."""

IDLE_SECONDS = 60.0
"""If all slots are in use, a stream without a payment for this time can be replaced; its client opens a new one."""

_MOST_PENALTIES = 4096
"""Size of the tables of channels with bad signatures and with payments of no value; the oldest entry is dropped."""

_PENALTY_SECONDS = 60.0
"""The bad signatures of a channel are forgotten when none arrived for this time."""

EMPTY_PAYMENTS, _EMPTY_A_SECOND = 2 * MAX_FRAME_PAYMENTS, 100
"""Payments of no value per channel: a burst, then a number per second. After a lost stream a client may repeat all
payments that were not answered."""

_MOST_WAIT_SECONDS = 1.0


class SlottedStream(Protocol):
    """A stream as its slot sees it."""

    @property
    def address(self) -> str:
        """Address of the client."""

    @property
    def paid_at(self) -> float:
        """Monotonic time of its newest payment, or of its start."""

    @property
    def is_busy(self) -> bool:
        """Whether some of its payments have no answer yet."""

    @property
    def is_gone(self) -> bool:
        """Whether its connection has ended."""

    def close(self, code: int, reason: str) -> None:
        """Begin to close, with a close code."""

    def end(self, error: PaychanError) -> None:
        """Begin to close with the code of an error."""

    def abort(self) -> None:
        """End the connection now."""

    def finish(self) -> None:
        """Read nothing more; answer the payments that were read."""


class StreamSlots:
    """All streams of the server, with their slots."""

    def __init__(self, most: int, most_of_channel: int, max_bad_signatures: int) -> None:
        self._most, self._most_of_channel = most, most_of_channel
        self._max_bad_signatures = max_bad_signatures
        self._waiting: dict[SlottedStream, None] = {}
        self._placed: dict[SlottedStream, OutPoint] = {}
        self._channels: dict[OutPoint, list[SlottedStream]] = {}
        self._penalties: dict[OutPoint, tuple[Penalty, float]] = {}
        self.allowances: dict[OutPoint, Allowance] = {}
        """For payments of no value, of channels that sent some."""
        self._stops = False

    def __len__(self) -> int:
        return len(self._placed)

    @property
    def all(self) -> list[SlottedStream]:
        """Every stream, with a slot or in the waiting room."""
        return [*self._placed, *self._waiting]

    def wait(self, stream: SlottedStream) -> None:
        """Put a stream into the waiting room."""
        if len(self._waiting) >= WAITING_ROOM:
            crowd = Counter(each.address for each in self._waiting).most_common(1)[0][0]
            next(each for each in self._waiting if each.address == crowd).end(UnknownChannel())
        self._waiting[stream] = None
        if self._stops:
            stream.finish()

    def take(self, stream: SlottedStream, outpoint: OutPoint) -> None:
        """Give a stream a slot; its client has named the secret of that channel.

        Raises:
            TooManyStreams: all slots are in use, and no stream has been idle for `IDLE_SECONDS`.
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

    def leave(self, stream: SlottedStream) -> None:
        """Free a stream's slot, if it has one, or remove it from the waiting room."""
        self._waiting.pop(stream, None)
        outpoint = self._placed.pop(stream, None)
        if outpoint is not None:
            own = self._channels[outpoint]
            own.remove(stream)
            if not own:
                del self._channels[outpoint]

    def stop(self) -> None:
        """Stop reading all streams, also later ones.

        Otherwise a stream that keeps paying would delay the server's stop.
        """
        self._stops = True
        for stream in self.all:
            stream.finish()

    # --- bad signatures ---------------------------------------------------------------------------------------------

    def bad_signature(self, outpoint: OutPoint) -> float:
        """Count a bad signature on a channel's streams; return the delay of this channel's streams in seconds.

        Only clients that know the channel's secret can have sent it. The count outlives a stream for
        `_PENALTY_SECONDS`, so that a new stream does not reset it.
        """
        now = monotonic()
        penalty, last = self._penalties.pop(outpoint, (None, now))
        if penalty is None or now - last > _PENALTY_SECONDS:
            penalty = Penalty(self._max_bad_signatures)
        if len(self._penalties) >= _MOST_PENALTIES:
            del self._penalties[next(iter(self._penalties))]
        self._penalties[outpoint] = penalty, now
        return penalty.bad_signature()

    def problem(self, outpoint: OutPoint) -> TooManyBadSignatures | None:
        """Return why payments on this channel's streams are refused at present, or None."""
        penalty, last = self._penalties.get(outpoint, (None, 0.0))
        if penalty is None or monotonic() - last > _PENALTY_SECONDS:
            return None
        return penalty.problem()

    # --- payments of no value ---------------------------------------------------------------------------------------

    def count(self, outpoint: OutPoint, empty: int, full: int) -> float:
        """Count payments of no value (`empty`) and others (`full`); return the delay of its streams in seconds.

        A payment of no value costs the server as much as any other. A channel has a burst of `EMPTY_PAYMENTS`, then
        `_EMPTY_A_SECOND`, and one more for each payment of some value.
        """
        allowance = self.allowances.get(outpoint)
        if allowance is None:
            if not empty:
                return 0.0
            allowance = Allowance(EMPTY_PAYMENTS, _EMPTY_A_SECOND, monotonic())
        else:
            del self.allowances[outpoint]
        if len(self.allowances) >= _MOST_PENALTIES:
            del self.allowances[next(iter(self.allowances))]
        self.allowances[outpoint] = allowance
        allowance.earn(full)
        return allowance.wait_seconds(empty, _MOST_WAIT_SECONDS, monotonic())


def _idlest(streams: Collection[SlottedStream]) -> SlottedStream:
    return min(streams, key=lambda each: (each.is_busy, each.paid_at))
