"""The ledger: what was signed for which outpoint, in a small LevelDB of the signer's own.

Keys are outpoints (36 bytes), values are `signed.encode_entry`'s. Nothing in it is secret, and no coin depends on it:
without it, policy-replacement starts from nothing. One process at a time; LevelDB's own lock sees to that.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import plyvel

from paychan.protocol.types import OutPoint
from signer.seed import sync_directory
from signer.signed import DamagedEntry, Entries, Signed, decode_entry, encode_entry

_OPTIONS = {
    # A damaged log is an error when the ledger is opened; by default LevelDB drops what follows the damage.
    "paranoid_checks": True,
    # An outpoint that was never signed for (1 % aside) is told without reading a block.
    "bloom_filter_bits": 10,
}


_DATA = (".ldb", ".sst", ".log")
"""Where these lie without the file CURRENT, LevelDB would begin anew and delete them."""


class LedgerFailed(Exception):
    """The ledger can't be opened, read or written; says what to do."""


class Ledger(Protocol):
    """What was signed. Whoever reads in order to write holds `lock` meanwhile; other threads wait for it."""

    @property
    def lock(self) -> threading.Lock:
        """Held from `read` to `write`, so that of two requests for an outpoint the second sees the first."""

    def read(self, outpoints: Collection[OutPoint]) -> Entries:
        """Return what is remembered of these.

        Raises:
            DamagedEntry: one of them can't be trusted.
            LedgerFailed: it can't be read.
        """

    def write(self, entries: Entries) -> None:
        """Remember all of these or none; on disk when this returns.

        Raises:
            LedgerFailed: nobody knows what is on disk. Every later call fails too, until the signer is started again.
        """


class LevelDbLedger:
    """A `Ledger` on disk."""

    def __init__(self, path: Path) -> None:
        """Open the directory, or begin it.

        Raises:
            LedgerFailed: in use, damaged, something else, or not accessible.
        """
        self.lock = threading.Lock()
        self._failure = ""
        self._database = _open(path)

    def read(self, outpoints: Collection[OutPoint]) -> Entries:
        """See `Ledger`."""
        found = {outpoint: self._get(outpoint) for outpoint in outpoints}
        return {outpoint: _decoded(outpoint, raw) for outpoint, raw in found.items() if raw is not None}

    def write(self, entries: Entries) -> None:
        """See `Ledger`."""
        self._check()
        try:
            batch = self._database.write_batch(sync=True)
            for outpoint, signed in entries.items():
                batch.put(outpoint.serialize(), encode_entry(signed))
            batch.write()
        except Exception as error:
            self._failure = f"a write failed ({_text(error)}): see to the disk, then start the signer again"
            raise LedgerFailed(self._failure) from error

    def close(self) -> None:
        """End a write that is under way, and let go of the directory; later calls fail."""
        with self.lock:
            self._failure = "closed"
            self._database.close()

    def _get(self, outpoint: OutPoint) -> bytes | None:
        self._check()
        try:
            raw: bytes | None = self._database.get(outpoint.serialize(), verify_checksums=True)
        except plyvel.CorruptionError as error:
            raise DamagedEntry(_damaged(outpoint, error)) from error
        except plyvel.Error as error:
            msg = f"can't be read ({_text(error)})"
            raise LedgerFailed(msg) from error
        return raw

    def _check(self) -> None:
        if self._failure:
            raise LedgerFailed(self._failure)


def _open(path: Path) -> plyvel.DB:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_new = not (path / "CURRENT").exists()
        if is_new and any(file.suffix in _DATA for file in path.iterdir()):
            msg = f"{path} is damaged: it has data, but no CURRENT; move it away to begin a new one"
            raise LedgerFailed(msg)
        database = plyvel.DB(str(path), create_if_missing=True, **_OPTIONS)
        if is_new:
            sync_directory(path.parent)
    except (OSError, plyvel.Error) as error:
        raise LedgerFailed(_why_not_opened(path, error)) from error
    return database


def _why_not_opened(path: Path, error: Exception) -> str:
    text = _text(error)
    if isinstance(error, plyvel.CorruptionError):
        return f"{path} is damaged ({text}): move it away to begin a new one"
    if "LOCK" in text and isinstance(error, plyvel.IOError):
        return f"{path} is in use by another signer: stop it, or give each its own state_dir"
    return f"{path} can't be opened: {text}"


def _decoded(outpoint: OutPoint, raw: bytes) -> Signed:
    try:
        return decode_entry(raw)
    except DamagedEntry as error:
        raise DamagedEntry(_damaged(outpoint, error)) from error


def _damaged(outpoint: OutPoint, error: Exception) -> str:
    return f"what was signed for {outpoint} can't be told: {_text(error)}"


def _text(error: Exception) -> str:
    """Message of an error; plyvel's are bytes."""
    first = error.args[0] if error.args else ""
    return first.decode(errors="replace") if isinstance(first, bytes) else str(error)
