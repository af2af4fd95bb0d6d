"""Encoding of a channel in the store: `version | seq | body | checksum`.

    version   1 byte    layout of the body; frozen samples of every version stay in tests/vectors/record/
    seq       8 bytes   big endian, readable without decoding: conditional updates compare it
    body      msgpack   the fields of `Channel`, as arrays in declared order
    checksum  4 bytes   CRC-32 of all bytes before it: a torn or flipped record is detected and never settled

Migration: each change of the layout takes a new version number, and the old one a row in `_DECODERS`. A new field goes
to the end of its array and has a default, so that the same decoder reads the older records; any other change needs a
decoder for the old version. A record is written with the newest version when it changes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import msgspec

from paychan.protocol.channel import Channel
from paychan.protocol.errors import DamagedRecord
from paychan.protocol.kinds.base import tagged

VERSION = 4
"""Version of new records.

Version 1 has no `offered_seq` and `restored`; they decode to their defaults. Versions 1 and 2 have terms without a kind:
`[server key, client key, expiry]`, where the expiry is a number. Versions 1 to 3 know no credit: all that was received is
spent.
"""

_HEAD_BYTES = 9
_CHECKSUM_BYTES = 4


_VERSION_BYTE = bytes([VERSION])

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Channel)
_fields = msgspec.msgpack.Decoder(list[Any])


def _without_credit(channel: Channel) -> Channel:
    return msgspec.structs.replace(channel, spent_sat=channel.received_sat)


def _with_untagged_terms(body: bytes) -> Channel:
    terms, *others = _fields.decode(body) or [None]
    return _without_credit(msgspec.convert([tagged(terms), *others], Channel))


def _with_tagged_terms(body: bytes) -> Channel:
    return _without_credit(_decoder.decode(body))


_DECODERS: dict[int, Callable[[bytes], Channel]] = {
    1: _with_untagged_terms,
    2: _with_untagged_terms,
    3: _with_tagged_terms,
    4: _decoder.decode,
}


def encode_record(channel: Channel) -> bytes:
    """Serialize a channel; about 250 bytes while it is open."""
    content = _VERSION_BYTE + channel.seq.to_bytes(8, "big") + _encoder.encode(channel)
    return content + zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "big")


def decode_record(raw: bytes) -> Channel:
    """Deserialize a channel.

    Raises:
        DamagedRecord: not a complete record of a known version.
    """
    if len(raw) < _HEAD_BYTES + _CHECKSUM_BYTES or raw[0] not in _DECODERS:
        msg = f"record of {len(raw)} bytes has version {raw[0] if raw else None}, want {VERSION}"
        raise DamagedRecord(reason=msg)
    content, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if zlib.crc32(content) != int.from_bytes(checksum, "big"):
        msg = f"record checksum is {checksum.hex()}, want {zlib.crc32(content):08x}"
        raise DamagedRecord(reason=msg)
    try:
        channel = _DECODERS[raw[0]](content[_HEAD_BYTES:])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedRecord(reason=str(error)) from error
    if channel.seq != record_seq(raw):
        msg = f"record head has seq {record_seq(raw)}, body {channel.seq}"
        raise DamagedRecord(reason=msg)
    return channel


def record_seq(raw: bytes) -> int:
    """Sequence number of a record, without decoding it."""
    return int.from_bytes(raw[1:_HEAD_BYTES], "big")
