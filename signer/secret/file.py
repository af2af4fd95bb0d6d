"""Files that only the signer's user can use: checked before reading, and written atomically and durably."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paychan.shared.leveldb_files import sync_directory
from signer.secret.wiping import read_secret, wipe

_OTHERS = 0o077
_OTHERS_OF_CREDENTIAL = 0o037
"""systemd.exec(5), LoadCredential: root may own the file; an ACL lets the service read it; the group's bit shows it."""


class PrivateFileError(Exception):
    """A private file can't be used or made; the text says how to mend it. Never holds any of its content."""


class MissingFile(PrivateFileError):
    """There is no file of that name."""


def plain(path: Path) -> Path:
    """Return a path that was typed as an absolute one without `..`; the file itself may still be a link."""
    return path.parent.resolve() / path.name


def read_private(path: Path, max_bytes: int, *, credential: bool = False) -> bytearray:
    """Read a file that no other user can use; the caller wipes the result. `credential`: systemd made the file.

    Raises:
        MissingFile: there is none.
        PrivateFileError: a link, not a regular file, usable by others, or longer than `max_bytes`.
    """
    try:
        # O_NOFOLLOW: a link could point to a file that others write; O_NONBLOCK: a pipe must not hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        msg = f"there is no {path}"
        raise MissingFile(msg) from None
    except OSError as error:
        msg = f"{path} can't be opened: {error.strerror}"
        raise PrivateFileError(msg) from None
    try:
        problem = _problem(os.fstat(descriptor), credential=credential)
        if problem:
            msg = f"{path} {problem}"
            raise PrivateFileError(msg)
        content = read_secret(descriptor, max_bytes + 1)
    except OSError as error:
        msg = f"{path} can't be read: {error.strerror}"
        raise PrivateFileError(msg) from None
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        wipe(content)
        msg = f"{path} has more than {max_bytes} bytes: it is another kind of file"
        raise PrivateFileError(msg)
    return content


def write_new(path: Path, content: bytes | bytearray) -> None:
    """Write a new file durably, mode 0600.

    Raises:
        PrivateFileError: the name exists already and was left alone, or it can't be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # the umask may have removed bits
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        sync_directory(path.parent)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise _failed(path, error) from None


def append_line(path: Path, line: bytes) -> None:
    """Append a line durably to a file of mode 0600, which is made if it is missing.

    Raises:
        PrivateFileError: it can't be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(descriptor)
        sync_directory(path.parent)
    except OSError as error:
        raise _failed(path, error) from None


def create_private(path: Path, content: bytes) -> None:
    """Create a file atomically. The caller holds `exclusively`.

    Raises:
        PrivateFileError: the name exists already and was left alone, or it can't be written.
    """
    if os.path.lexists(path):
        raise _exists(path)
    new = _write_beside(path, content)
    try:
        path.hardlink_to(new)
        new.unlink()
        sync_directory(path.parent)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise _failed(path, error) from None


def replace_private(path: Path, content: bytes) -> None:
    """Replace the content atomically. The caller holds `exclusively`.

    Raises:
        PrivateFileError: it can't be written; then the old content is unchanged.
    """
    new = _write_beside(path, content)
    try:
        new.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise _failed(path, error) from None


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Keep a second command from changing the file at the same time: one of two changes would be lost.

    Raises:
        PrivateFileError: another command holds the lock, or the directory can't be used.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(path, error) from None
    try:
        _lock(path, descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        msg = f"another command is changing {path}: wait until it ends"
        raise PrivateFileError(msg) from None


def _problem(status: os.stat_result, *, credential: bool) -> str:
    owners = {os.geteuid(), 0} if credential else {os.geteuid()}
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_uid not in owners:
        return f"belongs to uid {status.st_uid}, not to the signer's {os.geteuid()}: `chown` it"
    if status.st_mode & (_OTHERS_OF_CREDENTIAL if credential else _OTHERS):
        return f"has mode {stat.S_IMODE(status.st_mode):04o}, others can use it: `chmod 600` it"
    return ""


def _write_beside(path: Path, content: bytes) -> Path:
    """Write to a file beside it, and read that back. A file of that name, left by a crash, was never in effect."""
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
    except OSError as error:
        raise _failed(new, error) from None
    write_new(new, content)
    if read_private(new, len(content)) != content:
        msg = f"{new} does not hold what was written to it: check the disk"
        raise PrivateFileError(msg)
    return new


def _exists(path: Path) -> PrivateFileError:
    return PrivateFileError(f"{path} exists already and was left alone")


def _failed(path: Path, error: OSError) -> PrivateFileError:
    return PrivateFileError(f"{path} can't be written: {error.strerror}")
