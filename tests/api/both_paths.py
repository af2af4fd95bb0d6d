"""Payments reach the core on two paths, the fast path and Tornado's handlers. Clients must see no difference."""

from __future__ import annotations

import pytest

BOTH_PATHS = pytest.mark.parametrize("system", [True, False], ids=["fast", "handlers"], indirect=True)
"""Runs a test, or a module, on a server with the fast path and on one without."""
