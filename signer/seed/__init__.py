"""The seed: its encrypted file, its words, and the keys derived from it."""
