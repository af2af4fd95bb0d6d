"""Frames between server and signer: encoding and decoding (tests/signer tests the socket)."""

from __future__ import annotations

import msgspec
import pytest

from paychan.protocol.settlement import Claim, sign_settlement
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    MAX_FRAME_BYTES,
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
    Refusal,
    Reply,
    Request,
    SettlementReply,
    SettlementRequest,
    WireError,
    decode_reply,
    decode_request,
    encode_frame,
    frame_size,
)
from paychan.protocol.wire.signer_versions import VERSION
from tests.lib.channels import SERVER_DESTINATION, Payer
from tests.lib.looped import looped

PAYER = Payer("wire")
CLAIM = PAYER.channel().claim
SETTLEMENT = sign_settlement(
    [CLAIM], SERVER_DESTINATION, Sat(500), lambda _, digest: PAYER.server_key.sign(digest, hasher=None)
)
REQUESTS: list[Request] = [
    Health(0),
    KeyRequest(1, PAYER.terms.client_key, UnixTime(2**32 - 1)),
    SettlementRequest(2**63, (CLAIM, CLAIM), SERVER_DESTINATION, Sat(500)),
]
REPLIES: list[Reply] = [
    HealthReply(0, "regtest", "derived", debug=True),
    KeyReply(1, PAYER.terms.server_key, SERVER_DESTINATION),
    SettlementReply(2**63, SETTLEMENT),
    Refusal(3, "policy-fee", "fee of 5 sat \u2260 4 sat"),
]


def parts(frame: bytes) -> bytes:
    """The body of a frame with a correct length prefix."""
    assert frame_size(frame[:4]) == len(frame) - 4
    return frame[4:]


@looped("message", REQUESTS, ids=lambda message: type(message).__name__)
def test_requests_are_read_back(message: Request) -> None:
    """Every request decodes to the same value, and never as a reply."""
    body = parts(encode_frame(message))

    assert decode_request(body) == message
    with pytest.raises(WireError):
        decode_reply(body)


@looped("message", REPLIES, ids=lambda message: type(message).__name__)
def test_replies_are_read_back(message: Reply) -> None:
    """Every reply decodes to the same value, and never as a request."""
    body = parts(encode_frame(message))

    assert decode_reply(body) == message
    with pytest.raises(WireError):
        decode_request(body)


def test_numbers_of_messages_are_frozen() -> None:
    """Each message keeps its first number, so that an old peer never confuses two messages."""
    numbers = {type(m).__name__: msgspec.msgpack.decode(encode_frame(m)[5:])[0] for m in (*REQUESTS, *REPLIES)}

    assert numbers == {
        "Health": 1,
        "KeyRequest": 2,
        "SettlementRequest": 3,
        "Refusal": 100,
        "HealthReply": 101,
        "KeyReply": 102,
        "SettlementReply": 103,
    }


@looped("size", [0, 1, MAX_FRAME_BYTES + 1, 2**31, 2**32 - 1])
def test_length_prefix_outside_the_limits_is_refused(size: int) -> None:
    """An empty or oversized frame is refused by its prefix, before its body is read."""
    with pytest.raises(WireError, match=f"frame of {size} bytes, want 2 to {MAX_FRAME_BYTES}"):
        frame_size(size.to_bytes(4, "big"))


@looped("size", [2, MAX_FRAME_BYTES])
def test_length_prefix_at_the_limits_is_taken(size: int) -> None:
    """Both ends of the range are accepted."""
    assert frame_size(size.to_bytes(4, "big")) == size


@looped("version", [v for v in range(256) if v != VERSION])
def test_other_versions_are_refused(version: int) -> None:
    """A frame of another version is refused with both versions."""
    body = bytes([version]) + encode_frame(REQUESTS[0])[5:]

    for decode in (decode_request, decode_reply):
        with pytest.raises(WireError, match=f"message version {version}, want {VERSION}"):
            decode(body)


HOSTILE = {
    "nothing": b"",
    "version alone": bytes([VERSION]),
    "no msgpack": bytes([VERSION, 0xC1]),
    "map": bytes([VERSION]) + msgspec.msgpack.encode({"id": 1}),
    "empty array": bytes([VERSION, 0x90]),
    "number unknown": bytes([VERSION]) + msgspec.msgpack.encode([99, 1]),
    "number as text": bytes([VERSION]) + msgspec.msgpack.encode(["1", 1]),
    "id missing": bytes([VERSION]) + msgspec.msgpack.encode([1]),
    "id as text": bytes([VERSION]) + msgspec.msgpack.encode([1, "1"]),
    "key of 32 bytes": bytes([VERSION]) + msgspec.msgpack.encode([2, 1, bytes(32), 1_500_000_000]),
    "key of 65 bytes": bytes([VERSION]) + msgspec.msgpack.encode([2, 1, bytes(65), 1_500_000_000]),
    "claims missing": bytes([VERSION]) + msgspec.msgpack.encode([3, 1]),
    "claim of nothing": bytes([VERSION]) + msgspec.msgpack.encode([3, 1, [[]], b"", 0]),
    "trailing byte": encode_frame(REQUESTS[0])[4:] + b"\x00",
    "array longer than the frame": bytes([VERSION, 0xDD, 0xFF, 0xFF, 0xFF, 0xFF]),
    "nested without end": bytes([VERSION, 0x93, 1, 1]) + b"\x91" * 60_000,
    "text that is not UTF-8": bytes([VERSION, 0x94, 100, 1, 0xA2, 0xFF, 0xFE, 0xA1, 0x61]),
}


@looped("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bodies_are_refused(body: bytes) -> None:
    """For any invalid bytes the reader raises `WireError`: no crash, no partial message."""
    for decode in (decode_request, decode_reply):
        with pytest.raises(WireError):
            decode(body)


def test_the_largest_batch_fits_both_ways() -> None:
    """A request with a batch of 200 claims fits a frame, and so does the reply with its settlement."""
    payment = PAYER.payment(0)
    claims = tuple(
        Claim(PAYER.terms, OutPoint(bytes([number]) * 32, 2**32 - 1), PAYER.funding_sat, PAYER.change_script, payment)
        for number in range(200)
    )
    request = SettlementRequest(2**63, claims, SERVER_DESTINATION, Sat(500))
    reply = SettlementReply(
        2**63,
        sign_settlement(claims, SERVER_DESTINATION, Sat(500), lambda _, digest: PAYER.server_key.sign(digest, None)),
    )

    assert decode_request(parts(encode_frame(request))) == request
    assert decode_reply(parts(encode_frame(reply))) == reply
