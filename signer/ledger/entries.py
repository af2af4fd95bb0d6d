"""Entries of the ledger: signed settlements by outpoint, shown outputs, value settled recently; their serialization.

    version   1 byte    layout of the body
    body      msgpack   the fields of `Signed`, or of another kind, as an array in declared order
    checksum  4 bytes   CRC-32 of all before it: an entry with a flipped bit is detected, never used

Pure, like the rules that read entries; `leveldb` keeps them.
"""

from __future__ import annotations

import zlib
from hashlib import sha256
from typing import Any, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from paychan.protocol.kinds.base import RBPCP_KIND, tagged
from paychan.protocol.settlement import Claim, received_sat, settlement_size
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import SettlementRequest

VERSION = 4
"""1: without `Signed.funding_sat`; 2: without `Output.shown_at` and `Flow.young`; 3: terms without a kind."""

_READABLE = (1, 2, 3, 4)
_FIRST_WITH_KIND = 4
_CHECKSUM_BYTES = 4

_SPAN_SECONDS = 600
"""Sums are kept for spans of this length. A span that ends within the last hour or day counts in full."""

HOUR_SECONDS = 3_600
DAY_SECONDS = 86_400

_Entry = TypeVar("_Entry", bound=Struct)


class Signed(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The newest signed settlement of an outpoint."""

    digest: bytes
    """Of the whole request, see `request_digest`."""
    fee_sat: Sat
    size: int
    """Largest possible size of the settlement, in bytes; its fee rate is computed with it."""
    change_sat: Sat
    change_script: bytes
    funding_sat: Sat = Sat(0)

    @property
    def received_sat(self) -> Sat:
        """Value that the channel earned, in satoshi."""
        return Sat(max(0, self.funding_sat - self.change_sat))

    def pays_less_than(self, fee_sat: int, size: int) -> bool:
        """Say whether its fee rate is lower than that of a fee and a size, compared as exact fractions."""
        return fee_sat * self.size > self.fee_sat * size

    def least_fee_above(self, size: int) -> Sat:
        """Return the least fee with a higher rate at this size."""
        return Sat(self.fee_sat * size // self.size + 1)


Entries: TypeAlias = dict[OutPoint, Signed]
"""Signed entries by outpoint; one that was never signed for is missing."""


class Output(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A transaction output that was shown."""

    value_sat: Sat
    script: bytes
    shown_at: UnixTime = UnixTime(0)
    """By the signer's clock; 0 in entries of version 2."""


class Count(Struct, frozen=True, array_like=True):
    """Number of outputs that were shown."""

    number: int


class Flow(Struct, frozen=True, array_like=True):
    """Value settled recently: (span, satoshi) with the newest last, and the sum since the last fresh heartbeat."""

    spans: tuple[tuple[int, int], ...] = ()
    unattended_sat: int = 0
    young: tuple[tuple[int, int], ...] = ()
    """The same for channels whose funding had been shown only recently; `spans` are those of the others."""

    def within(self, seconds: int, now: UnixTime, *, young: bool | None = None) -> Sat:
        """Sum of this many last seconds, in satoshi: of all channels, or of the young or the aged ones.

        Spans in the future come from a clock that was ahead, see `plus`.
        """
        spans = {None: self.spans + self.young, False: self.spans, True: self.young}[young]
        return Sat(sum(value for span, value in spans if _is_near(span, seconds, now)))

    def plus(self, aged_sat: int, young_sat: int, now: UnixTime, *, attended: bool) -> Flow:
        """Add a settlement, and drop spans older than a day or more than an hour in the future.

        A clock that is set back by less than an hour starts no new allowance. After a clock that was ahead by more is
        corrected, its spans no longer count; otherwise they would use up the limits until that time.
        """
        unattended_sat = 0 if attended else self.unattended_sat + aged_sat + young_sat
        return Flow(_added(self.spans, aged_sat, now), unattended_sat, _added(self.young, young_sat, now))


def _added(spans: tuple[tuple[int, int], ...], value_sat: int, now: UnixTime) -> tuple[tuple[int, int], ...]:
    span = now // _SPAN_SECONDS
    kept = {old: value for old, value in spans if _is_near(old, DAY_SECONDS, now)}
    if value_sat:
        kept[span] = kept.get(span, 0) + value_sat
    return tuple(sorted(kept.items()))


def _is_near(span: int, seconds: int, now: UnixTime) -> bool:
    return (span + 1) * _SPAN_SECONDS > now - seconds and span * _SPAN_SECONDS <= now + HOUR_SECONDS


class DamagedEntry(Exception):
    """An entry can't be trusted. It is never overwritten: no new settlement of its outpoint is signed."""


def request_digest(request: SettlementRequest) -> bytes:
    """Identify a request: SHA256 of its facts, listed here in a layout of its own (layout 1).

    The layout is independent of the wire's. The ledger keeps digests permanently, and a message may get a new field or
    another order in a new version of the wire; a request that was signed before must keep its digest. So a fact that is
    added later is listed only if it differs from what earlier requests meant: the tag of a kind, if it is not RBPCP's.
    """
    reserve = request.reserve
    coins = reserve and [reserve.public_key, [[_place(coin.outpoint), coin.value_sat] for coin in reserve.coins]]
    claims = [_claim(claim) for claim in request.claims]
    facts = [_LAYOUT_1, 0, claims, request.destination_script, request.fee_sat, coins]
    return sha256(msgspec.msgpack.encode(facts)).digest()


_LAYOUT_1 = 3
"""First number of the list: the wire's number of the request when the layout was made."""


def _claim(claim: Claim) -> list[Any]:
    terms, payment = claim.terms, claim.payment
    signed = [payment.change_sat, payment.signature, payment.flag]
    kind = [] if terms.tag == RBPCP_KIND else [terms.tag]
    named = [terms.server_key, terms.client_key, terms.expiry.lock_time, *kind]
    return [named, _place(claim.outpoint), claim.funding_sat, claim.change_script, signed]


def _place(outpoint: OutPoint) -> list[Any]:
    return [outpoint.txid, outpoint.vout]


def request_size(request: SettlementRequest) -> int:
    """Return the largest size, in bytes, that the settlement of a valid request can have."""
    reserve = request.reserve
    available = received_sat(request.claims) + (reserve.value_sat if reserve else 0)
    return settlement_size(
        request.claims, request.destination_script, server_output=request.fee_sat < available, reserve=reserve
    )


def entries_of(request: SettlementRequest, digest: bytes = b"", size: int = 0) -> Entries:
    """Build the entries of a valid request; pass its digest and size if known, to avoid computing them again."""
    digest, size = digest or request_digest(request), size or request_size(request)
    return {
        claim.outpoint: Signed(
            digest, request.fee_sat, size, claim.payment.change_sat, claim.change_script, claim.funding_sat
        )
        for claim in request.claims
    }


def encode_entry(entry: Struct) -> bytes:
    """Serialize an entry of any kind; about 80 bytes for a `Signed`."""
    content = bytes([VERSION]) + msgspec.msgpack.encode(entry)
    return content + zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "big")


