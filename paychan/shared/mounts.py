"""Mount points: a directory that a container or an operator mounts can't be renamed or replaced (EBUSY, rename(2)).

A store appears under its name only when it is complete, and a damaged one is set aside under another name. So where the
configured path is a mount point, the store is a directory below it, and all its names are on that filesystem.
"""

from __future__ import annotations

import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_INNER = "store"
_LEVELDB = re.compile(r"CURRENT|MANIFEST-\d+|\d+\.(log|ldb|sst)")


def is_mount_point(path: Path) -> bool:
    """Say whether something is mounted at this path, also another directory of the same filesystem (bind mount).

    `os.path.ismount` does not see the latter. The kernel writes spaces and backslashes of a path in octal (proc(5)).
    """
    try:
        mounts = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return path.is_mount()
    wanted = str(path.resolve()).encode(errors="surrogateescape")
    return any(_unescaped(line.split(b" ")[4]) == wanted for line in mounts)


def store_place(path: Path) -> Path:
    """Return the directory of the store that is configured at this path: a directory below it if it is a mount point.

    A store that is directly in a mount point stays there.
    """
    if (path / "CURRENT").exists():
        return path
    inner = path / _INNER
    if inner.exists() or fresh_place(inner).exists():
        return inner
    return inner if is_mount_point(path) and not _has_store_files(path) else path


def inner_place(path: Path) -> Path:
    """Return where a new store replaces one at this path: a directory below it if it is a mount point, else itself."""
    return path / _INNER if is_mount_point(path) else path


def beside(path: Path, suffix: str) -> Path:
    """Return the name of a file that belongs to a directory and must be on its filesystem: in it if it is a mount point."""
    name = path.name + suffix
    return path / name if is_mount_point(path) else path.with_name(name)


def fresh_place(path: Path) -> Path:
    """Return the name of a complete store that will replace the one at this path."""
    return path.with_name(f".{path.name}.rebuilt")


def rename_store(path: Path, suffix: str) -> None:
    """Append a suffix to the name of a store's directory; out of a mount point, move the files, CURRENT first.

    After a power cut between two files, those without CURRENT are no store.
    """
    if not is_mount_point(path):
        path.rename(path.with_name(path.name + suffix))
        return
    aside = path / (_INNER + suffix)
    aside.mkdir(mode=0o700)
    files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith((_INNER, f".{_INNER}"))]
    for file in sorted(files, key=lambda file: file.name != "CURRENT"):
        file.rename(aside / file.name)


def _has_store_files(path: Path) -> bool:
    return path.is_dir() and any(_LEVELDB.fullmatch(file.name) for file in path.iterdir())


def _unescaped(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), field)
