"""Judging requests: the policies, the facts that they see, and the replies."""
