"""Backups: created from a snapshot, verified, restored, and salvaged from a damaged store."""
