"""Effects of flows, and their performance over HTTP and WebSocket."""
