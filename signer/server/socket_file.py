"""The Unix socket as a file: never accessible to other users, and never taken from a running signer."""

from __future__ import annotations

import fcntl
import grp
import os
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from paychan.shared.holders import holder_of_lock

_PROBE_SECONDS = 1.0
BACKLOG = 1024
"""Connections that wait to be accepted: they cost nothing, and are served in order."""

RESERVED_FILES = 128
"""Descriptors reserved for other files: a ledger that can't open a file fails until the next start."""

_CREDENTIALS = struct.Struct("iII")  # unix(7): pid, uid, gid


class SocketError(Exception):
    """The socket can't be used: the setting that this concerns, and the reason."""

    def __init__(self, *, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


@contextmanager
def listening_socket(path: Path, group: str) -> Iterator[socket.socket]:
    """Listen at a path with mode 0600, or 0660 for a group; the file is removed afterwards.

    Raises:
        SocketError: another process listens there, or the socket can't be created.
    """
    with ExitStack() as cleanup:
        try:
            listener = _listen(path, group, cleanup)
        except OSError as error:
            raise SocketError(key="socket.path", reason=f"{path}: {error.strerror}") from None
        yield listener


def peer_uid(connection: socket.socket) -> int:
    """Ask the kernel for the user at the other end (SO_PEERCRED)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


def room_for(connections: int) -> int:
    """Raise the limit of open files for this number of connections; return the number that the kernel allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVED_FILES
    if wanted > soft != resource.RLIM_INFINITY:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - RESERVED_FILES))


def _listen(path: Path, group: str, cleanup: ExitStack) -> socket.socket:
    try:
        group_id = grp.getgrnam(group).gr_gid if group else None
    except KeyError:
        raise SocketError(key="socket.group", reason=f"there is no group {group!r}") from None
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _lock(path, cleanup)
    _remove_stale(path)
    listener = cleanup.enter_context(socket.socket(socket.AF_UNIX))
    previous = os.umask(0o177)  # so that the file has mode 0600 from its creation
    try:
        listener.bind(str(path))
    finally:
        os.umask(previous)
    cleanup.callback(path.unlink, missing_ok=True)
    if group_id is not None:
        os.chown(path, -1, group_id)
        path.chmod(0o660)
    listener.listen(BACKLOG)
    return listener


def _lock(path: Path, cleanup: ExitStack) -> None:
    """Hold a lock while listening: of two signers that start at the same time, one must fail."""
    name = path.with_name(path.name + ".lock")
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    cleanup.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SocketError(
            key="socket.path", reason=f"{path} is in use by {holder_of_lock(name)}: stop that signer"
        ) from None


def _remove_stale(path: Path) -> None:
    """Remove the socket of a killed signer; leave one that answers."""
    if not path.exists():
        return
    if not path.is_socket():
        raise SocketError(key="socket.path", reason=f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except (TimeoutError, BlockingIOError):
            pass  # a process listens there, and is busy
    raise SocketError(key="socket.path", reason=f"another process answers on {path}")
