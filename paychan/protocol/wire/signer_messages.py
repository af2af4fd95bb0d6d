"""Messages between server and signer: what is asked and answered over the Unix socket.

A frame is a 4-byte big-endian length, one version byte, and a msgpack array `[number, id, …fields]`. Requests are
answered in any order; the id pairs them. A request carries meaning (terms, claims, fee, destination), never a hash
or a transaction. Numbers are never reused; a changed message takes a new version, which `tests/signer` holds us to.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from paychan.protocol.kinds.script import KeyBytes
from paychan.protocol.settlement import Claim, Reserve, Settlement
from paychan.protocol.types import OutPoint, Sat, UnixTime

VERSIONS = {
    1: "health, keys and settlements",
    2: "a reserve's coins and children help a settlement to confirm; a refusal names the least fee that would do",
    3: "funding transactions are shown before anything of theirs is settled; what was signed is handed out again; "
    "an operator sees the signer's state; frames may be as large as a funding transaction",
    4: "health tells whether the signer can still write, and the fees that it allows; a key that is needed to settle is "
    "marked; newest payments are shown; what was signed or shown last is handed out "
    "with its claim; a server asks which of its records are behind; keys of earlier generations are named",
}
"""What each version brought. A peer of another version is turned away: messages have no optional meaning."""

VERSION = max(VERSIONS)

_T = TypeVar("_T")

MAX_FRAME_BYTES = 1024 * 1024 + 1024
"""The length prefix is checked before anything is read. A funding transaction can be as large as a block has room."""

USUAL_FRAME_BYTES = 64 * 1024
"""Only so many larger ones are read at a time."""

MAX_CLAIMS = 200
"""Claims in one settlement: its signed transaction, of up to 272 bytes a claim, fits a frame and what nodes relay."""


class Health(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """Who are you?"""

    id: int


class KeyRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """Which key of yours goes into the channel of this client key and expiry?

    `settling`: the key is needed to settle. Such requests have the budget of settlements; all others share one that
    strangers can use up.
    """

    id: int
    client_key: KeyBytes
    expiry: UnixTime
    settling: bool = False


class SettlementRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """Sign the settlement of these claims to this destination, at this fee in satoshi.

    `reserve` helps to pay for it; then the destination must be the reserve's.
    """

    id: int
    claims: tuple[Claim, ...]
    destination_script: bytes
    fee_sat: Sat
    reserve: Reserve | None = None


class ChildRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=4):
    """Sign a child that spends our output of this settlement to the same script, for a fee that speeds up both.

    The settlement is one that was signed before.
    """

    id: int
    parent: SettlementRequest
    fee_sat: Sat


class ReserveRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=5):
    """Which key holds the coins that may help to pay for settlements?"""

    id: int


class FundingRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=6):
    """Remember what these outputs of this transaction hold: channels' funding, or coins of the reserve.

    A legacy signature does not say how much it spends, so the signer wants to see where the coins come from before it
    signs. Serialized without witness, which is what the txid is made of. Asked once; the signer keeps it.
    """

    id: int
    transaction: bytes
    outputs: Annotated[tuple[int, ...], Meta(max_length=MAX_CLAIMS)]


class AgainRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=7):
    """Hand out the newest claim of this outpoint, and again the newest settlement that was signed for it."""

    id: int
    outpoint: OutPoint


class StatusRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=8):
    """How are you?"""

    id: int


class NewestRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=9):
    """Remember these payments: no settlement gives these clients more than this.

    Sent now and then for channels whose payments have grown. It signs nothing, and never lowers what is remembered.
    """

    id: int
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)]


class Newest(Struct, frozen=True, array_like=True):
    """The newest payment of a channel, as the server has it."""

    outpoint: OutPoint
    change_sat: Sat


class BehindRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=10):
    """Which of these payments are older than one that was shown, or belong to a channel that was settled?

    Asked at each start of the server, whose store may be from a backup, and before the first settlement of a channel.
    """

    id: int
    payments: Annotated[tuple[Newest, ...], Meta(max_length=MAX_CLAIMS)]


class OtherKeysRequest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=12):
    """Which other keys of yours may be in the channel of this client key and expiry?

    Its address may have been given out before the newest seed was drawn, or in the other key mode. `settling`: see there.
    """

    id: int
    client_key: KeyBytes
    expiry: UnixTime
    settling: bool = False


class HealthReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=101):
    """Network by name, how keys are derived, whether this signer is for debugging only; and whether it is well.

    `problem` is empty while the signer can do all that it is for. The limits of fees are those of its configuration.
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


class KeyReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=102):
    """The channel's server key, and where the signer lets its settlement pay to."""

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
    """They are remembered."""

    id: int


class AgainReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=107):
    """The newest claim of the outpoint that was signed for or shown: with it, a settlement of any fee can be asked for.

    Where it was signed for, also the settlement and the request that was signed.
    """

    id: int
    claim: Claim
    request: SettlementRequest | None = None
    settlement: Settlement | None = None


class StatusReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=108):
    """What an operator wants to see. Times are Unix seconds, 0 where there is none."""

    id: int
    started_at: UnixTime
    decisions: int
    """Lines of the audit log, and the hash of the last one."""
    head: str
    signed_last_hour_sat: Sat
    signed_last_day_sat: Sat
    heartbeat_at: UnixTime
    trial: tuple[str, ...]
    """Policies that only log what they would refuse."""
    protections: tuple[str, ...]
    """What the kernel gave to keep keys in, and, begun with "no ", what it did not."""
    problem: str = ""
    written_at: UnixTime = UnixTime(0)
    free_bytes: int = 0


class NewestReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=109):
    """All are remembered but these, by their index in the request.

    `unshown`: the funding transaction was not shown. `refused`: not a payment of a channel with a key of the signer's,
    or one of less than is remembered.
    """

    id: int
    unshown: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()


class BehindReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=110):
    """Those of the channels."""

    id: int
    outpoints: tuple[OutPoint, ...]


class OtherKeysReply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=112):
    """Server keys of earlier generations, the newest first; none is made for this."""

    id: int
    server_keys: tuple[KeyBytes, ...]


class Refusal(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=100):
    """The signer says no: a stable tag (`policy-…`, or `protocol-…` for requests it can't read) and the reason.

    `need_sat` is a fee in satoshi that would do, where the fee was the reason: the least (policy-replacement), or the most
    (policy-fee); else 0.
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
    | Refusal
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


class WireError(Exception):
    """The peer sent something that is not a message of this protocol."""


def encode_frame(message: Request | Reply) -> bytes:
    """Frame a message: length, version, body."""
    body = bytes([VERSION]) + _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


def frame_size(prefix: bytes) -> int:
    """Read the length prefix (4 bytes).

    Raises:
        WireError: empty, or longer than any message.
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
