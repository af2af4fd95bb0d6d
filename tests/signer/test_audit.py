"""Lines of the audit log: any tampering is found, with its place."""

from __future__ import annotations

import json
from hashlib import sha256
from io import BytesIO
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signer.audit.chain import (
    ARCHIVE,
    BEGINNING,
    MAX_ABOUT_BYTES,
    AuditBroken,
    Decision,
    Head,
    encode_lines,
    verify,
)
from tests.lib.looped import looped

FROZEN = (
    b'{"n":1,"at_ms":1700000000123,"peer_uid":1000,"asked":"KeyRequest","about":{"expiry":1800000000},"digest":"ab",'
    b'"verdict":"refused","tag":"policy-rate","reason":"100 a second","previous":"' + b"0" * 64 + b'","hash":"'
    b'76ed6489f6746c55f53e16fe1de7798c762b7a7d2937b2dfa5fb008febb6da18"}\n'
)


def decision(number: int = 0, **fields: Any) -> Decision:
    about = {"outpoint": f"{number:064x}:0", "fee_sat": number}
    plain = {"at_ms": 1_700_000_000_000 + number, "peer_uid": 1000, "asked": "SettlementRequest", "about": about}
    return Decision(**{**plain, "digest": f"{number:064x}", "verdict": "signed", **fields})


def written(count: int, head: Head = BEGINNING) -> list[bytes]:
    """A log with this number of lines."""
    return encode_lines([decision(number) for number in range(count)], head)[0].splitlines(keepends=True)


def rehashed(line: bytes, **changes: Any) -> bytes:
    """A line with other fields and a matching hash, as a forger writes it."""
    fields = {**json.loads(line), **changes}
    del fields["hash"]
    body = json.dumps(fields, separators=(",", ":")).encode()[:-1]
    return body + b',"hash":"' + sha256(body).hexdigest().encode() + b'"}\n'


def broken(lines: list[bytes], head: Head | None = None) -> AuditBroken:
    with pytest.raises(AuditBroken) as caught:
        list(verify(lines, head))
    return caught.value


# --- format of a line ------------------------------------------------------------------------------------------------


def test_line_is_the_documented_bytes() -> None:
    """A line has exactly the documented bytes, and its hash covers the bytes before the hash."""
    about = {"expiry": 1_800_000_000}
    only = Decision(
        at_ms=1_700_000_000_123,
        peer_uid=1000,
        asked="KeyRequest",
        about=about,
        digest="ab",
        verdict="refused",
        tag="policy-rate",
        reason="100 a second",
    )

    line, head = encode_lines([only], BEGINNING)

    assert line == FROZEN
    assert head == Head(1, sha256(line.split(b',"hash":')[0]).hexdigest())


def test_lines_of_groups_are_those_of_one() -> None:
    """The log does not depend on the grouping of decisions."""
    one, last = encode_lines([decision(0), decision(1), decision(2)], BEGINNING)
    first, head = encode_lines([decision(0)], BEGINNING)
    rest, end = encode_lines([decision(1), decision(2)], head)

    assert first + rest == one
    assert end == last


def test_lines_are_read_as_they_were_written() -> None:
    """Every field of a decision is read back, with text of any kind, and each decision is one line."""
    odd = decision(
        1, reason='two\nlines, "quoted"\u2028\x00é', tag="policy-fee", verdict="refused", about={"a": [1, None]}
    )
    lines = encode_lines([decision(0), odd], BEGINNING)[0].splitlines(keepends=True)

    entries = list(verify(lines))

    assert len(lines) == len(entries) == 2
    assert [getattr(entries[1], name) for name in Decision.__struct_fields__] == [
        getattr(odd, name) for name in Decision.__struct_fields__
    ]


def test_long_content_is_left_out() -> None:
    """No peer can cause a line that takes long to read: long content is replaced by its size."""
    long = decision(1, about={"script": "00" * MAX_ABOUT_BYTES}, reason="x" * MAX_ABOUT_BYTES)
    lines = encode_lines([long, decision(2)], BEGINNING)[0].splitlines(keepends=True)

    entry = next(verify(lines))

    assert len(lines[0]) < 2_000
    assert list(entry.about) == ["left_out_bytes"]
    assert entry.about["left_out_bytes"] > 3 * MAX_ABOUT_BYTES


def test_empty_log_is_in_order() -> None:
    """A log without lines is valid."""
    assert list(verify([])) == []


