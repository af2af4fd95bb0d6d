"""The seed file: the only secret on disk, encrypted, and readable by the signer's user only.

One file holds all generations of seeds, the newest first. A rotation or a new passphrase replaces the file by another
one, so at every moment the keys are complete, and there is one file to keep a copy of. It does not store `key.mode`:
the words on paper don't either, so the trees of both modes are derived from each seed.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from bitcoin.core import Hash160
from msgspec import Struct

from paychan.protocol.keytree import Node
from paychan.protocol.types import UnixTime
from paychan.shared import words as mnemonic
from signer.keys.ring import DEBUG_KEY
from signer.secret.file import (
    MissingFile,
    PrivateFileError,
    create_private,
    exclusively,
    read_private,
    replace_private,
)
from signer.secret.sources import Secret
from signer.secret.wiping import wipe
from signer.seed.encryption import Cost, Damaged, WrongPassphrase, is_sealed, seal, unseal

ENTROPY_BYTES = 32
RAW_BYTES = range(16, 65)
"""BIP32 takes seeds of 128 to 512 bits."""

_MAX_FILE_BYTES = 1 << 16
_PLAIN = re.compile(rb"[0-9a-f]{64}\n?")


class SeedError(Exception):
    """The seed can't be used; the text says how to mend it. Never holds any content of the file."""


