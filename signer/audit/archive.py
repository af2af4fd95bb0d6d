"""Archives of large audit logs: the file is renamed to the numbers of its lines, and a new one continues the chain.

The first line of the new file names the old one and has its last hash as `previous`. So both form one chain, and the
ledger's record of the old log's last line is still found.
"""

from __future__ import annotations

import os
from pathlib import Path

from paychan.shared.leveldb_files import sync_directory
from signer.audit.access import AuditFailed, lines, open_at_end, open_locked
from signer.audit.chain import ARCHIVE, Decision, Head, encode_lines, read_line


def files(path: Path) -> list[Path]:
    """Return a log's archives in its directory, in order, then the log itself, if it exists."""
    beside = [file for file in path.parent.glob(f"{path.name}.*-*") if not _is_same(file, path)]
    archives = [file for numbers, file in sorted((_numbers(path, file), file) for file in beside) if numbers]
    return [*archives, path] if path.exists() else archives


def archive(path: Path, now_ms: int) -> Path:
    """Archive the log of a stopped signer; return the path of the archive.

    Raises:
        AuditFailed: there is no log, it is empty, in use, or can't be renamed.
        AuditBroken: its first or last line is damaged.
    """
    descriptor, head, _ = open_at_end(path, create=False)
    try:
        return put_aside(path, head, now_ms)
    finally:
        os.close(descriptor)


def put_aside(path: Path, head: Head, now_ms: int) -> Path:
    """Archive a log that ends with `head`; the caller is its only writer. Raises as `archive`."""
    try:
        first = next(lines(path), None)
    except OSError as error:
        msg = f"{path} can't be read: {error.strerror}"
        raise AuditFailed(msg) from error
    if first is None:
        msg = f"{path} is empty: there is nothing to archive"
        raise AuditFailed(msg)
    kept = path.with_name(f"{path.name}.{read_line(first).n}-{head.count}")
    _begin(path, kept, head, _first_line(kept, now_ms, ""))
    return kept


def begin_anew(path: Path, head: Head, now_ms: int) -> Path | None:
    """Archive a broken, truncated or missing log, and create one that continues from `head` and states the reason.

    Returns the path of the old one, None if there was none.

    Raises:
        AuditFailed: it is in use, or can't be renamed.
    """
    existed = os.path.lexists(path)
    kept = path.with_name(f"{path.name}.broken-{now_ms}")
    descriptor = open_locked(path, create=True)
    try:
        reason = f"started anew after line {head.count}: the previous log was broken or lost"
        _begin(path, kept if existed else None, head, _first_line(kept, now_ms, reason))
    finally:
        os.close(descriptor)
    return kept if existed else None


def _first_line(kept: Path, now_ms: int, reason: str) -> Decision:
    about = {"archive": kept.name}
    return Decision(
        at_ms=now_ms, peer_uid=os.geteuid(), asked=ARCHIVE, about=about, digest="", verdict="given", reason=reason
    )


def _begin(path: Path, kept: Path | None, head: Head, first: Decision) -> None:
    """Give the log its new name, then put the new one in its place: at every moment there is a log at `path`."""
    new = path.with_name(path.name + ".new")
    try:
        _remove_earlier_names(path)
        _write_durably(new, encode_lines([first], head)[0])
        if kept is not None:
            kept.hardlink_to(path)
        new.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        msg = f"{path} can't be archived as {kept}: {error.strerror}"
        raise AuditFailed(msg) from error


def _write_durably(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _remove_earlier_names(path: Path) -> None:
    """Remove the second name that an interrupted archiving left."""
    for name in path.parent.glob(f"{path.name}.*-*"):
        if _is_same(name, path):
            name.unlink()


def _is_same(file: Path, path: Path) -> bool:
    return path.exists() and file.samefile(path)


def _numbers(path: Path, file: Path) -> tuple[int, ...]:
    """Read the first and last line's number from an archive's name; () if it is no archive."""
    first, _, last = file.name.removeprefix(path.name + ".").partition("-")
    return (int(first), int(last)) if first.isdecimal() and last.isdecimal() else ()
