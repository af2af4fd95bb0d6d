"""The default store: one LevelDB directory, used by one process."""
