"""Tasks that are started again are so at once here."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("paychan.supervisor._FIRST_PAUSE_SECONDS", 0.001)
