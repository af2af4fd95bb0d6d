"""The ledger: what was shown, signed and settled, on disk before a signature leaves."""
