"""The ledger's log after a power cut: bytes of a write that was never finished are cut off, and kept beside the ledger."""

from __future__ import annotations

import os
from pathlib import Path

from paychan.protocol.leveldblog import torn_tail


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
