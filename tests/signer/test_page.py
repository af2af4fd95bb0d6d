"""`signer/PROTOCOL.md` agrees with the code, so that it is enough to write another signer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import signer
from paychan.protocol.types import OutPoint, UnixTime
from paychan.protocol.wire.signer_messages import (
    MAX_FRAME_BYTES,
    AgainRequest,
    Health,
    KeyRequest,
    Reply,
    Request,
    WireError,
    decode_reply,
    decode_request,
    encode_frame,
    frame_size,
)
from paychan.protocol.wire.signer_versions import VERSION
from signer.judge.queries import Identity
from signer.keys.ring import KeyRing, SigningKey, SoftKey, StaticKey
from tests.lib import signertext
from tests.lib.ledger import MemoryLedger
from tests.lib.looped import looped
from tests.lib.signerexample import CERTIFICATE_REQUEST, DESTINATION, EXAMPLE, IDENTITY
from tests.lib.signerpage import PAGE, meaning, page, replies, requests, structures, tags
from tests.signer.messages import Answers


class ExampleKeys(StaticKey):
    """The example's server key, and its identity."""

    def identity_key(self) -> SigningKey:
        return SoftKey(IDENTITY)


def test_page_is_that_of_the_code() -> None:
    """The page is up to date (`python -m tests.lib.signerpage` writes it)."""
    assert PAGE.read_text() == page()


def test_all_fields_are_described() -> None:
    """Every field of every message and structure has a meaning on the page, and no meaning is unused."""
    fields = [(kind, name) for kind in (*requests(), *replies(), *structures()) for name in kind.__struct_fields__]
    assert all(meaning(kind, name) for kind, name in fields)
    assert {f"{kind.__name__}.{name}" for kind, name in fields if name != "id"} == {
        name for name in signertext.MEANINGS if not name.endswith(" id")
    }


def test_all_tags_are_described() -> None:
    """Every tag in the signer's code has its line on the page, and no line is unused."""
    code = "\n".join(file.read_text() for file in Path(signer.__path__[0]).rglob("*.py"))
    assert set(re.findall(r'"((?:policy|protocol)-[a-z-]+)"', code)) == set(tags())


def test_links_lead_somewhere() -> None:
    """Each link within the page has its heading."""
    text = page()
    headings = {line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("###")}
    assert set(re.findall(r"\(#(\w+)\)", text)) <= headings


def test_example_is_what_the_signer_answers() -> None:
    """A signer with the example's keys gives the example's replies, byte for byte."""
    keys = KeyRing([ExampleKeys(b"\x22" * 32)], DESTINATION)
    handler = Answers(
        keys, MemoryLedger(), Identity("regtest", "hardened"), clock=lambda: float(CERTIFICATE_REQUEST.not_before)
    )
    for _, request, reply in EXAMPLE:
        assert handler(request) == reply


@looped("number", range(len(EXAMPLE)))
def test_example_is_read_as_it_was_written(number: int) -> None:
    """The page's bytes are frames of the messages above them."""
    _, request, reply = EXAMPLE[number]
    shown = re.sub(r"\s", "", page())
    for message, decode in ((request, decode_request), (reply, decode_reply)):
        frame = encode_frame(message)
        assert frame.hex() in shown
        read: Request | Reply = decode(frame[4:])
        assert (read, frame_size(frame[:4])) == (message, len(frame) - 4)


@looped(
    ("body", "is_read"),
    [
        ("92 01 05", Health(5)),
        ("dc0002 01 d10005", Health(5)),
        ("92 01 cfffffffffffffffff", Health(2**64 - 1)),
        ("92 01 d38000000000000000", Health(-(2**63))),
        ("93 07 05 93 c420" + "ab" * 32 + "07 c0", AgainRequest(5, OutPoint(b"\xab" * 32, 7))),
        ("94 02 05 c421" + "02" * 33 + "07", KeyRequest(5, b"\x02" * 33, UnixTime(7))),
        ("94 02 05 d921" + "02" * 33 + "07", None),  # text for bytes
        ("94 02 05 c420" + "02" * 32 + "07", None),  # too short
        ("92 01 cb4014000000000000", None),  # 5.0
        ("92 01 c3", None),  # true
        ("93 01 05 c0", None),  # superfluous
        ("91 01", None),  # missing
        ("92 01 05 00", None),  # trailing byte
        ("92 0b 05", None),  # unknown number
    ],
)
def test_values_are_read_as_the_page_says(body: str, is_read: Request | None) -> None:
    """Ints in any format, bytes as bin only, no floats or booleans for ints, neither extra nor missing fields."""
    raw = bytes([VERSION]) + bytes.fromhex(body)
    if is_read is None:
        with pytest.raises(WireError):
            decode_request(raw)
    else:
        assert decode_request(raw) == is_read


def test_longest_frame_is_the_one_on_the_page() -> None:
    """The page has the bounds of a frame's length that the code checks."""
    assert f"2 to {MAX_FRAME_BYTES:,}" in page()
    assert [frame_size(size.to_bytes(4, "big")) for size in (2, MAX_FRAME_BYTES)] == [2, MAX_FRAME_BYTES]
