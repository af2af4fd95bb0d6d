"""The payer's wallet: a directory with one seed and one file per channel, which only its owner may read.

The keys of new channels follow from the seed (`seed.py`). Each channel's file holds its own key as well, so files of
earlier versions, whose keys are random, stay usable. A file or directory that others may use is refused.

A file is replaced as a whole (temporary file, sync, rename, sync of the directory), so a crash leaves the old record or
the new one. A process that uses a channel holds a lock on `NAME.lock`; readers need no lock.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import msgspec

from paychan.client.errors import (
    AmbiguousName,
    ChannelForgotten,
    ChannelInUse,
    DamagedFile,
    LaterFile,
    NoPlace,
    NoSuchChannel,
    NotADirectory,
    RecordNotWritten,
    WalletError,
)
from paychan.client.files import check_mode, lock, read_private, sync_directory, write_private
from paychan.client.record import ChannelRecord, check_amounts, check_record
from paychan.client.seed import SeedFile
from paychan.protocol.errors import PaychanError
from paychan.shared.places import wallet_place

FORGOTTEN = "forgotten"
"""Directory of the files of channels that the user took off the list: they hold keys, so none is deleted."""

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(ChannelRecord)


class ChannelFile:
    """One channel's file, locked for this process from construction to `release` (or the object's end)."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory, self._name = directory, name
        descriptor = os.open(directory / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            lock(descriptor)
        except BlockingIOError:
            self.release()
            raise ChannelInUse(name=name) from None

    def save(self, record: ChannelRecord) -> None:
        """Replace the file. After this returns, the record survives a power loss.

        Raises:
            RecordNotWritten: `Wallet.read` could not read the record again; the file stays as it was.
        """
        path = self._directory / f"{self._name}.json"
        try:
            encoded = _ENCODER.encode(record)
            check_amounts(_DECODER.decode(encoded))
        except (msgspec.MsgspecError, PaychanError, TypeError, ValueError, OverflowError) as error:
            raise RecordNotWritten(path=path, reason=error) from None
        write_private(path, msgspec.json.format(encoded) + b"\n")

    def forget(self) -> Path:
        """Move the file to the directory `forgotten` of the wallet and unlock it; return its new place."""
        place = self._directory / FORGOTTEN
        place.mkdir(mode=0o700, exist_ok=True)
        there = place / f"{self._name}.json"
        (self._directory / f"{self._name}.json").replace(there)
        sync_directory(place)
        sync_directory(self._directory)
        (self._directory / f"{self._name}.lock").unlink(missing_ok=True)
        self.release()
        return there


class Wallet:
    """The channels of one directory. The directory is created, mode 0700, if it is missing.

    Raises:
        LooseMode: others than the owner may use the directory.
        NotADirectory: there is a file.
        NoPlace: the directory can't be made, or no directory is named and the user has no home directory.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        chosen = directory or os.environ.get("PAYCHAN_WALLET")
        try:
            self.directory = Path(chosen).expanduser() if chosen else wallet_place().directory
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectory(path=self.directory) from None
        except RuntimeError:
            raise NoPlace(path=chosen or "~", reason="this user has no home directory") from None
        except OSError as error:
            raise NoPlace(path=self.directory, reason=error.strerror) from None
        check_mode(self.directory, self.directory.stat())
        self.seed = SeedFile(self.directory)

    def names(self) -> list[str]:
        """List the channels by name."""
        return sorted(path.stem for path in self.directory.glob("[!.]*.json"))

    def find(self, prefix: str) -> str:
        """Complete the beginning of a channel's name.

        Raises:
            ChannelForgotten: only the name of a forgotten channel begins so.
            NoSuchChannel: no name begins so.
            AmbiguousName: several do; the error names them.
        """
        matches = [name for name in self.names() if name.startswith(prefix)] if prefix else []
        if prefix in matches:
            return prefix
        if len(matches) > 1:
            raise AmbiguousName(name=prefix, names=", ".join(sorted(matches)))
        if not matches:
            forgotten = self.forgotten()
            left = [name for name in forgotten.names() if name.startswith(prefix)] if prefix and forgotten else []
            if left and forgotten:
                path = forgotten.directory / f"{left[0]}.json"
                raise ChannelForgotten(name=left[0], path=path, directory=self.directory)
            raise NoSuchChannel(name=prefix if prefix.strip() else f'"{prefix}"', directory=self.directory)
        return matches[0]

    def forgotten(self) -> Wallet | None:
        """Return the channels that the user took off the list; None if there never were any. Raises `LooseMode`."""
        place = self.directory / FORGOTTEN
        return Wallet(place) if place.is_dir() else None

    def read_kept(self, prefix: str) -> ChannelRecord:
        """Read a channel without locking it, by the beginning of its name: one of the list, or a forgotten one.

        Raises as `find` and `read`.
        """
        try:
            return self.read(self.find(prefix))
        except ChannelForgotten as error:
            return Wallet(self.directory / FORGOTTEN).read(error.fields["name"])

    def create(self, record: ChannelRecord) -> ChannelFile:
        """Lock and write a new channel's file.

        Raises:
            FileExistsError: the name is taken.
        """
        file = ChannelFile(self.directory, record.name)
        if (self.directory / f"{record.name}.json").exists():
            file.release()
            raise FileExistsError(record.name)
        file.save(record)
        return file

    def lock(self, name: str) -> ChannelFile:
        """Lock a channel's file without reading it. Raises `ChannelInUse`."""
        return ChannelFile(self.directory, name)

    def open(self, prefix: str) -> tuple[ChannelFile, ChannelRecord]:
        """Lock a channel's file, then read it."""
        name = self.find(prefix)
        file = ChannelFile(self.directory, name)
        try:
            return file, self.read(name)
        except WalletError:
            file.release()
            raise

    def read(self, name: str) -> ChannelRecord:
        """Read a channel without locking it. A renamed file gives its channel the new name.

        Raises:
            DamagedFile: not a record, or its keys and addresses contradict each other.
            LaterFile: written by a later version.
            LooseMode: others than its owner may use it.
            UnreadableFile: the system refuses to read it.
        """
        path = self.directory / f"{name}.json"
        raw = read_private(path)
        try:
            record = _DECODER.decode(raw)
            check_record(record)
        except (msgspec.MsgspecError, PaychanError, ValueError, RecursionError) as error:
            if _is_later(raw, str(error)):
                raise LaterFile(path=path, reason=error) from None
            reason = "it is empty" if not raw.strip() else error
            raise DamagedFile(path=path, reason=reason) from None
        return record if record.name == name else msgspec.structs.replace(record, name=name)

    def read_all(self) -> tuple[list[ChannelRecord], dict[str, WalletError]]:
        """Read every channel separately; return the records, and the errors of unreadable channels by name."""
        records: list[ChannelRecord] = []
        problems: dict[str, WalletError] = {}
        for name in self.names():
            try:
                records.append(self.read(name))
            except WalletError as error:
                problems[name] = error
        return records, problems


class _Format(msgspec.Struct):
    format: int


def _is_later(raw: bytes, reason: str) -> bool:
    """Say whether an unreadable file comes from a later version: a higher format number, unknown fields or kind."""
    try:
        found = msgspec.json.decode(raw, type=_Format)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return found.format > 1 or "unknown field" in reason or "unknown channel kind" in reason
