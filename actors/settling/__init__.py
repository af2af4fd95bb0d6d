"""Settlements: planned, signed, broadcast, replaced, and followed until they are deep enough."""
