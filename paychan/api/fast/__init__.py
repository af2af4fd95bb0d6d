"""The fast path: payment requests parsed and answered without Tornado; `server` explains it."""
