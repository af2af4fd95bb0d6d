"""Opening a channel: its server key, its funding output, and the decision."""
