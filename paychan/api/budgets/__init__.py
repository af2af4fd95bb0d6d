"""Limits on what one client can use: connections, streams, turns of the event loop, requests, descriptors."""
