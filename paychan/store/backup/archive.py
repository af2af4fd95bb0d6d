"""The format of a backup: a zip archive, so that it can be read without this program.

    records         each record as stored, after its length (4 bytes, big endian)
    manifest.json   `Manifest`: the expected sums over the records
    comment         seal: SHA-256 of every byte of the file before it, as 64 hex digits

The seal covers the bytes that zip's own checksums leave out (headers, the directory), so any change and any truncation
is found. It protects against accidents, not against attackers: a process that can write the file can write a seal.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile, ZipInfo

import msgspec
from msgspec import Struct

from paychan.protocol.channel import Channel, State
from paychan.protocol.errors import DamagedRecord
from paychan.protocol.record import decode_record
from paychan.protocol.types import Sat, UnixTime
from paychan.store.leveldb.directory import WHAT_TO_DO

FORMAT = 1

SEAL_BYTES = 64

_RECORDS, _MANIFEST = "records", "manifest.json"
_LENGTH_BYTES = 4
_CHUNK_BYTES = 1 << 18

_UNSETTLED = (State.OPEN, State.CLOSING, State.PUBLISHED)

Progress = Callable[[int], None]
"""Called from time to time with the number of records processed so far."""


class BackupError(Exception):
    """A backup can't be created, trusted or restored; the message is one sentence with the reason and the remedy."""


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contents of a backup."""

    format: int
    network: str
    created_at: UnixTime
    paychan: str
    """Version of the program that wrote the backup."""
    records: int
    states: dict[str, int]
    """Number of channels by state."""
    unsettled_sat: Sat
    """Amount received in channels whose settlement is not final."""
    sha256: str
    """SHA-256 of `records`, in hex."""


class Tally:
    """Sums over the records read so far."""

    def __init__(self) -> None:
        self.records = 0
        self.states = Counter[str]({state.value: 0 for state in State})
        self.unsettled_sat = 0

    def add(self, channel: Channel) -> None:
        self.records += 1
        self.states[channel.state.value] += 1
        if channel.state in _UNSETTLED:
            self.unsettled_sat += channel.received_sat

    def differs(self, manifest: Manifest) -> str | None:
        """Return where the sums differ from the manifest, or None."""
        for name in ("records", "states", "unsettled_sat"):
            got, want = getattr(self, name), getattr(manifest, name)
            if got != want:
                return f"{name} is {got}, the manifest says {want}"
        return None


# --- writing --------------------------------------------------------------------------------------------------------


def write_archive(
    file: IO[bytes], records: Iterator[bytes], network: str, now: UnixTime, progress: Progress
) -> Manifest:
    """Write a whole backup into an empty file.

    Raises:
        BackupError: a record is damaged.
    """
    with ZipFile(file, "w") as archive:
        with archive.open(ZipInfo(_RECORDS), "w", force_zip64=True) as member:
            tally, digest = _write_records(records, member, progress)
        manifest = Manifest(
            format=FORMAT,
            network=network,
            created_at=now,
            paychan=version("paychan"),
            records=tally.records,
            states=dict(tally.states),
            unsettled_sat=Sat(tally.unsettled_sat),
            sha256=digest,
        )
        archive.writestr(ZipInfo(_MANIFEST), msgspec.json.format(msgspec.json.encode(manifest)))
        archive.comment = b"0" * SEAL_BYTES
    seal = digest_to_seal(file)
    file.seek(-SEAL_BYTES, os.SEEK_END)
    file.write(seal)
    return manifest


def _write_records(records: Iterator[bytes], member: IO[bytes], progress: Progress) -> tuple[Tally, str]:
    """Copy records in pieces so large that hashing and writing release the interpreter to the event loop."""
    tally, digest, piece = Tally(), hashlib.sha256(), bytearray()

    def flush() -> None:
        digest.update(piece)
        member.write(piece)
        piece.clear()
        progress(tally.records)

    for raw in records:
        try:
            tally.add(decode_record(raw))
        except DamagedRecord as error:
            msg = f"stored record number {tally.records + 1} is damaged ({error.fields['reason']}); {WHAT_TO_DO}"
            raise BackupError(msg) from error
        piece += framed(raw)
        if len(piece) >= _CHUNK_BYTES:
            flush()
    flush()
    return tally, digest.hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Manifest:
    """Read a backup's manifest without verifying it.

    Raises:
        BackupError: the file is no backup, or has another format.
        OSError: the file can't be read.
    """
    with _archive(path) as archive:
        if archive.namelist() != [_RECORDS, _MANIFEST]:
            msg = f"{path} is a zip archive, but not a backup of channels"
            raise BackupError(msg)
        raw = archive.read(_MANIFEST)
    try:
        found = msgspec.json.decode(raw)["format"]
        if found == FORMAT:
            return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, TypeError, KeyError) as error:
        msg = f"{path} has a manifest that can't be read: {error}"
        raise BackupError(msg) from None
    msg = f"{path} has backup format {found}, this program reads {FORMAT}; use the version that made it"
    raise BackupError(msg)


@contextmanager
def _archive(path: Path) -> Iterator[ZipFile]:
    try:
        with ZipFile(path) as archive:
            yield archive
    # zipfile raises these for bytes that are no readable archive: RuntimeError if they claim to be encrypted.
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        msg = f"{path} is not a backup, or is damaged: {error}"
        raise BackupError(msg) from error


def read_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a backup in the order of the file.

    Raises:
        BackupError: the archive, its checksum or the last record is damaged.
    """
    with _archive(path) as archive, archive.open(_RECORDS) as member:
        while head := member.read(_LENGTH_BYTES):
            size = int.from_bytes(head, "big")
            raw = member.read(size)
            if len(head) < _LENGTH_BYTES or len(raw) < size:
                msg = f"{path} is damaged: its last record is truncated"
                raise BackupError(msg)
            yield raw


def decoded(path: Path, raw: bytes) -> Channel:
    """Decode a record of a backup.

    Raises:
        BackupError: the record is damaged.
    """
    try:
        return decode_record(raw)
    except DamagedRecord as error:
        msg = f"{path} is damaged: {error.fields['reason']}"
        raise BackupError(msg) from error


def framed(raw: bytes) -> bytes:
    """Return a record with its length prefix, as it stands in `records`."""
    return len(raw).to_bytes(_LENGTH_BYTES, "big") + raw


def digest_to_seal(file: IO[bytes]) -> bytes:
    """Return the SHA-256, in hex, of a file without its last `SEAL_BYTES`; the file position is then at the seal."""
    left = max(file.seek(0, os.SEEK_END) - SEAL_BYTES, 0)
    file.seek(0)
    digest = hashlib.sha256()
    while left and (piece := file.read(min(left, _CHUNK_BYTES))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest().encode()
