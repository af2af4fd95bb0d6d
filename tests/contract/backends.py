"""The store's backends for the contract suite: open a store, and read or write its bytes directly."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import plyvel

from paychan.protocol.types import OutPoint
from paychan.store.base import Store
from paychan.store.leveldb.store import LevelDbStore

NETWORK = "test"


class Backend(Protocol):
    """A backend with its own directory for one test. `raw` and `put_raw` may be used only while no store is open."""

    def open(self) -> Store:
        """Open the store; it keeps its earlier content."""

    def raw(self, outpoint: OutPoint) -> bytes | None:
        """Read a record's bytes."""

    def put_raw(self, outpoint: OutPoint, raw: bytes) -> None:
        """Write a record's bytes, as a failing disk would."""


class LevelDbBackend:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "store"

    def open(self) -> LevelDbStore:
        return LevelDbStore.open(self.path, NETWORK)

    def raw(self, outpoint: OutPoint) -> bytes | None:
        database = plyvel.DB(str(self.path))
        try:
            return database.get(b"c" + outpoint.serialize())
        finally:
            database.close()

    def put_raw(self, outpoint: OutPoint, raw: bytes) -> None:
        database = plyvel.DB(str(self.path))
        try:
            database.put(b"c" + outpoint.serialize(), raw, sync=True)
        finally:
            database.close()


BACKENDS = {"leveldb": LevelDbBackend}
