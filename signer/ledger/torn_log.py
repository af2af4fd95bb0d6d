"""The files of the ledger's log: what a power cut leaves behind the last whole write is cut off, and their sizes are known."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from paychan.protocol.leveldb_log import torn_tail


def cut_torn_tail(path: Path) -> bool:
    """Cut a torn tail off the newest log in a LevelDB directory; say whether there was one.

    Nothing in it was signed for: a signature leaves when its entry is on disk. Other damage stays, and stops the start.
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
    """Sizes of the logs that LevelDB would read when it is opened; there is always one. Raises OSError."""
    sizes = {}
    with os.scandir(path) as files:
        for file in files:
            if file.name.endswith(".log"):
                with suppress(FileNotFoundError):  # LevelDB removes one by and by, after it has begun another
                    sizes[file.name] = file.stat().st_size
    return sizes
