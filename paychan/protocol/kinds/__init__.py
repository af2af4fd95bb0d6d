"""Scripts of a channel: the lock of the funding output, the digests of payment, settlement and refund."""
