"""The seed of a wallet: the keys of all new channels follow from it, and 12 to 24 words are its backup (BIP39, BIP32).

The file `wallet.seed` is made together with the wallet's first key. It holds the seed's entropy and the index of the
next key. An index is used once: it is durable before its key has an address, and processes take indices in turn.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
from coincurve import PrivateKey
from msgspec import Struct

from paychan.client.errors import DamagedFile, LaterFile, NoSeed, OtherSeed, WrongValue
from paychan.client.files import lock, read_private, write_private
from paychan.protocol.keytree import HARDENED, payer_descriptor, payer_key
from paychan.protocol.types import Network

NEW_ENTROPY_BYTES = 16
"""128 bits, which are 12 words: as much as a key of secp256k1 resists."""

SKIPPED_BY_RESTORE = 1000
"""Indices that a restored wallet leaves out: the keys of channels that were made after its backup."""

_ENTROPY_BYTES = (16, 20, 24, 28, 32)
_FILE, _LOCK = "wallet.seed", ".seed.lock"


class Seed(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A seed, and how many keys were derived from it."""

    format: Literal[1] = 1
    entropy: str
    """16 to 32 bytes, hex: what the words encode."""
    next_index: int = 0
    """Index of the next new key."""

    def __repr__(self) -> str:
        """Hide the entropy."""
        return f"Seed(next_index={self.next_index})"

    @property
    def words(self) -> list[str]:
        from paychan.shared.words import to_words

        return to_words(bytes.fromhex(self.entropy))

    def key(self, index: int) -> PrivateKey:
        """Derive the key m/"pchw"'/index'."""
        return next(self.keys([index]))

    def keys(self, indices: Sequence[int]) -> Iterator[PrivateKey]:
        """Derive the keys with these indices."""
        master = self._master()
        return (payer_key(master, index) for index in indices)

    def descriptor(self, network: Network) -> str:
        """Describe the addresses of all keys, with the private keys; see `payer_descriptor`."""
        return payer_descriptor(self._master(), network)

    def _master(self) -> bytes:
        from paychan.shared.words import to_seed

        return to_seed(bytes.fromhex(self.entropy))


def seed_of_words(words: Sequence[str], next_index: int = SKIPPED_BY_RESTORE) -> Seed:
    """Read a seed from its words; four letters of a word are enough. Raises `shared.words.WrongWords`."""
    from paychan.shared.words import to_entropy

    return Seed(entropy=to_entropy(words).hex(), next_index=next_index)


class SeedFile:
    """The seed of a wallet's directory."""

    def __init__(self, directory: Path) -> None:
        self.path, self._lock = directory / _FILE, directory / _LOCK

    def read(self) -> Seed:
        """Read the seed.

        Raises:
            NoSeed: the wallet has none.
            DamagedFile, LaterFile, LooseMode, UnreadableFile: the file can't be used.
        """
        if not os.path.lexists(self.path):
            raise NoSeed(directory=self.path.parent)
        raw = read_private(self.path)
        try:
            seed = msgspec.json.decode(raw, type=Seed)
            entropy = bytes.fromhex(seed.entropy)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            later = "unknown field" in str(error) or "$.format" in str(error)
            raise (LaterFile if later else DamagedFile)(path=self.path, reason=_without_content(error)) from None
        if len(entropy) not in _ENTROPY_BYTES or not 0 <= seed.next_index < HARDENED:
            raise DamagedFile(path=self.path, reason="it is no seed")
        return seed

    def new_key(self) -> tuple[PrivateKey, int]:
        """Take the next key, from a new seed if the wallet has none; return the key and its index. Raises as `read`."""
        with self._alone():
            try:
                seed = self.read()
            except NoSeed:
                seed = Seed(entropy=secrets.token_bytes(NEW_ENTROPY_BYTES).hex())
            self._write(msgspec.structs.replace(seed, next_index=seed.next_index + 1))
        return seed.key(seed.next_index), seed.next_index

    def key_again(self, index: int) -> tuple[PrivateKey, int]:
        """Derive the key of an earlier channel again; no later channel gets it. Raises as `read`, and `WrongValue`."""
        if not 0 <= index < HARDENED:
            raise WrongValue(what="index of a key", got=index, want=f"0 to {HARDENED - 1}")
        with self._alone():
            seed = self.read()
            if seed.next_index <= index:
                self._write(msgspec.structs.replace(seed, next_index=index + 1))
        return seed.key(index), index

    def put(self, seed: Seed) -> None:
        """Store the seed of a backup; of the same seed with another index, the higher index stays.

        Raises:
            OtherSeed: the wallet has another seed, which stays.
            DamagedFile, LaterFile, LooseMode, UnreadableFile: see `read`.
        """
        with self._alone():
            try:
                old = self.read()
            except NoSeed:
                old = seed
            if old.entropy != seed.entropy:
                raise OtherSeed(directory=self.path.parent)
            self._write(max(old, seed, key=lambda each: each.next_index))

    def _write(self, seed: Seed) -> None:
        write_private(self.path, msgspec.json.format(msgspec.json.encode(seed)) + b"\n")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes and threads out while the seed is read and written."""
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)


def _without_content(error: Exception) -> str:
    """Describe an error without the text that was read, which may hold the secret."""
    return str(error) if isinstance(error, msgspec.MsgspecError) else "the entropy is not hex"
