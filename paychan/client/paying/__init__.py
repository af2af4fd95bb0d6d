"""Auto-paying: a request that a server answers with 402 is paid within a budget, and sent again."""
