"""Names the process that holds a port or a lock, as far as /proc shows it to this user."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_LISTENS = "0A"  # Linux include/net/tcp_states.h: TCP_LISTEN
_PROC = Path("/proc")


def cannot_listen(error: OSError, address: str, port: int, key: str) -> str:
    """Say why this address can't be listened on, which process holds the port, and which setting changes it."""
    place = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        listen = f"{key.partition('.')[0]}.listen"
        return f"can't listen on {place}: this machine has no address {address}. Change {listen}, such as to 127.0.0.1"
    if error.errno != errno.EADDRINUSE:
        return f"can't listen on {place}: {error.strerror or error}. Change {key}"
    holder = holder_of_port(port) or "another process"
    return f"can't listen on {place}: the port is held by {holder}. Stop that, or change {key}"


def holder_of_port(port: int) -> str:
    """Describe the process that listens on a TCP port; "" if none is known, "another process" if it is not visible."""
    wanted = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not wanted:
        return ""
    pid = next((pid for pid in _processes() if wanted & set(_open_files(pid))), None)
    return "another process" if pid is None else described(pid)


def holder_of_lock(path: Path) -> str:
    """Describe the process that holds a lock on a file; "another process" if /proc does not show it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = path.stat().st_ino
        for line in (_PROC / "locks").read_text().splitlines():
            pid, file = (line.split()[index] for index in (4, 5))
            if int(file.rpartition(":")[2]) == inode and int(pid) > 0:
                return described(int(pid))
    return "another process"


def has_open(pid: int, name: str) -> bool:
    """Return whether a process has a file of this name open, in whatever directory; False if /proc does not show it."""
    return any(target.removesuffix(" (deleted)").endswith(f"/{name}") for target in _open_files(pid))


def described(pid: int | str) -> str:
    """A process by its number and command line: `process 123 (paychan serve live)`."""
    try:
        command = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = "not visible from here"
    return f"process {pid} ({command})"


def _listening_inodes(port: int) -> Iterator[str]:
    for name in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _processes() -> Iterator[int]:
    with contextlib.suppress(OSError):
        yield from (int(name) for name in os.listdir(_PROC) if name.isdecimal())  # noqa: PTH208 - ends with `with`


def _open_files(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in os.scandir(_PROC / str(pid) / "fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(entry.path)  # noqa: PTH115 - a link to no file
