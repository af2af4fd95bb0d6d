"""The end of a LevelDB log: distinguishes a torn tail, which was never acknowledged, from damage.

A log is a sequence of blocks of 32 KiB. A block holds physical records, each after a header of 7 bytes: CRC-32C of type
and data (masked), length (little endian), type (doc/log_format.md). A record that a power cut tore is the last one in
the log. If such a record ends too early, LevelDB itself treats it as the end of the log. LevelDB refuses a log with any
other invalid tail, although cutting the tail off loses no complete write, and so no acknowledged one.

A record with a correct header and length but a wrong checksum may have been acknowledged and damaged later, so it is no
torn tail. One exception: if its last sector is all zeros, that sector was never written.
"""

from __future__ import annotations

from collections.abc import Iterator

_BLOCK = 32_768
_HEADER = 7
_SECTOR = 512
_FULL, _FIRST, _LAST = 1, 2, 4
_PUT = 1
_LOG_NUMBER = 2
_EDIT_FIELDS = {1: "s", _LOG_NUMBER: "n", 3: "n", 4: "n", 5: "ns", 6: "nn", 7: "nnnss", 9: "n"}
"""Fields of a version edit by tag: numbers (n) and strings (s), which begin with their length."""
_BATCH_HEADER = 12
"""A write batch begins with a sequence number (8 bytes) and the number of its entries (4)."""


def torn_tail(log: bytes) -> int | None:
    """Return the offset at which to cut a log, because no complete write follows; None to leave the log as it is."""
    offset = _first_bad(log)
    if offset is None or _was_written_whole(log, offset) or _has_record_behind(log, offset):
        return None
    return offset


def whole_writes(log: bytes) -> Iterator[bytes]:
    """Read every write batch with good checksums, also after damage, where LevelDB skips the rest of the block."""
    offset, parts = 0, list[bytes]()
    while offset < len(log):
        left = _BLOCK - offset % _BLOCK
        if left < _HEADER:
            offset += left
            continue
        size = _good_size(log, offset)
        if size is None:
            parts = []
            places = _candidates(log, offset + 1)
            offset = next((place for place in places if _good_size(log, place) is not None), len(log))
            continue
        kind, data = log[offset + 6], log[offset + _HEADER : offset + size]
        offset += size
        parts = [data] if kind <= _FIRST else [*parts, data] if parts else []
        if kind in (_FULL, _LAST) and parts:
            yield b"".join(parts)
            parts = []


def puts(batch: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Read the keys that a write batch sets, with their values; stop at the first unreadable entry."""
    offset = _BATCH_HEADER
    while offset < len(batch):
        kind = batch[offset]
        key, offset = _string(batch, offset + 1)
        if kind == _PUT:
            value, offset = _string(batch, offset)
            if offset <= len(batch):
                yield key, value


def log_number(manifest: bytes) -> int:
    """Return the number of the oldest log that a MANIFEST needs (db/version_edit.cc); 0: it names none.

    LevelDB itself starts without a word when that log is missing.
    """
    number = 0
    for edit in whole_writes(manifest):
        offset = 0
        while offset < len(edit):
            tag, offset = _varint(edit, offset)
            values = []
            for kind in _EDIT_FIELDS.get(tag, ""):
                value, offset = _varint(edit, offset)
                values.append(value)
                offset += value if kind == "s" else 0
            if not values:
                break  # an unknown field
            number = values[0] if tag == _LOG_NUMBER else number
    return number


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """Read a varint; return its value and the offset of its end."""
    value = shift = 0
    while offset < len(data):
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            break
    return value, offset


def _string(batch: bytes, offset: int) -> tuple[bytes, int]:
    """Read a string that follows its length (a varint); return the string and the offset of its end."""
    length, offset = _varint(batch, offset)
    return batch[offset : offset + length], offset + length


def _first_bad(log: bytes) -> int | None:
    """Return the offset of the first bad record; None if all records are good."""
    offset = 0
    while offset < len(log):
        left = _BLOCK - offset % _BLOCK
        if left < _HEADER:  # the rest of a block, too small for a header
            offset += left
            continue
        size = _good_size(log, offset)
        if size is None:
            return offset
        offset += size
    return None


def _good_size(log: bytes, offset: int) -> int | None:
    """Return the size of the record at an offset if its checksum is right."""
    size = _size(log, offset)
    if size is None or offset + size > len(log):
        return None
    stored = int.from_bytes(log[offset : offset + 4], "little")
    return size if stored == _masked(_crc32c(log[offset + 6 : offset + size])) else None


def _size(log: bytes, offset: int) -> int | None:
    """Return the size of the record that a header announces, or None if the header is invalid."""
    header = log[offset : offset + _HEADER]
    if len(header) < _HEADER:
        return None
    size, kind = _HEADER + int.from_bytes(header[4:6], "little"), header[6]
    return size if _FULL <= kind <= _LAST and offset % _BLOCK + size <= _BLOCK else None


def _was_written_whole(log: bytes, offset: int) -> bool:
    """Say whether a record with a wrong checksum may once have been complete on the disk."""
    size = _size(log, offset)
    if size is None or offset + size > len(log):
        return False
    data = log[offset + _HEADER : offset + size]
    if log[offset + 6] <= _FIRST and (len(data) < _BATCH_HEADER or any(data[6:8]) or any(data[11:12])):
        return False  # a sequence number of 2^48 writes, or 2^24 entries: no real batch has such a header
    end = offset + size
    last_sector = log[max(offset + _HEADER, (end - 1) // _SECTOR * _SECTOR) : end]
    return any(last_sector)


def _has_record_behind(log: bytes, offset: int) -> bool:
    """Say whether a good record that begins a write follows the bad place."""
    return any(_good_size(log, place) is not None for place in _candidates(log, offset + 1))


def _candidates(log: bytes, begin: int) -> Iterator[int]:
    """Yield the offsets at which a write may begin."""
    for place in range(begin, len(log) - _HEADER - _BATCH_HEADER + 1):
        if log[place + 6] in (_FULL, _FIRST) and not any(log[place + 13 : place + 15]) and not log[place + 18]:
            yield place


def _make_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901 - the bits of one byte in turn
        table.append(value)
    return tuple(table)


_TABLE = _make_table()


def _crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4)."""
    table, crc = _TABLE, 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked(crc: int) -> int:
    """Rotate and offset a checksum (util/crc32c.h, Mask), because a log may contain checksums as data."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
