"""The ledger: everything that was shown, signed and settled, on disk before a signature is sent."""
