"""Messages between server and signer over the Unix socket.

A frame is a 4-byte big-endian length, one version byte, and a msgpack array `[number, id, …fields]`. The signer answers
requests in any order; the id pairs a reply with its request. A request for a signature carries facts (terms, claims,
fee, destination), never a hash or a transaction. Numbers are never reused. A changed message needs a new version;
`tests/signer` checks this.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from paychan.protocol.keys import KeyBytes
from paychan.protocol.settlement import Claim, Reserve, Settlement
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_versions import VERSION

_T = TypeVar("_T")

MAX_FRAME_BYTES = 128 * 1024
"""Limit of the length prefix, checked before the body is read: the largest funding transaction, or settlement, fits."""

MAX_FUNDING_BYTES = 100_000
"""Nodes relay no larger transaction: 400,000 weight units, 4 for each byte without witness (MAX_STANDARD_TX_WEIGHT)."""

MAX_CLAIMS = 200
"""Claims in one settlement: with up to 272 bytes per claim, the signed transaction fits a frame, and nodes relay it."""


class Health(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """Name the signer's network, key mode and limits, and say whether it is healthy."""

    id: int


class KeyRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """Derive the server key of the channel with this client key and expiry.

    `settling`: the server needs the key to settle. Such requests use the rate budget of settlements; all others share a
    budget that unknown clients can use up.
    """

    id: int
    client_key: KeyBytes
    expiry: UnixTime
    settling: bool = False


class SettlementRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """Sign the settlement of these claims to this destination, with this fee in satoshi.

    `reserve`: coins that help to pay the fee; then the destination must be the reserve's script.
    """

    id: int
    claims: tuple[Claim, ...]
    destination_script: bytes
    fee_sat: Sat
    reserve: Reserve | None = None


class ChildRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=4):
    """Sign a child that spends the server's output of this settlement to the same script; its fee speeds up both.

    `parent` is the request of a settlement that the signer has signed. The fee is in satoshi.
    """

    id: int
    parent: SettlementRequest
    fee_sat: Sat


class ReserveRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=5):
    """Name the reserve's key, whose coins may help to pay for settlements."""

    id: int


class FundingRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=6):
    """Remember the values of these outputs of this transaction: channels' funding, or coins of the reserve.

    A legacy signature does not commit to the value that it spends, so the signer must see the funding transaction
    before it signs. The transaction is serialized without witness, as its txid is made. Shown once; the signer keeps
    the values.
    """

    id: int
    transaction: bytes
    outputs: Annotated[tuple[int, ...], Meta(max_length=MAX_CLAIMS)]


class AgainRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=7):
    """Return the newest claim of this outpoint, and again the newest settlement that the signer signed for it."""

    id: int
    outpoint: OutPoint


class StatusRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=8):
    """Report the signer's state for an operator."""

    id: int


class NewestRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=9):
    """Remember these payments: from then on no settlement may give these clients more change.

    The server sends it from time to time for channels whose payments have grown. The signer signs nothing, and never
    replaces a remembered payment by one that gives the client more.
    """

    id: int
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)]


class Newest(Struct, frozen=True, array_like=True):
    """The newest payment of a channel in the server's record."""

    outpoint: OutPoint
    change_sat: Sat


class BehindRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=10):
    """Name the payments that are older than one that the signer has seen, or whose channel it has settled.

    The server asks at each start, because its store may be from a backup, and before the first settlement of a channel.
    """

    id: int
    payments: Annotated[tuple[Newest, ...], Meta(max_length=MAX_CLAIMS)]


class OtherKeysRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=12):
    """Name the other keys that the channel with this client key and expiry may contain.

    The server may have given out the channel's address before the newest seed was made, or in the other key mode.
    `settling`: as in the request for a key.
    """

    id: int
    client_key: KeyBytes
    expiry: UnixTime
    settling: bool = False


class ShownRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=13):
    """Name the channels whose payments were shown and that expire later than this time, a page at a time.

    The server asks at each start and finds out whether its store lacks channels. `after` is from the previous reply.
    """

    id: int
    expires_after: UnixTime
    after: OutPoint | None = None


class CertificateRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=14):
    """Certify with the identity key that the server signs receipts with this key from `not_before` to `not_after`.

    The request carries no hash: the signer makes the digest that it signs (`certificate.certificate_digest`). `not_before`
    is the present time, give or take an hour, and the certificate lasts at most 100 days.
    """

    id: int
    receipt_key: KeyBytes
    not_before: UnixTime
    not_after: UnixTime


class HealthReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=101):
    """Name of the network, key mode, whether this signer is for debugging only, and its health.

    `problem` is empty while the signer can do all its tasks. The fee limits are those of the signer's configuration.
    """

    id: int
    network: str
    key_mode: str
    debug: bool
    problem: str = ""
    written_at: UnixTime = UnixTime(0)
    max_fee_percent: int = 100
    max_fee_sat: Sat = Sat(0)
    max_fee_sat_per_vb: int = 0
    identity_key: bytes = b""


class KeyReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=102):
    """The channel's server key, and the destination that the signer allows for its settlement."""

    id: int
    server_key: KeyBytes
    destination_script: bytes


class SettlementReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=103):
    """The signed settlement, rebuilt by the signer."""

    id: int
    settlement: Settlement


class ChildReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=104):
    """The signed child."""

    id: int
    child: Settlement


class ReserveReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=105):
    """The reserve's public key; its coins are P2PKH."""

    id: int
    public_key: KeyBytes


class FundingReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=106):
    """The signer has stored the values."""

    id: int


class AgainReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=107):
    """The newest claim of the outpoint that the signer has signed or seen; it suffices to request any settlement.

    If the signer has signed for the claim: also the settlement and its request.
    """

    id: int
    claim: Claim
    request: SettlementRequest | None = None
    settlement: Settlement | None = None


class StatusReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=108):
    """State of the signer for an operator. Times are Unix seconds, 0 if there is none."""

    id: int
    started_at: UnixTime
    decisions: int
    """Number of lines of the audit log; `head` is the hash of the last one."""
    head: str
    signed_last_hour_sat: Sat
    signed_last_day_sat: Sat
    heartbeat_at: UnixTime
    trial: tuple[str, ...]
    """Policies that only log what they would refuse."""
    protections: tuple[str, ...]
    """Protections of keys that the kernel provides; a missing one begins with "no "."""
    problem: str = ""
    written_at: UnixTime = UnixTime(0)
    free_bytes: int = 0


class NewestReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=109):
    """The signer has stored all payments but these, given by their index in the request.

    `unshown`: the signer has not seen the funding transaction. `refused`: the channel has no key of the signer, the
    payment is not valid, or it pays less than the stored one.
    """

    id: int
    unshown: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()


class BehindReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=110):
    """Outpoints of the channels whose payment in the request is behind."""

    id: int
    outpoints: tuple[OutPoint, ...]


class OtherKeysReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=112):
    """Server keys of earlier generations, the newest first; the request never creates a key."""

    id: int
    server_keys: tuple[KeyBytes, ...]


class ShownReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=113):
    """Outpoints of such channels. `after` continues with the next page, which may also be empty; nil: there is none."""

    id: int
    outpoints: tuple[OutPoint, ...]
    after: OutPoint | None = None


class CertificateReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=114):
    """The certificate: the identity key, and its signature."""

    id: int
    identity_key: KeyBytes
    signature: bytes


class Refusal(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=100):
    """The signer refuses: a stable tag (`policy-…`, or `protocol-…` for requests that it can't read) and the reason.

    `need_sat` is the fee in satoshi that the signer would accept, if the fee was the reason: the lowest
    (policy-replacement) or the highest (policy-fee); else 0.
    """

    id: int
    tag: str
    reason: str
    need_sat: Sat = Sat(0)


Request: TypeAlias = (
    Health
    | KeyRequest
    | SettlementRequest
    | ChildRequest
    | ReserveRequest
    | FundingRequest
    | AgainRequest
    | StatusRequest
    | NewestRequest
    | BehindRequest
    | OtherKeysRequest
    | ShownRequest
    | CertificateRequest
)
Reply: TypeAlias = (
    HealthReply
    | KeyReply
    | SettlementReply
    | ChildReply
    | ReserveReply
    | FundingReply
    | AgainReply
    | StatusReply
    | NewestReply
    | BehindReply
    | OtherKeysReply
    | ShownReply
    | CertificateReply
    | Refusal
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


class WireError(Exception):
    """The peer sent bytes that are not a message of this protocol."""


def encode_frame(message: Request | Reply) -> bytes:
    """Frame a message: length, version, body."""
    body = bytes([VERSION]) + _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


def frame_size(prefix: bytes) -> int:
    """Read the length prefix (4 bytes).

    Raises:
        WireError: below 2 or above `MAX_FRAME_BYTES`.
    """
    size = int.from_bytes(prefix, "big")
    if not 1 < size <= MAX_FRAME_BYTES:
        msg = f"frame of {size} bytes, want 2 to {MAX_FRAME_BYTES}"
        raise WireError(msg)
    return size


def decode_request(body: bytes) -> Request:
    """Read the body of a frame as a request.

    Raises:
        WireError: unknown version or number, missing or wrong fields.
    """
    return _decode(_requests, body)


def decode_reply(body: bytes) -> Reply:
    """Read the body of a frame as a reply. Raises `WireError` like `decode_request`."""
    return _decode(_replies, body)


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes) -> _T:
    if not body or body[0] != VERSION:
        msg = f"message version {body[0] if body else None}, want {VERSION}"
        raise WireError(msg)
    try:
        return decoder.decode(body[1:])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(str(error)) from error
