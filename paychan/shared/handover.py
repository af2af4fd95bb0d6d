"""Hands a connected socket to the event loop, which closes it from then on.

uvloop closes a descriptor by its number, and detaches the Python socket from it only if the connection still lives when
the hand-over returns (`loop.pyx`: `_attach_fileobj` comes after `await waiter`). If the connection ended meanwhile, the
socket object keeps the number of a closed descriptor. When the object is freed, at any later time, it closes whatever
has that number by then: another client's connection, or a file of the store.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def handed_over(connection: socket.socket) -> Iterator[None]:
    """Within this context the caller gives `connection` to the running loop, as the last thing that it does with it.

    asyncio's own loops work through the socket object and close it themselves, so it stays as it is there; after a
    failure they leave it open, and this context closes it.
    """
    own_object = isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)
    try:
        yield
    except BaseException:
        connection.close() if own_object else connection.detach()
        raise
    if not own_object:
        connection.detach()
