"""The signer's wire format: it changes only together with its version."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from msgspec.inspect import StructType, type_info

from paychan.protocol.wire.signer_messages import (
    MAX_CLAIMS,
    MAX_FRAME_BYTES,
    Health,
    Reply,
    Request,
    WireError,
    decode_reply,
    decode_request,
    encode_frame,
    frame_size,
)
from paychan.protocol.wire.signer_versions import VERSION, VERSIONS
from tests.lib.looped import looped

FINGERPRINTS = {
    # Server and signer are updated at different times, so every released version keeps its line for ever. When a test
    # fails here: undo the change, or add a version with its reason to signer_versions.VERSIONS and its line here.
    1: "b0a2e1d8d5457bfc617c97d1cade9656ed1e71dacd4be8e5c4126239639e6684",
    2: "578f65c58764a8ef6a315a0ca1e0e66982b6ea6639c1a45249f2b29cb4b29a16",
    3: "b424beb87bbf9ee4b1e9f6f884d314425ac151bf581feef524cf95435baaa428",
    4: "2859480f04b520cceecd6c270a34edf9390c146135e04eeea6bd565b64e30342",
    5: "503a8fdb14bf9a67b412a7b85d2f38267ef5d8e3e9e6a5f77a4e03504a17adee",
    6: "313ff0cd23bf2f52ebed1b6ca04b2451988cd7584187c1ea26da3232cada333e",
    7: "9c2db1f48529ea1d6b1ef07ee5f763ed1e64806c087c36b21a3f28b9222cc3ec",
}


def describe(kind: Any) -> Any:
    """All facts of a type that the wire format depends on: tags, order, names, types and limits of fields."""
    if isinstance(kind, StructType):
        fields = [[f.name, describe(f.type), f.required, repr(f.default)] for f in kind.fields]
        return [kind.cls.__name__, kind.tag, kind.array_like, fields]
    if isinstance(kind, msgspec.Struct):
        return [type(kind).__name__, *(describe(getattr(kind, name)) for name in kind.__struct_fields__)]
    return [describe(item) for item in kind] if isinstance(kind, tuple) else kind


def test_changed_messages_take_a_new_version() -> None:
    """The fingerprint of all messages and their limits is the recorded one of this version."""
    limits = [MAX_FRAME_BYTES, MAX_CLAIMS]
    described = json.dumps([describe(type_info(Request)), describe(type_info(Reply)), limits])

    assert sha256(described.encode()).hexdigest() == FINGERPRINTS[VERSION]


def test_versions_have_reasons() -> None:
    """Versions are numbered without gaps; each has a reason and keeps its fingerprint."""
    assert list(VERSIONS) == list(FINGERPRINTS) == list(range(1, VERSION + 1))
    assert all(VERSIONS.values())
    assert len(set(FINGERPRINTS.values())) == VERSION


@looped("size", [0, 1, MAX_FRAME_BYTES + 1, 0xFFFFFFFF])
def test_impossible_lengths_are_refused(size: int) -> None:
    """An impossible length is refused before the body is read."""
    with pytest.raises(WireError, match=f"frame of {size} bytes"):
        frame_size(size.to_bytes(4, "big"))


def test_frame_is_length_version_and_body() -> None:
    """A frame is a big-endian length, the version byte, and an array of number, id and fields."""
    assert encode_frame(Health(5)) == bytes.fromhex("00000004 07 92 01 05")


@looped("body", ["", "00920105", "06920105", "07", "079104", "07930201c0", "07c1", "079165", "0780"])
def test_invalid_messages_are_refused(body: str) -> None:
    """Unknown versions and numbers, missing fields and garbage are `WireError`s, as requests and as replies."""
    for decode in (decode_request, decode_reply):
        with pytest.raises(WireError):
            decode(bytes.fromhex(body))


def test_deep_nesting_is_refused() -> None:
    """A body of nested arrays ends as a `WireError`, not as a `RecursionError`."""
    with pytest.raises(WireError):
        decode_request(bytes([VERSION]) + b"\x91" * 60_000)
