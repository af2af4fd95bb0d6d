"""The page that maps threats to tests. `python -m tests.lib.threats` writes the tests into it."""

from __future__ import annotations

from tests.lib.namedpage import TESTS, NamedPage

THREATS = NamedPage(TESTS.parent / "paychan" / "protocol" / "THREATS.md", "threat")

if __name__ == "__main__":
    THREATS.write()
