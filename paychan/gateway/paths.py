"""Paths of requests, read strictly, and the patterns of a price list that match them.

An upstream may read a path in another way than the gateway does: it may decode twice, drop dot segments, fold case. A path
that two programs could read differently is refused, so that no spelling of a priced path is free.
"""

from __future__ import annotations

import re
from typing import Generic, TypeVar
from unicodedata import normalize

from paychan.protocol.errors import AmbiguousPath

T = TypeVar("T")

MAX_PATH_BYTES = 2048
"""Longest path. Requests with longer paths are refused before they are matched."""

_PLAIN = re.compile(r"(?:/(?!\.\.?(?:/|\Z))[A-Za-z0-9\-._~!$&'()*+,=:@]++)*+/?\Z")
"""A path of RFC 3986 without an encoded character, an empty segment, a dot segment or `;`."""

_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")

_MUST_NOT_BE_ENCODED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
"""RFC 3986 6.2.2.2: encoded or not, these mean the same, so an encoded one is written to mislead."""

_SEPARATORS = frozenset(b'/\\?#;%"<>') | frozenset(range(0x20)) | {0x7F}
"""Characters that end or split a path for an upstream that decodes before it splits, or decodes twice."""


def segments(path: str) -> tuple[str, ...]:
    """Split a path into its segments for matching: decoded, ASCII letters in lower case, without a slash at the end.

    Frameworks differ in whether case and a slash at the end count. A seller's price must not depend on that, so here they
    never count; the upstream gets the path as the client wrote it.

    Raises:
        AmbiguousPath: another program could read the path differently.
    """
    if len(path) > MAX_PATH_BYTES:
        raise AmbiguousPath(reason=f"got {len(path)} characters, limit {MAX_PATH_BYTES}")
    if not _PLAIN.match(path) or not path:
        path = _decoded(path)
    return tuple(path.lower().rstrip("/").split("/")[1:])


def _decoded(path: str) -> str:
    if not path.startswith("/"):
        raise AmbiguousPath(reason='want a path that begins with "/"')
    if _BAD_PERCENT.search(path):
        raise AmbiguousPath(reason='"%" without two hex digits')
    for digits in _ENCODED.findall(path):
        byte = int(digits, 16)
        if byte in _MUST_NOT_BE_ENCODED or byte in _SEPARATORS:
            raise AmbiguousPath(reason=f"%{digits} is encoded: a character that needs no encoding, or that separates")
    if not _PLAIN.match(_ENCODED.sub("x", path)):
        raise AmbiguousPath(reason='an empty or dot segment, ";", or a character that must be encoded')
    try:
        return _ENCODED.sub(lambda found: chr(int(found[1], 16)), path).encode("latin1").decode()
    except UnicodeDecodeError:
        raise AmbiguousPath(reason="encoded bytes that are not UTF-8") from None


_HAS_READINGS = re.compile(r"%|\.(?:/|\Z)")
_STRUCTURE = re.compile(r"[/\\;%?#]|\A\.{1,2}\Z")


def other_readings(path: str, parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the segments as they are for upstreams that map characters to similar ones, or cut dots and spaces at an end.

    Full-width letters and composed accents are mapped by NFKC; file systems of Windows cut. The path may pass if every
    reading has the same price.

    Args:
        path: a path.
        parts: its `segments`.

    Raises:
        AmbiguousPath: a character that is mapped to a separator, or to a dot segment.
    """
    if not _HAS_READINGS.search(path):
        return []
    mapped = tuple(normalize("NFKC", part).lower() for part in parts)
    if any(_STRUCTURE.search(part) for part in mapped):
        raise AmbiguousPath(reason="a character that looks like a separator")
    cut = tuple(kept for part in mapped if (kept := part.rstrip(". ")))
    return [reading for reading in (mapped, cut) if reading != parts]


class Pattern:
    """A path of a price list: exact, with `*` for any one segment, and `**` at the end for any number of segments."""

    def __init__(self, text: str) -> None:
        """Read a pattern.

        Raises:
            ValueError: the text is no pattern; its text says the reason.
        """
        try:
            self.parts = segments(text)
        except AmbiguousPath as error:
            raise ValueError(error.fields["reason"]) from None
        if other_readings(text, self.parts):
            msg = "some programs read it in another way: want composed characters, and no dot or space at an end"
            raise ValueError(msg)
        if "**" in self.parts[:-1]:
            msg = '"**" stands for the rest of a path: want it at the end only'
            raise ValueError(msg)
        if any("*" in part and part not in ("*", "**") for part in self.parts):
            msg = '"*" stands for a whole segment: want it alone between slashes'
            raise ValueError(msg)
        self.text = text

    @property
    def _is_open(self) -> bool:
        return self.parts[-1:] == ("**",)

    def overlaps(self, other: Pattern) -> bool:
        """Return whether some path matches both."""
        if not (self._is_open or other._is_open) and len(self.parts) != len(other.parts):
            return False
        for place in range(max(len(self.parts), len(other.parts))):
            mine, theirs = self._part(place), other._part(place)
            if "**" in (mine, theirs):
                return True
            if mine == "" or theirs == "" or (mine != theirs and "*" not in (mine, theirs)):
                return False
        return True

    def contains(self, other: Pattern) -> bool:
        """Return whether every path that matches `other` also matches this pattern."""
        for place in range(max(len(self.parts), len(other.parts))):
            mine, theirs = self._part(place), other._part(place)
            if mine == "**":
                return True
            if theirs == "**" or mine == "" or theirs == "" or (mine not in (theirs, "*")):
                return False
        return True

    def crosses(self, other: Pattern) -> bool:
        """Return whether some path matches both, and each matches another path that the other does not."""
        return self.overlaps(other) and not self.contains(other) and not other.contains(self)

    def _part(self, place: int) -> str:
        """Return the part at a place; "" behind the end (no part is empty)."""
        return self.parts[place] if place < len(self.parts) else ""


class PathTree(Generic[T]):
    """Values by pattern; finds those of all patterns that match a path, the most special first.

    Of two patterns in the tree that match a path, one contains the other (`prices.py` refuses other lists). Then a literal
    before `*` before `**`, from left to right, is the order of containment.
    """

    def __init__(self) -> None:
        self._below: dict[str, PathTree[T]] = {}
        self._here: T | None = None
        self._rest: T | None = None

    def add(self, pattern: Pattern, value: T) -> None:
        """Add a value; the pattern must not be in the tree."""
        self._enter(pattern.parts, value)

    def _enter(self, parts: tuple[str, ...], value: T) -> None:
        if not parts:
            self._here = value
        elif parts == ("**",):
            self._rest = value
        else:
            self._below.setdefault(parts[0], PathTree[T]())._enter(parts[1:], value)  # noqa: SLF001 - of this class

    def matches(self, parts: tuple[str, ...], place: int = 0) -> list[T]:
        """Return the values of all patterns that match these segments, the most special first."""
        found: list[T] = []
        if place == len(parts):
            if self._here is not None:
                found.append(self._here)
        else:
            for name in (parts[place], "*"):
                below = self._below.get(name)
                if below is not None:
                    found += below.matches(parts, place + 1)
        if self._rest is not None:
            found.append(self._rest)
        return found
