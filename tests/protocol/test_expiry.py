"""An expiry is a Unix time or a block height (BIP65), and says how long it is until then."""

from __future__ import annotations

import pytest
from msgspec import Struct

from paychan.chain.base import Tip
from paychan.protocol.expiry import BLOCK_SECONDS, MAX_EXPIRY, MIN_EXPIRY, Expiry
from paychan.protocol.types import UnixTime
from tests.lib.channels import NOW, RULES, VIEW, View
from tests.lib.looped import looped


class At(Struct, frozen=True):
    """A moment: a time, and the height of the newest block if it is known."""

    now: UnixTime
    height: int | None = None


def at(seconds: int, height: int | None = None) -> At:
    return At(UnixTime(seconds), height)


def test_a_lock_time_is_a_time_or_a_height() -> None:
    """Lock times below 500,000,000 are block heights (BIP65)."""
    times = [Expiry(MIN_EXPIRY), Expiry(MAX_EXPIRY)]
    heights = [Expiry(0), Expiry(MIN_EXPIRY - 1)]

    assert [each.is_time for each in (*times, *heights)] == [True, True, False, False]
    assert [each.unix_time for each in times] == [MIN_EXPIRY, MAX_EXPIRY]
    for each in heights:
        with pytest.raises(ValueError, match=f"block height {each.lock_time}, not a time"):
            _ = each.unix_time


@looped(
    ("lock_time", "moment", "left", "due"),
    [
        (NOW, at(NOW - 5), 5, False),
        (NOW, at(NOW, 10**6), 0, False),
        (NOW, at(NOW + 1), -1, True),
        (800_000, at(NOW, 799_990), 10 * BLOCK_SECONDS, False),
        (800_000, at(NOW, 799_999), BLOCK_SECONDS, False),
        (800_000, at(NOW, 800_000), 0, True),
        (800_000, at(NOW, 800_001), -BLOCK_SECONDS, True),
        (800_000, at(NOW), -1, False),
    ],
)
def test_the_time_left_and_the_moment_of_the_refund(lock_time: int, moment: At, left: int, due: bool) -> None:
    """BIP113: a lock time must lie before the median time of the previous block, a height before the block's own.

    If the height is unknown, no time is left for payments, and no refund is called valid.
    """
    assert (Expiry(lock_time).left(moment), Expiry(lock_time).is_due(moment)) == (left, due)


def test_the_servers_view_and_a_block_are_moments() -> None:
    """The server asks by its view, a payer's own chain by its newest block."""
    tip = Tip(800_000, "", UnixTime(NOW + 60), NOW)

    assert Expiry(NOW + 7).left(VIEW) == 7
    assert Expiry(800_001).left(View(NOW, RULES, height=800_000)) == BLOCK_SECONDS
    assert (Expiry(NOW - 1).is_due(tip), Expiry(NOW).is_due(tip), Expiry(800_000).is_due(tip)) == (True, False, True)
