"""Backups for tests: created from a real store, or forged."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import msgspec

from paychan.protocol.channel import Channel, State
from paychan.protocol.types import UnixTime
from paychan.store.backup import create as backup
from paychan.store.backup.archive import framed, read_manifest, read_records
from paychan.store.base import Change, Store, walk
from paychan.store.leveldb.store import LevelDbStore
from tests.contract.backends import NETWORK, Backend
from tests.lib.channels import NOW, Payer

NAME = f"paychan-{NETWORK}-20170714T024000Z.backup"


def one_of_each_state() -> list[Channel]:
    """Real channels, in the order of `State`."""
    return [Payer(state.value).history(state)[-1] for state in State]


async def put(store: Store, *channels: Channel) -> None:
    """Store fresh channels."""
    assert all(await store.commit([Change(None, channel) for channel in channels]))


def make(backend: Backend, directory: Path, channels: list[Channel], now: UnixTime = NOW) -> Path:
    """Create a backup of a store with these channels."""

    async def fill_and_create() -> Path:
        store = backend.open()
        try:
            await put(store, *channels)
            path, _ = await asyncio.to_thread(backup.create, store.snapshot, directory, NETWORK, now)
            return path
        finally:
            await store.close()

    return asyncio.run(fill_and_create())


def stored(directory: Path) -> dict[State, list[Channel]]:
    """Read all channels of a restored store through its index."""

    async def read() -> dict[State, list[Channel]]:
        store = LevelDbStore.open(directory, NETWORK, create=False)
        try:
            return {state: [channel async for channel in walk(store, state)] for state in State}
        finally:
            await store.close()

    return asyncio.run(read())


def names(directory: Path) -> list[str]:
    """List the names in a directory."""
    return sorted(path.name for path in directory.iterdir())


def frames(path: Path) -> list[bytes]:
    """Return the records of a backup with their length prefixes."""
    return [framed(raw) for raw in read_records(path)]


def forge(path: Path, frames: bytes, **changes: Any) -> Path:
    """Write a backup with a correct seal but forged content: records as framed bytes, manifest with changes."""
    manifest = {
        **msgspec.to_builtins(read_manifest(path)),
        "sha256": hashlib.sha256(frames).hexdigest(),
        **changes,
    }
    forged = path.with_name("forged.backup")
    with ZipFile(forged, "w", ZIP_DEFLATED) as archive:
        archive.writestr("records", frames)
        archive.writestr("manifest.json", msgspec.json.encode(manifest))
        archive.comment = b"0" * 64
    whole = forged.read_bytes()[:-64]
    forged.write_bytes(whole + hashlib.sha256(whole).hexdigest().encode())
    return forged
