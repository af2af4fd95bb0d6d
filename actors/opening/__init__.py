"""Opening a channel: its key, its funding output, and whether it is accepted."""
