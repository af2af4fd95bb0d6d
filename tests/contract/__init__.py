"""One suite per contract: every backend of the store passes the same tests."""
