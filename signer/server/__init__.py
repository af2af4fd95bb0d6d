"""The signer's Unix socket: connections, frames, and the place where each request is processed."""
