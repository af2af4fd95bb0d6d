"""Shared parts of the tests: vectors, builders, and real processes as small objects."""
