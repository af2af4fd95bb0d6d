"""The audit log: one line for each decision, chained by hashes."""
