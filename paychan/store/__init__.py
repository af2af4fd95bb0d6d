"""Storage of channels: the contract (`base`), its backends, and backups."""
