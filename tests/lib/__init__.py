"""What several rings of tests share: vectors, builders, and real processes as small objects."""
