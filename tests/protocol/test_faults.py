"""Every fault that was found from outside has a test named after it, and the page says which."""

from __future__ import annotations

import pytest

from tests.lib.faults import named_after_faults, rows, shown

NUMBERS = (*range(1, 34), 38, 41, 42, *range(60, 85))


def test_the_page_lists_every_fault() -> None:
    """The page has a row for each fault, and no test is named after a number that the page lacks."""
    assert tuple(sorted(rows())) == tuple(sorted(NUMBERS))
    assert set(named_after_faults()) <= set(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_each_fault_has_tests_that_the_page_names(number: int) -> None:
    """The tests named after a fault are those in its row: `python -m tests.lib.faults` writes them."""
    tests = named_after_faults()[number]

    assert tests, f"no test is named test_fault_{number}_…"
    assert rows()[number] == shown(tests)
