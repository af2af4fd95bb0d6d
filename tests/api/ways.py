"""Payments reach the core on two ways, the lane and Tornado's handlers; what clients see must not tell which."""

from __future__ import annotations

import pytest

BOTH_WAYS = pytest.mark.parametrize("system", [True, False], ids=["lane", "handlers"], indirect=True)
"""Runs a test, or a module, against a server with the payments' lane and one without."""