class Seed(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One generation: all keys of a period are derived from it."""

    kind: Literal["bip39", "raw"]
    secret: bytes
    """BIP39's entropy, or BIP32's seed as it is."""
    created: UnixTime

    @property
    def master(self) -> bytes:
        """The seed of BIP32's tree."""
        return mnemonic.to_seed(self.secret) if self.kind == "bip39" else self.secret

    @property
    def root(self) -> Node:
        return Node.from_seed(self.master)

    @property
    def fingerprint(self) -> str:
        """BIP32's fingerprint of the master key: identifies a generation, and reveals no key."""
        return bytes(Hash160(self.root.key.public_key.format())[:4]).hex()

    def __repr__(self) -> str:
        return f"Seed({self.kind})"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [("kind", self.kind)]


def draw_seed(now: UnixTime) -> Seed:
    """Draw a random seed."""
    return Seed("bip39", secrets.token_bytes(ENTROPY_BYTES), now)


def seed_of_words(words: Sequence[str], now: UnixTime) -> Seed:
    """Take a seed from its backup words.

    Raises:
        SeedError: the words are no valid backup.
    """
    try:
        return checked(Seed("bip39", mnemonic.to_entropy(words), now))
    except mnemonic.WrongWords as error:
        raise SeedError(str(error)) from None


def seed_of_hex(text: str, now: UnixTime) -> Seed:
    """Take a raw BIP32 seed: of an old seed file, or the root seed of another RBPCP v2 server.

    Raises:
        SeedError: the text is no such seed.
    """
    try:
        raw = bytes.fromhex(text.strip())
    except ValueError:
        raw = b""
    if len(raw) not in RAW_BYTES:
        msg = f"this is no seed: {2 * RAW_BYTES[0]} to {2 * RAW_BYTES[-1]} hex digits and nothing else"
        raise SeedError(msg)
    return checked(Seed("raw", raw, now))


def checked(seed: Seed) -> Seed:
    """Return the seed unless it is the debug key. Raises `SeedError`."""
    if seed.secret == DEBUG_KEY:
        msg = "this is the publicly known debug key: create a seed of your own"
        raise SeedError(msg)
    return seed


def read_seeds(path: Path, passphrase: Secret) -> tuple[Seed, ...]:
    """Open the file: all generations, the newest first.

    Raises:
        SeedError: missing, not a private file of this user, in plain text, damaged, or of another passphrase.
    """
    return _open(path, _read(path), passphrase)


def read_plain_seed(path: Path, now: UnixTime) -> Seed:
    """Read an unencrypted seed file of an earlier release.

    Raises:
        SeedError: missing, not a private file of this user, or other content.
    """
    content = _read(path, plain=True)
    try:
        if is_sealed(content):
            msg = f"{path} is encrypted already: `paychan-signer passphrase FILE` changes its passphrase"
            raise SeedError(msg)
        if not _PLAIN.fullmatch(content):
            msg = f"{path} does not hold 64 lower-case hex digits and nothing else: restore it from the backup"
            raise SeedError(msg)
        return seed_of_hex(content.decode(), now)
    finally:
        wipe(content)


def create_seeds(path: Path, seeds: Sequence[Seed], passphrase: Secret, cost: Cost) -> None:
    """Write a new file.

    Raises:
        SeedError: the file exists and was left alone, or it can't be written.
    """
    try:
        with exclusively(path):
            create_private(path, _seal(path, seeds, passphrase, cost))
    except PrivateFileError as error:
        hint = ": a new seed would lose the keys of open channels" if "left alone" in str(error) else ""
        msg = f"{error}{hint}"
        raise SeedError(msg) from None


def change_seeds(
    path: Path,
    passphrase: Secret,
    cost: Cost,
    change: Callable[[tuple[Seed, ...]], Sequence[Seed]] = tuple,
    new_passphrase: Secret | None = None,
) -> tuple[Seed, ...]:
    """Replace the file by a changed one; return the new content.

    Raises:
        SeedError: the old one can't be opened, or the new one can't be written; then the old one is unchanged.
    """
    try:
        with exclusively(path):
            seeds = tuple(change(read_seeds(path, passphrase)))
            replace_private(path, _seal(path, seeds, new_passphrase or passphrase, cost))
    except PrivateFileError as error:
        raise SeedError(str(error)) from None
    return seeds


def encrypt_plain_seed(path: Path, passphrase: Secret, cost: Cost, now: UnixTime) -> Seed:
    """Replace an unencrypted file by an encrypted one.

    Raises:
        SeedError: it is no unencrypted seed file, or the new one can't be written; then the old one is unchanged.
    """
    try:
        with exclusively(path):
            seed = read_plain_seed(path, now)
            replace_private(path, _seal(path, [seed], passphrase, cost))
    except PrivateFileError as error:
        raise SeedError(str(error)) from None
    return seed


def refuse_missing(path: Path) -> None:
    """Raise `SeedError` if there is no seed file: this comes before the question for its passphrase."""
    try:
        path.lstat()
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError:  # reading it names the problem
        return


def _missing(path: Path) -> SeedError:
    return SeedError(
        f"there is no {path}: restore it from the backup, with `paychan-signer recover FILE` if the backup is words, "
        "or create a new one with `paychan-signer init FILE`"
    )


def _read(path: Path, *, plain: bool = False) -> bytearray:
    try:
        content = read_private(path, _MAX_FILE_BYTES)
    except MissingFile:
        raise _missing(path) from None
    except PrivateFileError as error:
        raise SeedError(str(error)) from None
    if not plain and _PLAIN.fullmatch(content):
        wipe(content)
        msg = f"{path} holds a seed that is not encrypted: `paychan-signer encrypt FILE` encrypts it and keeps the keys"
        raise SeedError(msg)
    return content


def _open(path: Path, content: bytes | bytearray, passphrase: Secret) -> tuple[Seed, ...]:
    try:
        seeds = msgspec.msgpack.decode(unseal(bytes(content), passphrase.value), type=tuple[Seed, ...])
    except WrongPassphrase:
        msg = f"{path}: wrong passphrase"
        raise SeedError(msg) from None
    except (Damaged, msgspec.DecodeError) as error:
        reason = error if isinstance(error, Damaged) else "its content is no seed"
        msg = (
            f"{path} is damaged, {reason}: restore it from the backup, or `paychan-signer recover FILE` from the words"
        )
        raise SeedError(msg) from None
    except MemoryError:
        msg = f"{path}: too little memory to open it: about 150 MiB must be free at the start"
        raise SeedError(msg) from None
    if not seeds:
        msg = f"{path} holds no seed"
        raise SeedError(msg)
    return tuple(map(checked, seeds))


def _seal(path: Path, seeds: Sequence[Seed], passphrase: Secret, cost: Cost) -> bytes:
    """Encrypt, and decrypt the result as a test before it replaces a file."""
    content = seal(msgspec.msgpack.encode(tuple(seeds)), passphrase.value, cost)
    if _open(path, content, passphrase) != tuple(seeds):
        msg = f"{path} was left alone: the encrypted seed can't be decrypted again; check this machine's memory"
        raise SeedError(msg)
    return content
