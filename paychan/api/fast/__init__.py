"""The fast path: parses and answers payment requests without Tornado. See `server` for an overview."""
