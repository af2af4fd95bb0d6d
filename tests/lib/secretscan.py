"""Search the output of a program for secrets, in every encoding that the output could have."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from urllib.parse import quote

from bitcoin.base58 import encode as base58
from bitcoin.core import Hash

_WIF_VERSIONS = (0x80, 0xEF)
_WORDS_IN_A_ROW = 3

_ZEROS = re.compile(rb"\x00{128,}")
"""No secret has 128 zeros in a row, so the zeros of a reserve file, 64 MB, are not searched for each form."""


class Secrets:
    """Secrets by name; `found_in` names the secrets within some bytes.

    A long secret is also searched for by its halves: half a key on display saves half of the work of finding it.
    """

    def __init__(self) -> None:
        self._forms: dict[str, set[bytes]] = {}
        self._patterns: dict[str, re.Pattern[bytes]] = {}

    def add(self, name: str, secret: bytes | str) -> None:
        """Add bytes to search for, or a text without common parts."""
        raw = secret.encode() if isinstance(secret, str) else bytes(secret)
        assert len(raw) >= 12, f"{name} is too short: it could occur by chance"
        parts = [raw] if isinstance(secret, str) or len(raw) < 32 else [raw[: len(raw) // 2], raw[len(raw) // 2 :]]
        forms = {form for part in parts for form in _forms(part)}
        if isinstance(secret, str):
            forms.add(quote(secret, safe="").encode())
        if len(raw) == 32:
            forms |= set(_numbers(raw)) | set(_wallet_forms(raw))
        self._forms[name] = forms

    def add_words(self, name: str, words: list[str]) -> None:
        """Add words to search for in their order, with any separator: spaces, numbers, columns, quotes."""
        self.add(f"{name} as text", " ".join(words))
        rows = [words[start : start + _WORDS_IN_A_ROW] for start in range(len(words) - _WORDS_IN_A_ROW + 1)]
        alternatives = (rb"[^A-Za-z]+".join(word.encode() for word in row) for row in rows)
        self._patterns[name] = re.compile(b"|".join(alternatives), re.IGNORECASE)

    def found_in(self, data: bytes, but: frozenset[str] = frozenset()) -> list[str]:
        """Return the names of the secrets within `output`, except those in `but`, which may be there."""
        data = _ZEROS.sub(bytes(128), data)
        lower = data.lower()
        found = [name for name, forms in self._forms.items() if any(form in data or form in lower for form in forms)]
        found += [name for name, pattern in self._patterns.items() if pattern.search(data)]
        return sorted(set(found) - but)

    @property
    def names(self) -> list[str]:
        return sorted({*self._forms, *self._patterns})


def _forms(raw: bytes) -> Iterator[bytes]:
    yield from (raw, raw[::-1], raw.hex().encode(), raw[::-1].hex().encode())
    yield repr(raw)[2:-1].encode()
    yield raw.hex(" ").encode()
    yield raw.hex(":").encode()
    yield ", ".join(map(str, raw)).encode()
    yield ",".join(map(str, raw)).encode()
    for offset in range(3):  # inside of a longer text, where three bytes make four letters
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(offset) + raw)[4 * (offset > 0) :].rstrip(b"=")[:-1]
    yield base64.b32encode(raw).rstrip(b"=")[:-1]


def _numbers(raw: bytes) -> Iterator[bytes]:
    for number in (int.from_bytes(raw, "big"), int.from_bytes(raw, "little")):
        yield str(number).encode()
        yield f"{number:x}".encode()


def _wallet_forms(raw: bytes) -> Iterator[bytes]:
    """Return a private key in wallet import format."""
    for version in _WIF_VERSIONS:
        for tail in (b"", b"\x01"):
            payload = bytes([version]) + raw + tail
            yield base58(payload + Hash(payload)[:4]).encode()
