"""The seed: its encrypted file, its words, and the keys that grow from it."""
