"""Files of the ledger's LevelDB log: cuts off an unfinished write after a power cut, and measures the files."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from paychan.protocol.leveldb_log import torn_tail


def cut_torn_tail(path: Path) -> bool:
    """Cut a torn tail off the newest log in a LevelDB directory; return whether there was one.

    No signature depends on the tail: a signature is sent after its entry is on disk. Other damage stays, and stops the
    start.
    """
    newest = max(path.glob("[0-9]*.log"), default=None)
    content = newest.read_bytes() if newest is not None else b""
    offset = torn_tail(content)
    if newest is None or offset is None:
        return False
    path.with_name(f"{path.name}.torn-{newest.stem}-{offset}").write_bytes(content[offset:])
    with newest.open("r+b") as log:
        log.truncate(offset)
        os.fsync(log.fileno())
    return True


def sizes_of_logs(path: Path) -> dict[str, int]:
    """Sizes of the logs that LevelDB would read at its next start; there is always one. Raises OSError."""
    sizes = {}
    with os.scandir(path) as files:
        for file in files:
            if file.name.endswith(".log"):
                with suppress(FileNotFoundError):  # LevelDB removes an old one some time after it has created a new one
                    sizes[file.name] = file.stat().st_size
    return sizes
