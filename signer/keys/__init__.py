"""The server's keys: finding the key of a channel, and signing with it."""
