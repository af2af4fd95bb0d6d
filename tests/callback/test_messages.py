"""The messages about each change of a channel's record, and the key of each."""

from __future__ import annotations

import msgspec
import pytest

from paychan.callback.messages import Kind, events, events_again
from paychan.protocol.channel import CloseReason, Closing, State
from paychan.protocol.types import Sat, UnixTime
from tests.lib.channels import Payer
from tests.lib.looped import looped

pytestmark = pytest.mark.quick

NOW = UnixTime(1_800_000_000)
replace = msgspec.structs.replace

OPEN = Payer("messages").channel()
AT = {State.OPEN: Kind.OPENED, State.CLOSING: Kind.CLOSING, State.PUBLISHED: Kind.CLOSING, State.CLOSED: Kind.SETTLED}
AT |= {State.LOST: Kind.LOST, State.UNFUNDED: Kind.LOST}


@looped("before", State)
@looped("after", State)
def test_each_part_of_a_life_is_told_once(before: State, after: State) -> None:
    """A change within a part tells nothing: the fee of a settlement may be raised many times."""
    closing = Closing(CloseReason.EXPIRY, NOW)
    first, second = replace(OPEN, state=before, closing=closing), replace(OPEN, state=after, closing=closing, seq=9)
    told = [event.type for event in events(first, second, NOW)]
    assert told == ([] if AT[before] is AT[after] else [AT[after].value])


@looped("state", State)
def test_every_history_is_told_in_order(state: State) -> None:
    """Each history begins with `opened`, and no two messages have one key."""
    before, told = None, []
    for version in Payer(state.value).history(state):
        told += events(before, version, NOW)
        before = version
    assert told[0].type == "opened"
    assert told[-1].type == AT[state].value
    assert len({event.idempotency_key for event in told}) == len(told)
    assert [event.sequence for event in told] == sorted(event.sequence for event in told)


def test_a_drained_opening_is_opened_and_closing() -> None:
    """A channel that its opening payment drains is stored as closing at once."""
    drained = replace(OPEN, state=State.CLOSING, closing=Closing(CloseReason.DRAINED, NOW))
    assert [event.type for event in events(None, drained, NOW)] == ["opened", "closing"]


@looped("state", State)
def test_nothing_is_told_about_a_channel_that_has_paid_nothing(state: State) -> None:
    """Opening channels without a payment makes no message, so strangers can't fill the store."""
    unpaid = replace(OPEN, payment=replace(OPEN.payment, change_sat=OPEN.funding_sat), state=state)
    assert events(None, unpaid, NOW) == []


def test_a_withdrawal_says_where_the_channel_goes_on() -> None:
    """The txid names the settlement, and the channel's new id is its first output."""
    moved = next(
        version
        for version in reversed(Payer("moves").history(State.CLOSED))
        if version.closing is not None and version.state is State.CLOSED
    )
    closing = msgspec.structs.replace(moved.closing, reason=CloseReason.WITHDRAW, spent_by=bytes(range(32)))
    [event] = events(OPEN, replace(moved, closing=closing), NOW)
    assert (event.type, event.reason) == ("settled", "withdraw")
    assert event.continues_at == f"{event.txid}:0"
    assert event.received_sat == Sat(moved.received_sat - closing.client_fee_sat)


@looped("state", State)
def test_a_restore_tells_again_what_can_still_change(state: State) -> None:
    """Channels that ended and whose expiry has passed are left out: a store holds many of these."""
    restored = replace(Payer(state.value).history(state)[-1], restored=True)
    expiry = restored.terms.expiry.lock_time
    told = [event.type for event in events_again(restored, UnixTime(expiry))]
    assert told == list(dict.fromkeys(("opened", AT[state].value)))
    assert all(event.restored for event in events_again(restored, UnixTime(expiry)))
    ended = state in (State.CLOSED, State.LOST, State.UNFUNDED)
    assert bool(events_again(restored, UnixTime(expiry + 1))) is not ended
