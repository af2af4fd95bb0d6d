"""The pure core: what a channel is, what a payment proves, what a settlement spends.

Nothing here opens a socket or a file, reads a clock, draws randomness, logs or locks: time and
randomness are arguments. The server, the signer and the client library stand on these modules.
"""
