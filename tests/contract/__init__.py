"""One test suite per contract: every backend passes the same tests."""
