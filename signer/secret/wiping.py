"""Secrets in memory that is overwritten after use: the seed, its passphrase and the token's PIN.

Python can overwrite a bytearray, and that is all. It can't wipe `bytes`, `str` or `int`, which are immutable and may
have been copied. Bytes that a library takes or returns (scrypt's key, a private key in coincurve) stay in freed memory
until the memory is used again. So read into a bytearray; pass it on as it is where a function takes it (hashlib and
hmac take any buffer); make unavoidable bytes objects late and few; never `+=` or resize a bytearray with a secret,
which moves it and leaves the old memory as it was. `signer.sandbox.isolation` protects the remaining copies: no swap,
no core file, no debugger.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


def wipe(*buffers: bytearray) -> None:
    """Overwrite with zeros, in place; lengths stay. An exported memoryview does not prevent it."""
    for buffer in buffers:
        if buffer:
            # not `buffer[:] = bytes(len(buffer))`: a slice of another length would move the buffer
            ctypes.memset((ctypes.c_char * len(buffer)).from_buffer(buffer), 0, len(buffer))


@contextmanager
def wiped(*buffers: bytearray) -> Iterator[None]:
    """Overwrite the buffers at the end of the block, also after an exception.

    An exception keeps no copy here, but its traceback holds the frames' variables: raise such errors `from None`, and
    format no traceback with locals.
    """
    try:
        yield
    finally:
        wipe(*buffers)


def read_secret(descriptor: int, most_bytes: int) -> bytearray:
    """Read up to `most_bytes` of a file, without a copy in an immutable object; the caller wipes the result.

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
