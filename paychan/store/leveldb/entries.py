"""Walks over a LevelDB that may be damaged, and the index entries that such a walk misses.

LevelDB skips a block that it can't read, and from then on its iterators report the error with every step. plyvel's
iterator raises that error in place of each entry, and ends without an error if no entry follows the damage. So a walk
that meets damage goes on with plyvel's raw iterator, which has the entries all the same.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from heapq import merge

import plyvel

from paychan.shared.leveldb_files import error_text

UNREADABLE = (plyvel.CorruptionError, plyvel.IOError)
"""A block with a wrong checksum, or one that the disk does not return."""

_LAST_BLOCKS = "the last blocks can't be read"
_REST = 20
"""Pause between two searches for missing index entries, as a multiple of the time that the last one took."""
_REST_SECONDS = 60.0


def entries(
    moment: plyvel.Snapshot, begin: bytes, end: bytes, damaged: Callable[[str], None], *, fill_cache: bool = True
) -> Generator[tuple[bytes, bytes], None, None]:
    """Yield the readable entries from `begin` up to, and without, `end`; call `damaged` once if others are unreadable.

    `end` must be at or before the last key of the database. The caller closes the iterator, or reads it to its end.
    """
    after, reason = begin, _LAST_BLOCKS
    try:
        with moment.iterator(start=begin, verify_checksums=True, fill_cache=fill_cache) as found:
            for entry in found:
                if entry[0] >= end:
                    return
                after = entry[0] + b"\x00"  # the next possible key
                yield entry
    except UNREADABLE as error:
        reason = error_text(error)
    damaged(reason)
    yield from _readable(moment, after, end, fill_cache)


def _readable(moment: plyvel.Snapshot, begin: bytes, end: bytes, fill_cache: bool) -> Iterator[tuple[bytes, bytes]]:
    with closing(moment.raw_iterator(verify_checksums=True, fill_cache=fill_cache)) as place:
        with suppress(*UNREADABLE):
            place.seek(begin)
        while place.valid() and place.key() < end:
            yield place.item()
            with suppress(*UNREADABLE):
                place.next()


class MissingKeys:
    """Index keys that a damaged index lacks, found from the records. Used by several threads."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._again_at = 0.0

    @property
    def is_outdated(self) -> bool:
        """Whether to search now; a search reads all records, so it waits some time after the one before."""
        return time.monotonic() >= self._again_at

    def search(self, keys: Iterable[bytes], is_readable: Callable[[bytes], bool]) -> None:
        """Keep those of these keys, one of each record, that the index does not have any more."""
        begun = time.monotonic()
        self._keys = sorted(key for key in keys if not is_readable(key))
        ended = time.monotonic()
        self._again_at = ended + max(_REST_SECONDS, _REST * (ended - begun))

    def merged(self, keys: Iterator[bytes], begin: bytes, end: bytes) -> Iterator[bytes]:
        """Merge the missing keys of a range into the sorted keys of a walk; no key occurs twice."""
        missing = self._keys
        if not missing:
            yield from keys
            return
        last = b""
        for key in merge(keys, missing[bisect_left(missing, begin) : bisect_left(missing, end)]):
            if key != last:
                yield key
            last = key
