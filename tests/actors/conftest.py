"""In these tests the supervisor restarts tasks without a pause."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("paychan.supervisor._FIRST_PAUSE_SECONDS", 0.001)
