"""The pure core: channels, payments and settlements, and the rules that judge them.

Nothing here opens a socket or a file, reads a clock, draws randomness, logs or locks: time and
randomness are arguments. The server, the signer and the client library are built on these modules.
"""
