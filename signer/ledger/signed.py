"""Reads which settlements were signed, from a copy of the ledger: the running signer holds the directory's lock.

LevelDB never changes a table file, so the copy has links to these; log and manifest are copied. If LevelDB begins or
removes a file meanwhile, the copy is made again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import plyvel
from msgspec import Struct

from paychan.protocol.settlement import Settlement
from paychan.protocol.wire.signer_messages import SettlementRequest
from paychan.shared.leveldb_files import error_text
from signer.ledger.base import LedgerFailed
from signer.ledger.entries import DamagedEntry, decode_entry
from signer.ledger.opening import OPTIONS

_ATTEMPTS, _PAUSE_SECONDS = 20, 0.1
_TABLES = (".ldb", ".sst")
_DIGEST_KEY_BYTES = 33


class Signed(Struct, frozen=True):
    """A settlement that was signed: its request, and the transaction, unless it was lost in a crash."""

    request: SettlementRequest
    settlement: Settlement | None


def signed_settlements(path: Path) -> Iterator[Signed]:
    """Read all settlements that were signed, in no order. An entry that is damaged is left out.

    Raises:
        LedgerFailed: there is no ledger, or it can't be read.
    """
    with _copied(path) as copy:
        try:
            with closing(
                plyvel.DB(str(copy), create_if_missing=False, **{**OPTIONS, "paranoid_checks": False})
            ) as opened:
                yield from _read(opened)
        except plyvel.Error as error:
            msg = f"{path} can't be read ({error_text(error)})"
            raise LedgerFailed(msg) from error


def _read(database: plyvel.DB) -> Iterator[Signed]:
    for key, raw in database.iterator(start=b"q", stop=b"r"):
        if len(key) != _DIGEST_KEY_BYTES:  # a signed entry of an outpoint that begins with the same byte
            continue
        kept = database.get(b"t" + key[1:])
        try:
            request = decode_entry(raw, SettlementRequest)
            yield Signed(request, None if kept is None else decode_entry(kept, Settlement))
        except DamagedEntry:
            continue


@contextmanager
def _copied(path: Path) -> Iterator[Path]:
    if not (path / "CURRENT").exists():
        msg = f"there is no {path}: this signer has signed nothing yet"
        raise LedgerFailed(msg)
    try:
        with tempfile.TemporaryDirectory(prefix=".ledger-copy-", dir=path.parent) as parent:
            for attempt in range(_ATTEMPTS):
                copy = Path(parent) / str(attempt)
                if _copy(path, copy):
                    yield copy
                    return
                time.sleep(_PAUSE_SECONDS)
    except OSError as error:
        msg = f"{path} can't be copied ({error.strerror}): run this as the signer's user"
        raise LedgerFailed(msg) from error
    msg = f"{path} changes too quickly to be read: try again, or stop the signer"
    raise LedgerFailed(msg)


def _copy(path: Path, copy: Path) -> bool:
    """Copy a ledger's files; return whether they belong together."""
    copy.mkdir()
    before = _state(path)
    try:
        for name, _ in before:
            if name.endswith(_TABLES):
                os.link(path / name, copy / name)
            elif name != "LOCK":
                shutil.copyfile(path / name, copy / name)
    except FileNotFoundError:
        return False
    return before == _state(path)


def _state(path: Path) -> list[tuple[str, int]]:
    """List the files; sizes of logs are left out, since a whole record may follow without harm."""
    with os.scandir(path) as files:
        return sorted((each.name, each.stat().st_size if each.name.startswith("MANIFEST") else 0) for each in files)
