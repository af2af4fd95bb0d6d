"""Encryption of the seed file's bytes: scrypt derives a key from a passphrase, ChaCha20-Poly1305 encrypts with it.

The file is one line of JSON. Its header has the parameters of the key derivation and is authenticated; a checksum over
all tells a damaged file from a wrong passphrase. The encoding is unique, so every changed byte is detected.
"""

from __future__ import annotations

import secrets
from hashlib import sha256

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from msgspec import Struct
from msgspec.structs import asdict

from signer.secret.wiping import wipe

VERSION = 1

_FORMAT = "paychan-seed"
_KEY_BYTES = 32
_TAG_BYTES = 16
_SALT_BYTES = 16
_NONCE_BYTES = 12
"""RFC 8439. Each file has a random salt, so a key encrypts once: a nonce can't be used twice."""

_CHECKSUM_BYTES = 8

MAX_COST_BYTES = 256 * 2**20
"""A file that requires more memory is refused before any is allocated."""

_BLOCKS = range(8, 33)
"""RFC 7914's r; it recommends 8."""

_MAX_LANES = 16


class Damaged(Exception):
    """These bytes are not an intact encrypted file; the text says how that shows."""


class WrongPassphrase(Exception):
    """The bytes are intact, but encrypted with another passphrase."""


class Cost(Struct, frozen=True):
    """RFC 7914's parameters: memory is 128 * n * r bytes."""

    n: int
    r: int = 8
    p: int = 1


CHOSEN = Cost(1 << 17)
"""For a passphrase that a person chose: each guess costs 128 MiB and about a second."""

DRAWN = Cost(1 << 10)
"""For a random passphrase of 256 bits, which can't be guessed at any speed."""


class _Header(Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    version: int
    kdf: str
    n: int
    r: int
    p: int
    salt: bytes
    aead: str
    nonce: bytes


class _File(_Header, frozen=True, forbid_unknown_fields=True):
    sealed: bytes
    checksum: bytes


class _Version(Struct):
    format: str
    version: int


def seal(content: bytes, passphrase: bytearray, cost: Cost) -> bytes:
    """Encrypt; the result differs each time."""
    header = _Header(
        _FORMAT,
        VERSION,
        "scrypt",
        cost.n,
        cost.r,
        cost.p,
        secrets.token_bytes(_SALT_BYTES),
        "chacha20-poly1305",
        secrets.token_bytes(_NONCE_BYTES),
    )
    key = _derive(header, passphrase)
    try:
        sealed = ChaCha20Poly1305(key).encrypt(header.nonce, content, msgspec.json.encode(header))
    finally:
        wipe(key)
    return _write(header, sealed)


def unseal(data: bytes, passphrase: bytearray) -> bytes:
    """Decrypt the output of `seal`.

    Raises:
        Damaged: it is no such output, or was changed.
        WrongPassphrase: it is intact, with another passphrase.
        MemoryError: too little memory to derive the key.
    """
    file = _read(data)
    header = _header(file)
    key = _derive(header, passphrase)
    try:
        return ChaCha20Poly1305(key).decrypt(header.nonce, file.sealed, msgspec.json.encode(header))
    except InvalidTag:
        raise WrongPassphrase from None
    finally:
        wipe(key)


def check(data: bytes) -> None:
    """Raise `Damaged` unless the bytes are an intact encrypted file; needs no passphrase."""
    _read(data)


def is_sealed(data: bytes | bytearray) -> bool:
    """Whether the bytes look like an encrypted file, intact or not."""
    return data.startswith(b"{")


def _derive(header: _Header, passphrase: bytearray) -> bytearray:
    key = bytearray(_KEY_BYTES)
    kdf = Scrypt(salt=header.salt, length=_KEY_BYTES, n=header.n, r=header.r, p=header.p)
    kdf.derive_into(passphrase, key)
    return key


def _header(file: _File) -> _Header:
    return _Header(**{name: getattr(file, name) for name in _Header.__struct_fields__})


def _write(header: _Header, sealed: bytes) -> bytes:
    start = msgspec.json.encode(header)
    checksum = sha256(start + sealed).digest()[:_CHECKSUM_BYTES]
    return msgspec.json.encode(_File(**asdict(header), sealed=sealed, checksum=checksum)) + b"\n"


def _read(data: bytes) -> _File:
    try:
        said = msgspec.json.decode(data, type=_Version)
        if said.format == _FORMAT and said.version > VERSION:
            msg = f"it has version {said.version} of a newer release; this release reads up to version {VERSION}"
            raise Damaged(msg)
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        msg = f"it is not an encrypted seed ({error})"
        raise Damaged(msg) from None
    if _write(_header(file), file.sealed) != data:
        msg = "its checksum is wrong"
        raise Damaged(msg)
    if not _usable(file):
        msg = "its header has parameters that no release has written"
        raise Damaged(msg)
    return file


def _usable(file: _File) -> bool:
    return (
        (file.format, file.version, file.kdf, file.aead) == (_FORMAT, VERSION, "scrypt", "chacha20-poly1305")
        and (len(file.salt), len(file.nonce)) == (_SALT_BYTES, _NONCE_BYTES)
        and len(file.sealed) >= _TAG_BYTES
        and file.n.bit_count() == 1
        and file.n > 1
        and file.r in _BLOCKS
        and 1 <= file.p <= _MAX_LANES
        and 128 * file.n * file.r <= MAX_COST_BYTES
    )
