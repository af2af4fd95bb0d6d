"""The page that maps faults to tests. `python -m tests.lib.faults` writes the tests into it.

Faults were found by tests from outside, with the real server, signer and node. A test that guards against a fault is
named `test_fault_NN_…` after its number. Several tests may have one number, also tests of similar faults.
"""

from __future__ import annotations

from tests.lib.namedpage import TESTS, NamedPage

FAULTS = NamedPage(TESTS / "FAULTS.md", "fault")

if __name__ == "__main__":
    FAULTS.write()
