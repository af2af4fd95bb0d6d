"""The signer's key pairs as objects in a token: made so that they can't leave it, found, and read together. For `keys`.

All functions raise `CryptokiError`, and `KeysFailed` for an object that is not as required.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from hashlib import sha256
from typing import NamedTuple

import structlog

from signer.keys.ring import KeysFailed
from signer.token.constants import Attribute, Code, CryptokiError, KeyType, ObjectClass
from signer.token.cryptoki import Attributes, Session
from signer.token.curve import SECP256K1, compressed_point

log = structlog.get_logger()

_PREFIX = b"paychan "
_PROGRESS_SECONDS = 1.0

_PROTECTED = {
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.ALWAYS_SENSITIVE: True,
    Attribute.NEVER_EXTRACTABLE: True,
    Attribute.LOCAL: True,
}
"""Required attributes of a private key: made in the token, and never able to leave it."""

_PUBLIC_WISHES = {Attribute.ENCRYPT: False, Attribute.WRAP: False}
_PRIVATE_WISHES = {
    Attribute.MODIFIABLE: False,
    Attribute.DECRYPT: False,
    Attribute.UNWRAP: False,
    Attribute.DERIVE: False,
}
"""Requested as well, and left out if a token does not know one: usable for signatures only, permanently."""

_TEMPLATE_REFUSED = {
    Code.ATTRIBUTE_READ_ONLY,
    Code.ATTRIBUTE_TYPE_INVALID,
    Code.ATTRIBUTE_VALUE_INVALID,
    Code.TEMPLATE_INCONSISTENT,
}


class KeyName(NamedTuple):
    """CKA_ID, which identifies a key, and CKA_LABEL, for operators. All labels of the signer begin with "paychan "."""

    identifier: bytes
    label: bytes

    @classmethod
    def single(cls, what: bytes) -> KeyName:
        """Name a key that exists once."""
        return cls(sha256(_PREFIX + what).digest(), _PREFIX + what)


class StoredKey(NamedTuple):
    """A key pair in the token. The handle is the private key's."""

    name: KeyName
    handle: int
    public_key: bytes


def handles(session: Session, kind: ObjectClass, identifier: bytes) -> list[int]:
    """Look up a key's objects of one kind. Slow in a full token."""
    return session.find({Attribute.CLASS: kind, Attribute.ID: identifier})


def look_up(session: Session, name: KeyName) -> StoredKey | None:
    """Look up one key. Slow in a full token."""
    private = handles(session, ObjectClass.PRIVATE_KEY, name.identifier)
    public = [_public_key(session, handle) for handle in handles(session, ObjectClass.PUBLIC_KEY, name.identifier)]
    if not private or not public:
        return None
    for handle in private:
        _check_protected(name, session.read(handle, list(_PROTECTED)))
    return StoredKey(name, private[0], min(public))


def make_key(session: Session, name: KeyName) -> StoredKey:
    """Make a key pair, and check that its private key can't leave the token; destroy it otherwise."""
    common: Attributes = {Attribute.TOKEN: True, Attribute.ID: name.identifier, Attribute.LABEL: name.label}
    public = {**common, Attribute.PRIVATE: False, Attribute.VERIFY: True, Attribute.EC_PARAMS: SECP256K1}
    private = {**common, Attribute.PRIVATE: True, Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
    private[Attribute.SIGN] = True
    try:
        pair = session.generate(public | _PUBLIC_WISHES, private | _PRIVATE_WISHES)
    except CryptokiError as error:
        if error.code not in _TEMPLATE_REFUSED:
            raise
        pair = session.generate(public, private)
    try:
        _check_protected(name, session.read(pair[1], list(_PROTECTED)))
        made = StoredKey(name, pair[1], _public_key(session, pair[0]))
    except KeysFailed:
        for handle in pair:
            session.destroy(handle)
        raise
    log.info("key made in the token", label=name.label.decode())
    return made


def read_keys(session: Session) -> list[StoredKey]:
    """Read all keys of the signer; log the progress if it takes long."""
    public: dict[bytes, bytes] = {}
    for handle in _with_progress("public keys read", _key_handles(session, ObjectClass.PUBLIC_KEY)):
        name = _name_of(session.read(handle, [Attribute.ID, Attribute.LABEL]))
        if name is not None:
            key = _public_key(session, handle)
            public[name.identifier] = min(key, public.get(name.identifier, key))
    keys = []
    for handle in _with_progress("private keys read", _key_handles(session, ObjectClass.PRIVATE_KEY)):
        values = session.read(handle, [Attribute.ID, Attribute.LABEL, *_PROTECTED])
        name = _name_of(values)
        if name is not None and name.identifier in public:
            _check_protected(name, values[2:])
            keys.append(StoredKey(name, handle, public[name.identifier]))
    return keys


def _key_handles(session: Session, kind: ObjectClass) -> list[int]:
    return session.find({Attribute.CLASS: kind, Attribute.KEY_TYPE: KeyType.EC})


def _name_of(values: list[bytes | None]) -> KeyName | None:
    identifier, label = values[:2]
    return KeyName(identifier, label) if identifier and label and label.startswith(_PREFIX) else None


def _with_progress(event: str, objects: list[int]) -> Iterator[int]:
    logged_at = time.monotonic()
    for number, handle in enumerate(objects):
        if time.monotonic() - logged_at > _PROGRESS_SECONDS:
            logged_at = time.monotonic()
            log.info(event, done=number, all=len(objects))
        yield handle


def _check_protected(name: KeyName, values: list[bytes | None]) -> None:
    wrong = [
        f"CKA_{attribute.name}"
        for (attribute, wanted), value in zip(_PROTECTED.items(), values, strict=True)
        if value != bytes([wanted])
    ]
    if wrong:
        label = name.label.decode(errors="replace")
        msg = f"key {label!r} was not made in the token, or may leave it: {', '.join(wrong)} has the wrong value"
        raise KeysFailed(msg)


def _public_key(session: Session, handle: int) -> bytes:
    try:
        return compressed_point(session.read(handle, [Attribute.EC_POINT])[0] or b"")
    except ValueError as error:
        msg = f"the token has another kind of key under a name of this signer: {error}"
        raise KeysFailed(msg) from None
