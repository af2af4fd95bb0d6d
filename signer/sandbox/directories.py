"""Checks the signer's directories before the first write: no other user may be able to write to them.

A user who can write to the state directory can remove the ledger, and with it the earlier events of the policies, or
replace the socket by another one. So each directory must belong to the signer's user or to root, must not be writable
for others, and no directory above it may be writable for all users, unless it is sticky as /tmp is. `service` calls
this after the change of user.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from signer.config import SignerConfig

_OTHERS_WRITE = 0o022


class PlaceError(Exception):
    """A directory can't be trusted: names the setting, and says how to mend it."""

    def __init__(self, *, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


def check_file(file: Path) -> None:
    """Check that not every user can write to the configuration: it names the destination of all settlements.

    Raises:
        PlaceError: every user can.
    """
    if file.exists() and file.stat().st_mode & stat.S_IWOTH:
        mode = stat.S_IMODE(file.stat().st_mode)
        raise PlaceError(key="", reason=f"has mode {mode:04o}, every user can change it: `chmod o-w {file}`")


def check_places(config: SignerConfig) -> None:
    """Check all existing directories and files that the signer writes to.

    Raises:
        PlaceError: another user can change one of them, or it is a link.
    """
    places = (
        (config.state_dir, "state_dir"),
        (config.ledger_path, "state_dir"),
        (config.socket_path.parent, "socket.path"),
        (config.seed_path.parent, "key.seed_file"),
    )
    for path, key in places:
        problem = _problem(path)
        if problem:
            raise PlaceError(key=key, reason=problem)
    for path, key in ((config.audit_path, "state_dir"), (config.socket_path, "socket.path")):
        if path.is_symlink():
            raise PlaceError(key=key, reason=f"{path} is a link: remove it, or configure its target")


def _problem(path: Path) -> str:
    if path.is_symlink():
        return f"{path} is a link: remove it, or configure its target"
    for above in path.parents:
        if above.exists() and above.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            return f"{above} can be written by all users, who could replace {path}: `chmod o-w {above}`"
    if not path.exists():
        return ""
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is not a directory"
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to uid {status.st_uid}, this is uid {os.geteuid()}: `chown` it, or start as that user"
    if status.st_mode & _OTHERS_WRITE:
        return f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, others can write to it: `chmod go-w {path}`"
    return ""
