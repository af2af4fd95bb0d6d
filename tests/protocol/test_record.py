"""Stored records: every older version stays readable, and damage is always detected (threat 12)."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import pytest

from paychan.protocol.channel import CloseReason, State, Step, next_step
from paychan.protocol.errors import DamagedRecord
from paychan.protocol.record import VERSION, decode_record, encode_record, record_seq
from paychan.protocol.types import OutPoint
from tests.lib.channels import Payer
from tests.lib.looped import looped
from tests.lib.vectors import DIRECTORY
from tests.vectors.record.generate import samples

SAMPLES = {path.stem: bytes.fromhex(path.read_text()) for path in sorted((DIRECTORY / "record").glob("*.hex"))}
each_sample = looped("raw", SAMPLES.values(), ids=SAMPLES)

# name, in every version that has it: state, seq, payments, satoshi received, closing reason, next step
MEANING: dict[str, tuple[State, int, int, int, CloseReason | None, Step | None]] = {
    "open": (State.OPEN, 1, 0, 10_000, None, None),
    "open_v2": (State.OPEN, 1, 0, 10_000, None, None),
    "open_paid": (State.OPEN, 3, 2, 15_001, None, None),
    "open_offered": (State.OPEN, 4, 2, 15_001, None, Step.OFFER),
    "open_restored": (State.OPEN, 3, 2, 15_001, None, None),
    "open_charged": (State.OPEN, 6, 3, 15_901, None, None),
    "closing_offered": (State.CLOSING, 5, 2, 15_001, CloseReason.EXPIRY, Step.OFFER),
    "closing_expiry": (State.CLOSING, 4, 2, 15_001, CloseReason.EXPIRY, Step.SIGN),
    "closing_proof": (State.CLOSING, 4, 2, 15_001, CloseReason.CLIENT, Step.SIGN),
    "closing_payment": (State.CLOSING, 4, 2, 19_001, CloseReason.CLIENT, Step.SIGN),
    "closing_operator": (State.CLOSING, 2, 0, 10_000, CloseReason.OPERATOR, Step.SIGN),
    "closing_drained": (State.CLOSING, 4, 3, 1_000_000, CloseReason.DRAINED, Step.SIGN),
    "closing_signed": (State.CLOSING, 5, 2, 15_001, CloseReason.EXPIRY, Step.PUBLISH),
    "closing_vanished": (State.CLOSING, 7, 2, 15_001, CloseReason.EXPIRY, Step.PUBLISH),
    "published": (State.PUBLISHED, 6, 2, 15_001, CloseReason.EXPIRY, Step.WATCH),
    "closing_outbid": (State.CLOSING, 7, 2, 15_001, CloseReason.EXPIRY, Step.PUBLISH),
    "closing_withdraw": (State.CLOSING, 2, 0, 10_000, CloseReason.WITHDRAW, Step.SIGN),
    "closed_withdrawn": (State.CLOSED, 5, 0, 10_000, CloseReason.WITHDRAW, None),
    "open_moved": (State.OPEN, 1, 0, 0, None, None),
    "closed_malleated": (State.CLOSED, 7, 2, 15_001, CloseReason.EXPIRY, None),
    "closed": (State.CLOSED, 7, 2, 15_001, CloseReason.EXPIRY, None),
    "closed_drained": (State.CLOSED, 7, 3, 1_000_000, CloseReason.DRAINED, None),
    "unfunded_open": (State.UNFUNDED, 2, 0, 10_000, None, None),
    "unfunded_published": (State.UNFUNDED, 7, 2, 15_001, CloseReason.EXPIRY, None),
    "published_found": (State.PUBLISHED, 2, 0, 15_001, CloseReason.OPERATOR, Step.WATCH),
    "lost_open": (State.LOST, 2, 0, 10_000, CloseReason.EXPIRY, None),
    "lost_published": (State.LOST, 7, 2, 15_001, CloseReason.EXPIRY, None),
}


WITHDRAWAL = bytes.fromhex("9179faa7f521b9da0c4c2565ed91eca19981155f84b731f652d7e557dbe61eab")
MOVED = {"open_moved": (OutPoint(WITHDRAWAL, 0), 990_000)}
SPENT_BY = {
    "lost_open": b"\x4c" * 32,
    "lost_published": b"\x4c" * 32,
    "closed_malleated": b"\x4d" * 32,
    "closed_withdrawn": WITHDRAWAL,
}
CREDIT = {"open_charged": 5_251, "closing_drained": 990_000, "closed_drained": 990_000, "closing_payment": 9_001}
NO_CREDIT = {"open", "open_v2", "open_moved", "closing_operator", "closing_withdraw", "closed_withdrawn", "lost_open"}
NO_CREDIT |= {"unfunded_open", "published_found"}
NAMED_BY_SECRET = {"open_v2", "closing_withdraw", "closed_withdrawn", "open_moved"}


def resealed(raw: bytes, body: Any) -> bytes:
    """A record with another body and a correct checksum: damage that happened before the write."""
    content = raw[:9] + (body if isinstance(body, bytes) else msgspec.msgpack.encode(body))
    return content + zlib.crc32(content).to_bytes(4, "big")


def fields(raw: bytes) -> list[Any]:
    """The array of a record's body."""
    return list(msgspec.msgpack.decode(raw[9:-4]))


