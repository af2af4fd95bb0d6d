"""Where channels are kept: the contract (`base`), its backends, and backups."""
