"""Secrets in memory that is overwritten after use. For what reads the seed, its passphrase and the token's PIN.

Python can overwrite a bytearray, and that is all. It can't wipe `bytes`, `str` or `int`, which are immutable and may have
been copied: what a library takes or returns as bytes (scrypt's key, a private key in coincurve) stays in freed memory until
something else is put there. So read into a bytearray, hand it on as it is where that is taken (hashlib and
hmac take any buffer), make the bytes that can't be avoided late and few, and never `+=` or resize a bytearray with a
secret: that moves it and leaves the old place as it was. What remains is kept from others by `signer.sandbox.isolation`: no swap, no
core file, no debugger.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


def wipe(*buffers: bytearray) -> None:
    """Overwrite with zeros, in place; lengths stay.

    A memoryview of the buffer does not stand in the way, it sees zeros.
    """
    for buffer in buffers:
        if buffer:
            # not `buffer[:] = bytes(len(buffer))`: a slice of another length would move the buffer, this can't
            ctypes.memset((ctypes.c_char * len(buffer)).from_buffer(buffer), 0, len(buffer))


@contextmanager
def wiped(*buffers: bytearray) -> Iterator[None]:
    """Overwrite the buffers at the end of the block, whatever ends it.

    An exception that passes keeps no copy here, but its traceback holds the frames' variables: raise such errors
    `from None`, and format no traceback with locals.
    """
    try:
        yield
    finally:
        wipe(*buffers)


def read_secret(descriptor: int, most_bytes: int) -> bytearray:
    """Read a file to its end, or `most_bytes` of it, without a copy in an immutable object; the caller wipes it.

    Raises:
        OSError: it can't be read.
    """
    buffer = bytearray(most_bytes)
    filled = 0
    with wiped(buffer), memoryview(buffer) as view:
        while filled < most_bytes and (count := os.readv(descriptor, [view[filled:]])):
            filled += count
        secret = bytearray(filled)  # not `del buffer[filled:]`, which may move it
        secret[:] = view[:filled]
    return secret
