"""Every fault that a reviewer reported has a test named after it, and the page lists these tests."""

from __future__ import annotations

from tests.lib.faults import FAULTS
from tests.lib.looped import looped

NUMBERS = range(1, 85)


def test_the_page_lists_every_fault() -> None:
    """The page has a row for each fault, and no test is named after a number that the page lacks."""
    assert tuple(sorted(FAULTS.rows)) == tuple(sorted(NUMBERS))
    assert set(FAULTS.named) <= set(NUMBERS)


@looped("number", NUMBERS)
def test_each_fault_has_tests_that_the_page_names(number: int) -> None:
    """The tests named after a fault are those in its row: `python -m tests.lib.faults` writes them."""
    assert FAULTS.named.get(number), f"no test is named test_fault_{number}_…"
    assert FAULTS.rows[number] == FAULTS.shown(number)
