"""Sizes of long campaigns: a short default for every run, and a long form for `pytest --campaign`."""

from __future__ import annotations

import os

VARIABLE = "PAYCHAN_CAMPAIGN"
"""Set by `tests/conftest.py`, before any test module is imported."""


def sized(default: int, campaign: int) -> int:
    """Return how often, or with how many channels, a campaign runs."""
    return campaign if os.environ.get(VARIABLE) else default
