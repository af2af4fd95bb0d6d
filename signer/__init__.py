"""The signer: a process of its own that holds the keys and checks every request before it signs."""