# --- versions -------------------------------------------------------------------------------------------------------


@looped("name", SAMPLES)
def test_frozen_samples_keep_their_meaning(name: str) -> None:
    """Every record of every version still decodes to the same channel."""
    channel, version, name = decode_record(SAMPLES[name]), *name.split("_", 1)

    assert MEANING[name] == (
        channel.state,
        channel.seq,
        channel.payments,
        channel.received_sat,
        channel.closing.reason if channel.closing else None,
        next_step(channel),
    )
    payer = Payer("frozen sample", channel.terms.expiry.lock_time)
    assert channel.terms == payer.terms
    assert (channel.outpoint, channel.funding_sat) == MOVED.get(name, (payer.outpoint, payer.funding_sat))
    assert (channel.closing.spent_by if channel.closing else b"") == SPENT_BY.get(name, b"")
    offered = name in ("open_offered", "closing_offered")
    assert channel.offered_data == ("an order" if offered else "")
    assert channel.offered_seq == (4 if offered and version != "v1" else 0)
    assert channel.restored is (name == "open_restored")
    assert len(channel.secret) == (32 if name in NAMED_BY_SECRET else 0)
    assert channel.credit_sat == (0 if version < "v4" or name in NO_CREDIT else CREDIT.get(name, 5_001))


@each_sample
def test_frozen_samples_are_written_back_as_the_same_channel(raw: bytes) -> None:
    """Reading and writing a record changes only its version, so a store migrates as its channels change."""
    written = encode_record(decode_record(raw))

    assert decode_record(written) == decode_record(raw)
    assert written[0] == VERSION
    assert raw[0] != VERSION or written == raw


def test_samples_cover_every_state_and_step() -> None:
    """Each state, closing reason and step has a frozen record."""
    for version, younger in (("v2_", {"open_charged"}), ("v3_", {"open_charged"}), ("v4_", set())):
        names = {name.removeprefix(version) for name in SAMPLES if name.startswith(version)}
        assert names == set(MEANING) - younger
    assert {name.split("_", 1)[1] for name in SAMPLES} == set(MEANING)
    columns = list(zip(*MEANING.values(), strict=True))
    assert set(columns[0]) == set(State)
    assert set(columns[4]) == {*CloseReason, None}
    assert set(columns[5]) == {*Step, None}


@looped("name", samples())
def test_the_layout_is_still_that_of_the_samples(name: str) -> None:
    """New records have the layout of the frozen ones: a new field or meaning needs new samples first."""
    assert encode_record(samples()[name]) == SAMPLES[f"v{VERSION}_{name}"]


def test_a_record_with_more_fields_is_read() -> None:
    """The reader ignores fields that a later version appended, so a downgrade loses no channel."""
    raw = SAMPLES["v4_open"]

    assert decode_record(resealed(raw, [*fields(raw), "later", 7])) == decode_record(raw)


def test_a_record_with_fewer_fields_is_read() -> None:
    """Fields with a default may be missing at the end: the record is from an older version."""
    raw = SAMPLES["v1_open"]

    assert decode_record(resealed(raw, fields(raw)[:8])) == decode_record(raw)


# --- damage ---------------------------------------------------------------------------------------------------------


