"""Opens the directory of a ledger, and explains why it can't be opened."""

from __future__ import annotations

from pathlib import Path

import plyvel

from paychan.shared.holders import holder_of_lock
from paychan.shared.leveldb_files import cut_torn_tail, error_text, is_held, sync_directory
from signer.ledger.base import LedgerFailed

OPTIONS = {
    # A damaged log is an error when the ledger is opened; by default LevelDB drops what follows the damage.
    "paranoid_checks": True,
    # Most lookups of an outpoint that was never signed for (all but 1 %) need no disk read.
    "bloom_filter_bits": 10,
    # Off: keys, hashes and signatures do not compress.
    "compression": None,
}

_DATA = (".ldb", ".sst", ".log")
"""If such files exist but the file CURRENT does not, LevelDB would start an empty database and delete them."""


def opened(path: Path) -> plyvel.DB:
    """Open a ledger's directory, or create it; an unfinished write of a power cut is cut off its log.

    Raises:
        LedgerFailed: in use, damaged, of another kind, or not accessible.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_new = not (path / "CURRENT").exists()
        if is_new and any(file.suffix in _DATA for file in path.iterdir()):
            msg = f"{path} is damaged: it has data, but no CURRENT; move it away to start a new ledger"
            raise LedgerFailed(msg)
        try:
            database = plyvel.DB(str(path), create_if_missing=True, **OPTIONS)
        except plyvel.CorruptionError:
            if cut_torn_tail(path) is None:
                raise
            database = plyvel.DB(str(path), create_if_missing=False, **OPTIONS)
        if is_new:
            sync_directory(path.parent)
    except (OSError, plyvel.Error) as error:
        raise LedgerFailed(why_not_opened(path, error)) from error
    return database


def why_not_opened(path: Path, error: Exception) -> str:
    text = error_text(error)
    if isinstance(error, plyvel.CorruptionError):
        return f"{path} is damaged ({text}): move it away to start a new ledger"
    if is_held(text) and isinstance(error, plyvel.IOError):
        return f"{path} is in use by {holder_of_lock(path / 'LOCK')}: stop that signer, or give each signer a separate state_dir"
    return f"{path} can't be opened: {text}"
