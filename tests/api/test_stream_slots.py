"""Slots of streams, without a socket: which stream is replaced, and how long bad signatures count."""

from __future__ import annotations

from time import monotonic

import pytest

from paychan.api.budgets import stream_slots
from paychan.api.budgets.stream_slots import EMPTY_PAYMENTS, IDLE_SECONDS, WAITING_ROOM, StreamSlots
from paychan.protocol.errors import PaychanError, StreamReplaced, TooManyStreams, UnknownChannel
from paychan.protocol.types import OutPoint

CHANNELS = [OutPoint(bytes([number]) * 32, 0) for number in range(9)]


class Stream:
    """A stream as `StreamSlots` sees it."""

    is_gone = False

    def __init__(
        self, slots: StreamSlots, idle_seconds: float = 0, address: str = "a", *, is_busy: bool = False
    ) -> None:
        self.slots, self.address, self.is_busy = slots, address, is_busy
        self.paid_at = monotonic() - idle_seconds
        self.ended_by: PaychanError | None = None

    def end(self, error: PaychanError) -> None:
        self.ended_by = error
        self.slots.leave(self)

    def close(self, code: int, reason: str) -> None:  # noqa: ARG002
        raise AssertionError

    def abort(self) -> None:
        raise AssertionError


def test_fault_68_a_new_stream_replaces_an_idle_one() -> None:
    """A new stream replaces the one with the oldest payment, if that is old and no payment is in flight."""
    slots = StreamSlots(3, 8, 20)
    busy = Stream(slots, 9 * IDLE_SECONDS, is_busy=True)
    idle, fresh = Stream(slots, 2 * IDLE_SECONDS), Stream(slots)
    for stream, channel in zip((busy, idle, fresh), CHANNELS, strict=False):
        slots.take(stream, channel)

    slots.take(Stream(slots), CHANNELS[5])
    assert isinstance(idle.ended_by, StreamReplaced)
    assert (busy.ended_by, fresh.ended_by, len(slots)) == (None, None, 3)
    with pytest.raises(TooManyStreams):
        slots.take(Stream(slots), CHANNELS[6])


def test_fault_68_the_waiting_room_has_a_share_for_each_address() -> None:
    """If the waiting room is full, the address with the most streams loses its oldest; other addresses lose none."""
    slots = StreamSlots(3, 8, 20)
    honest = Stream(slots, address="b")
    slots.wait(honest)
    crowd = [Stream(slots, address="a") for _ in range(3 * WAITING_ROOM)]
    for stream in crowd:
        slots.wait(stream)

    assert honest.ended_by is None
    assert [isinstance(each.ended_by, UnknownChannel) for each in crowd].count(False) == WAITING_ROOM - 1
    assert crowd[0].ended_by is not None
    assert crowd[-1].ended_by is None


def test_fault_61_leaving_twice_or_without_a_slot_does_nothing() -> None:
    """Every path of a stream's end may free its slot."""
    slots = StreamSlots(1, 8, 20)
    stream = Stream(slots)
    slots.leave(stream)
    slots.take(stream, CHANNELS[0])
    slots.leave(stream)
    slots.leave(stream)
    assert (len(slots), slots.all) == (0, [])
    slots.take(Stream(slots), CHANNELS[0])


def test_fault_69_bad_signatures_are_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad signatures count per channel, also without streams; they expire after a pause, and the table is bounded."""
    now = 1000.0
    monkeypatch.setattr(stream_slots, "monotonic", lambda: now)
    slots = StreamSlots(1, 8, 3)
    waits = [slots.bad_signature(CHANNELS[0]) for _ in range(3)]
    assert waits == [0.01, 0.02, 0.04]
    assert slots.problem(CHANNELS[0]) is not None
    assert slots.problem(CHANNELS[1]) is None

    now += 61
    assert slots.problem(CHANNELS[0]) is None
    assert slots.bad_signature(CHANNELS[0]) == 0.01
    for number in range(5000):
        slots.bad_signature(OutPoint(number.to_bytes(32), 1))
    assert len(slots._penalties) <= 4096


def test_fault_69_payments_of_no_value_have_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeat of all payments in flight is free; each further payment of no value costs 10 ms, at most 1 s at once."""
    now = 1000.0
    monkeypatch.setattr(stream_slots, "monotonic", lambda: now)
    slots = StreamSlots(1, 8, 3)
    assert slots.count(CHANNELS[0], 0, 128) == 0
    assert not slots.allowances
    assert [slots.count(CHANNELS[0], 128, 0) for _ in range(EMPTY_PAYMENTS // 128)] == [0, 0]
    assert slots.count(CHANNELS[0], 1, 0) == pytest.approx(0.01)
    assert slots.count(CHANNELS[1], 1, 0) == 0
    assert slots.count(CHANNELS[0], 10, 0) == pytest.approx(0.11)
    assert slots.count(CHANNELS[0], 5000, 0) == 1

    now += 1
    assert slots.count(CHANNELS[0], 0, 32) == 0
    assert slots.count(CHANNELS[0], 33, 0) == pytest.approx(0.01)
    now += 3
    assert slots.count(CHANNELS[0], EMPTY_PAYMENTS, 0) == 0
    for number in range(5000):
        slots.count(OutPoint(number.to_bytes(32), 1), 1, 0)
    assert len(slots.allowances) <= 4096
