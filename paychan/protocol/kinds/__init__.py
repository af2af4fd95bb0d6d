"""Scripts of a channel: how funding is locked, and what payment, settlement and refund sign."""
