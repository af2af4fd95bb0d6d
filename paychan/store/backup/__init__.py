"""Backups: made from a snapshot, checked, restored, and salvaged from a damaged store."""
