"""The server's keys: which key belongs to a channel, and signing with it."""
