"""Signatures of the server's requests to the application, by the Standard Webhooks scheme, and the file of the keys.

Standard Webhooks 1.0.0 (https://www.standardwebhooks.com): "The content to sign is the msg_id.timestamp.payload", joined by
full stops; the signature is HMAC-SHA256 in base64 behind `v1,`; several signatures are separated by spaces; a key is
`whsec_` and 24 to 64 bytes in base64. Libraries in many languages verify this scheme.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from paychan.protocol.types import UnixTime

PREFIX = "whsec_"

_MOST_KEYS = 2
_LEAST_BYTES, _MOST_BYTES, _DRAWN_BYTES = 24, 64, 32
_ACCESS_OF_OTHERS = 0o077


class KeyFileError(Exception):
    """The file of the keys can't be used; the message names the file and the remedy."""


def signature_headers(keys: Sequence[bytes], message_id: str, now: UnixTime, body: bytes) -> dict[str, str]:
    """Return the three headers of a request: a receiver that has any one of the keys can verify it."""
    content = f"{message_id}.{now}.".encode() + body
    signatures = (base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode() for key in keys)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(now),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def load_keys(path: Path) -> tuple[bytes, ...]:
    """Read one key, or two during a rotation, one on a line; lines with `#` in front are comments.

    If there is no file, a key is drawn and written to it with mode 0600.

    Raises:
        KeyFileError: other users have access to the file, it holds no valid key, or it can't be read or written.
    """
    try:
        if not path.exists():
            _draw(path)
        _check_access(path)
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: the keys for the application can't be read: {error}"
        raise KeyFileError(msg) from error
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(_key(path, line) for line in lines if line and not line.startswith("#"))
    if not 1 <= len(keys) <= _MOST_KEYS:
        msg = f"{path} holds {len(keys)} keys, need 1 or {_MOST_KEYS}: one on a line"
        raise KeyFileError(msg)
    return keys


def _draw(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(PREFIX + base64.b64encode(secrets.token_bytes(_DRAWN_BYTES)).decode() + "\n")
        file.flush()
        os.fsync(file.fileno())


def _check_access(path: Path) -> None:
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        msg = f"{path} is no regular file; it must hold the keys for the application"
        raise KeyFileError(msg)
    if mode & _ACCESS_OF_OTHERS:
        msg = f"{path} has mode {mode:04o}, other users can read or change the keys: `chmod 600 {path}`"
        raise KeyFileError(msg)
    if status.st_uid not in (os.geteuid(), 0):
        msg = f"{path} belongs to uid {status.st_uid}, this is uid {os.geteuid()}: `chown` it"
        raise KeyFileError(msg)


def _key(path: Path, line: str) -> bytes:
    try:
        key = base64.b64decode(line.removeprefix(PREFIX), validate=True) if line.startswith(PREFIX) else b""
    except binascii.Error:
        key = b""
    if not _LEAST_BYTES <= len(key) <= _MOST_BYTES:
        msg = f"{path}: a key is {PREFIX} and {_LEAST_BYTES} to {_MOST_BYTES} bytes in base64; one line is not"
        raise KeyFileError(msg)
    return key
