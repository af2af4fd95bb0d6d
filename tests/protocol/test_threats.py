"""Every threat of the page has a test named after it, and the page lists these tests."""

from __future__ import annotations

from tests.lib.looped import looped
from tests.lib.threats import THREATS

NUMBERS = range(1, 44)


def test_the_page_lists_every_threat() -> None:
    """The page has a row for each threat, in order, and no test is named after a number that the page lacks."""
    assert list(THREATS.rows) == list(NUMBERS)
    assert set(THREATS.named) <= set(NUMBERS)


@looped("number", NUMBERS)
def test_each_threat_has_tests_that_the_page_names(number: int) -> None:
    """The tests named after a threat are those in its row: `python -m tests.lib.threats` writes them."""
    assert THREATS.named.get(number), f"no test is named test_threat_{number}_…"
    assert THREATS.rows[number] == THREATS.shown(number)
