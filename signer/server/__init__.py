"""The signer's Unix socket: connections, frames, and where a request is worked on."""
