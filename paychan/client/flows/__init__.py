"""Flows: each step of a payer as a generator of effects, written once for threads and for asyncio."""
