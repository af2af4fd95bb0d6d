"""The page that maps faults to tests. `python -m tests.lib.faults` writes the tests into it.

Faults were found from outside, with the real server, signer and node. A test that holds one of them off is named
`test_fault_NN_…` after its number; several tests may be, for its neighbours too.
"""

from __future__ import annotations

from tests.lib.namedpage import TESTS, NamedPage

FAULTS = NamedPage(TESTS / "FAULTS.md", "fault")

if __name__ == "__main__":
    FAULTS.write()