@looped("tag", ["p2wsh", "", "P2SH", "p2sh\0", 1, None])
def test_a_record_of_an_unknown_kind_is_refused(tag: Any) -> None:
    """A channel of a kind that this program does not know is never taken for one of RBPCP's."""
    raw = SAMPLES["v3_open"]
    (known, *terms), *others = fields(raw)
    assert known == "p2sh"

    with pytest.raises(DamagedRecord):
        decode_record(resealed(raw, [[tag, *terms], *others]))


@each_sample
def test_threat_12_every_flipped_bit_is_damage(raw: bytes) -> None:
    """A flip of any single bit on the disk is detected."""
    for bit in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedRecord):
            decode_record(bytes(flipped))


@each_sample
def test_threat_12_every_truncation_is_damage(raw: bytes) -> None:
    """A truncated record is detected at every length, down to 0."""
    for size in range(len(raw)):
        with pytest.raises(DamagedRecord):
            decode_record(raw[:size])


def test_threat_12_bytes_after_a_record_are_damage() -> None:
    """A record with appended bytes is refused."""
    raw = SAMPLES["v1_open"]

    for tail in (b"\x00", raw):
        with pytest.raises(DamagedRecord):
            decode_record(raw + tail)
    with pytest.raises(DamagedRecord):
        decode_record(resealed(raw, raw[9:-4] + b"\x00"))


@looped("version", [v for v in range(256) if v not in (1, 2, 3, 4)])
def test_other_versions_are_not_guessed(version: int) -> None:
    """A record of a version that this program does not know is refused, with both numbers."""
    content = bytes([version]) + SAMPLES["v1_open"][1:-4]
    raw = content + zlib.crc32(content).to_bytes(4, "big")

    with pytest.raises(DamagedRecord, match=f"version {version}, want {VERSION}"):
        decode_record(raw)


def test_head_and_body_must_hold_one_sequence_number() -> None:
    """The number that conditional updates compare equals the channel's own."""
    content = bytes([VERSION]) + (2).to_bytes(8, "big") + SAMPLES["v3_open"][9:-4]

    with pytest.raises(DamagedRecord, match="head has seq 2, body 1"):
        decode_record(content + zlib.crc32(content).to_bytes(4, "big"))


@looped("name", ["v1_open", "v3_open"])
@looped(
    ("position", "value"),
    [
        (0, b"terms"), (0, []), (0, {}), (0, [b"\x02" * 32, b"\x02" * 33, 1_500_000_000]),
        (0, ["p2sh", b"\x02" * 33, b"\x02" * 33, 1_500_000_000]), (0, [b"\x02" * 33, b"\x02" * 33, [1_500_000_000]]), (1, ["00", 0]), (2, 1.0), (2, None), (2, "1"),
        (2, True), (3, "script"), (4, None), (4, [1, b"short", 0x83]), (4, [1, b"\x00" * 73, 0x83]), (5, "opened"),
        (5, 1), (6, -1), (6, "1"), (7, None), (8, "secret"), (10, []), (11, []), (11, ["bored", 0, 0, None, b""]),
    ],
)  # fmt: skip
def test_a_field_of_a_wrong_type_is_damage(position: int, value: Any, name: str) -> None:
    """A body with a wrong structure is refused completely, even with a correct checksum."""
    raw = SAMPLES[name]
    body = fields(raw)
    body[position] = value

    with pytest.raises(DamagedRecord):
        decode_record(resealed(raw, body))


@looped(
    "body",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        SAMPLES["v1_open"][9:-4].replace(b"\xa4open", b"\xa4\xff\xfe\xfd\xfc"),
        bytes([SAMPLES["v1_open"][9] + 1]) + SAMPLES["v1_open"][10:-4] + b"\x91" * 100_000 + b"\xc0",
    ],
    ids=["nothing", "no msgpack", "length beyond the end", "text that is not UTF-8", "nested without end"],
)
def test_a_body_that_is_no_channel_is_damage(body: bytes) -> None:
    """For any bytes with a correct checksum the reader raises only `DamagedRecord`."""
    with pytest.raises(DamagedRecord):
        decode_record(resealed(SAMPLES["v1_open"], body))


@each_sample
def test_sequence_number_without_decoding(raw: bytes) -> None:
    """The store reads the number from the head alone."""
    assert record_seq(raw) == decode_record(raw).seq
