"""The concurrent layer around the pure core: one actor per open channel, all on one event loop."""