# --- tampering -------------------------------------------------------------------------------------------------------

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The machine may have other work."""

LINES = written(12)
places = st.integers(0, len(LINES) - 1)


@given(places, st.integers(0, 600), st.integers(1, 255))
@settings(UNHURRIED, max_examples=600)
def test_changed_byte_is_found_at_its_line(at: int, byte: int, flip: int) -> None:
    """If any byte of a line changes, newlines included, that line is reported."""
    byte %= len(LINES[at])
    changed = bytearray(LINES[at])
    changed[byte] ^= flip
    raw = b"".join([*LINES[:at], bytes(changed), *LINES[at + 1 :]])

    assert broken(list(BytesIO(raw))).line == at + 1


@given(places, st.sampled_from(["at_ms", "reason", "verdict", "digest"]))
@UNHURRIED
def test_edited_line_with_a_hash_that_fits_is_found_at_the_next(at: int, name: str) -> None:
    """An edited line with a new hash breaks the line after it; only the head reveals an edit of the last line."""
    forged = rehashed(LINES[at], **{name: {"at_ms": 5, "verdict": "refused"}.get(name, "forged")})
    lines = [*LINES[:at], forged, *LINES[at + 1 :]]
    if at == len(LINES) - 1:
        assert list(verify(lines))[-1].hash != json.loads(LINES[at])["hash"]
        return
    error = broken(lines)
    assert error.line == at + 2
    assert "edited or replaced" in error.reason


@given(places, st.integers(1, 3))
@UNHURRIED
def test_removed_lines_are_found_where_they_were(at: int, count: int) -> None:
    """Missing lines are named, at the line that stands in their place; only the head reveals missing last lines."""
    lines = LINES[:at] + LINES[at + count :]
    if at + count >= len(LINES):
        assert len(list(verify(lines))) == at
        return
    error = broken(lines)
    assert error.line == at + 1
    assert error.reason.startswith(f"removed: it is number {at + count + 1}")
    assert (
        f"number {at + 1} is missing" if count == 1 else f"numbers {at + 1} to {at + count} are missing"
    ) in error.reason


@given(places, places)
@UNHURRIED
def test_inserted_line_is_found(at: int, copied: int) -> None:
    """A repeated line is found, and so is one that was forged with a number that fits the place."""
    twice = broken([*LINES[: at + 1], LINES[copied], *LINES[at + 1 :]])
    assert twice.line == at + 2 if copied != at + 1 else at + 3

    previous = json.loads(LINES[at])["hash"]
    forged = rehashed(LINES[copied], n=at + 2, previous=previous)
    if at + 1 < len(LINES):
        assert broken([*LINES[: at + 1], forged, *LINES[at + 1 :]]).line == at + 3


@given(st.permutations(range(len(LINES))))
@UNHURRIED
def test_moved_lines_are_found_at_the_first(order: list[int]) -> None:
    """In any other order the first line in a wrong place is reported."""
    wrong = [place for place, number in enumerate(order) if place != number]
    lines = [LINES[number] for number in order]
    if not wrong:
        assert len(list(verify(lines))) == len(LINES)
        return
    assert broken(lines).line == wrong[0] + 1


@given(places, st.integers(1, 600))
@UNHURRIED
def test_torn_line_is_found(at: int, cut: int) -> None:
    """A file that ends within a line is torn there."""
    cut = 1 + cut % (len(LINES[at]) - 1)
    error = broken([*LINES[:at], LINES[at][:-cut]])
    assert error.line == at + 1
    assert error.reason.startswith("torn")


def test_rewritten_log_is_found_by_its_head() -> None:
    """Lines that are all rewritten from some place on are found only by a hash that was kept elsewhere."""
    kept = list(verify(LINES))[-1].hash
    middle = list(verify(LINES[:6]))[-1]
    forged = written(6, Head(middle.n, middle.hash))

    entries = list(verify([*LINES[:6], *forged]))

    assert len(entries) == len(LINES)
    assert entries[-1].hash != kept


@looped("garbage", [b"\n", b"{}\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n", b"null\n", bytes(600) + b"\n"])
def test_garbage_instead_of_a_line_is_found(garbage: bytes) -> None:
    """For any garbage in the place of a line, its number is reported."""
    assert broken([*LINES[:3], garbage, *LINES[3:]]).line == 4


@looped("more", [{"extra": 1}, {"n": 1.0}, {"peer_uid": "1000"}])
def test_same_text_written_otherwise_is_no_line(more: dict[str, Any]) -> None:
    """JSON with the same or more content, but in other bytes, does not pass as the line."""
    spaced = json.dumps({**json.loads(LINES[3]), **more}).encode() + b"\n"
    assert broken([*LINES[:3], spaced, *LINES[4:]]).line == 4


# --- consecutive files -----------------------------------------------------------------------------------------------


def test_log_that_continues_in_another_file() -> None:
    """A log that continues after an archive is valid with it; without it, its first line says where it begins."""
    old = written(3)
    last = list(verify(old))[-1]
    begun, head = encode_lines([decision(9, asked=ARCHIVE, about={"archive": "signer.audit.1-3"})], Head(3, last.hash))
    new = [begun, *written(2, head)]

    assert [entry.n for entry in verify([*old, *new])] == [1, 2, 3, 4, 5, 6]
    assert [entry.n for entry in verify(new)] == [4, 5, 6]
    assert broken(new, BEGINNING).line == 1
    assert "numbers 1 to 4 are missing" in broken(new[1:]).reason
