"""The signer: its own process, which holds the keys and decides for itself what it signs."""
