"""Sizes of long campaigns: a short default for every run, and a long form for `pytest --campaign`."""

from __future__ import annotations

import os

VARIABLE = "PAYCHAN_CAMPAIGN"
"""Set by `tests/conftest.py` before it imports any test module."""


def sized(default: int, campaign: int) -> int:
    """Return the number of rounds or channels of a campaign."""
    return campaign if os.environ.get(VARIABLE) else default
