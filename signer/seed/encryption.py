"""An encrypted file's bytes: scrypt makes a key of a passphrase, ChaCha20-Poly1305 seals with it. No file, no terminal.

The file is one line of JSON. Its header says how the key is made, and is sealed along; a checksum over all tells a
damaged file from a wrong passphrase. There is one way to write a file: every changed byte is found.
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
"""RFC 8439. A key seals once, since each file has a salt of its own: the nonce can't be used twice."""

_CHECKSUM_BYTES = 8

MAX_COST_BYTES = 256 * 2**20
"""A file that asks for more memory is refused before it gets any."""

_BLOCKS = range(8, 33)
"""RFC 7914's r, which it recommends to be 8."""

_MAX_LANES = 16


class Damaged(Exception):
    """These bytes are not what was sealed. The text says how that shows."""


class WrongPassphrase(Exception):
    """The bytes are whole, the passphrase is another."""


class Cost(Struct, frozen=True):
    """RFC 7914's parameters: memory is 128 * n * r bytes."""

    n: int
    r: int = 8
    p: int = 1


CHOSEN = Cost(1 << 17)
"""For a passphrase that a person chose: 128 MiB and about a second for each guess."""

DRAWN = Cost(1 << 10)
"""For a passphrase of 256 random bits: nobody guesses it, however fast."""


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
    """Encrypt; the same content never looks the same twice."""
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
    """Decrypt what `seal` made.

    Raises:
        Damaged: it is not that, or not any more.
        WrongPassphrase: it is, with another passphrase.
        MemoryError: too little memory to make the key.
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
    """Raise `Damaged` unless the bytes are a whole sealed file; needs no passphrase."""
    _read(data)


def is_sealed(data: bytes | bytearray) -> bool:
    """Whether the bytes look like a sealed file, whole or not."""
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
            msg = f"it is of version {said.version}, written by a newer release; this one reads up to {VERSION}"
            raise Damaged(msg)
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        msg = f"it is no encrypted seed any more ({error})"
        raise Damaged(msg) from None
    if _write(_header(file), file.sealed) != data:
        msg = "its checksum is wrong"
        raise Damaged(msg)
    if not _usable(file):
        msg = "its header asks for something that no release has written"
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