def decode_entry(raw: bytes, kind: type[_Entry]) -> _Entry:
    """Deserialize an entry of this kind.

    Raises:
        DamagedEntry: anything but a whole entry of a known version.
    """
    content, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if not content or content[0] not in _READABLE:
        msg = f"entry of {len(raw)} bytes has version {content[0] if content else None}, want {VERSION}"
        raise DamagedEntry(msg)
    if zlib.crc32(content) != int.from_bytes(checksum, "big"):
        msg = f"entry checksum is {checksum.hex()}, want {zlib.crc32(content):08x}"
        raise DamagedEntry(msg)
    try:
        entry = _decode(content, kind)
    except msgspec.MsgspecError as error:
        raise DamagedEntry(str(error)) from error
    if isinstance(entry, Signed) and (entry.size <= 0 or entry.fee_sat < 0):
        msg = f"entry of {entry.fee_sat} sat for {entry.size} bytes"
        raise DamagedEntry(msg)
    return entry


def _decode(content: bytes, kind: type[_Entry]) -> _Entry:
    """Read the body; of versions without kinds, terms get the tag of RBPCP's."""
    if content[0] >= _FIRST_WITH_KIND or kind not in (Claim, SettlementRequest):
        return msgspec.msgpack.decode(content[1:], type=kind)
    fields = _fields.decode(content[1:])
    if kind is Claim:
        return msgspec.convert(_tagged_claim(fields), kind)
    claims = msgspec.convert(fields[2:3], tuple[list[list[Any]]])[0]
    return msgspec.convert([*fields[:2], [_tagged_claim(claim) for claim in claims], *fields[3:]], kind)


_fields = msgspec.msgpack.Decoder(list[Any])


def _tagged_claim(fields: list[Any]) -> list[Any]:
    terms, *others = fields or [None]
    return [tagged(terms), *others]
