"""Valid requests to the signer, for tests to send, mutate and compare."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import msgspec
from coincurve import PrivateKey

from paychan.protocol.address import key_script
from paychan.protocol.payment import sign_payment
from paychan.protocol.scripts import make_terms
from paychan.protocol.settlement import Claim, Coin, Reserve
from paychan.protocol.signerwire import ChildRequest, SettlementRequest
from paychan.protocol.types import OutPoint, Sat, UnixTime
from signer.keys import Keys

CLIENT = PrivateKey(sha256(b"a client of the signer's tests").digest())
CLIENT_KEY = CLIENT.public_key.format()
CHANGE_SCRIPT = key_script(CLIENT_KEY)
EXPIRY = UnixTime(1_900_000_000)
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def make_claim(server_key: bytes, *, change_sat: int = 400_000, number: int = 0) -> Claim:
    """A claim out of a channel of 1,000,000 satoshi; `number` tells channels of the same keys apart."""
    terms = make_terms(server_key, CLIENT_KEY, EXPIRY)
    outpoint = OutPoint(sha256(b"funding %d" % number).digest(), number)
    payment = sign_payment(CLIENT, terms, outpoint, CHANGE_SCRIPT, Sat(change_sat))
    return Claim(terms, outpoint, Sat(1_000_000), CHANGE_SCRIPT, payment)


def make_request(keys: Keys, *, drained: int = 1, request_id: int = 7) -> SettlementRequest:
    """A channel with change and `drained` channels without, settled together for 5,000 satoshi."""
    server_key = keys.public_key(CLIENT_KEY, EXPIRY)
    claims = [make_claim(server_key)]
    claims += [make_claim(server_key, change_sat=0, number=n) for n in range(1, drained + 1)]
    destination = keys.destination_script(CLIENT_KEY, EXPIRY)
    return SettlementRequest(request_id, tuple(claims), destination, Sat(5_000))


def make_coin(number: int = 0, value_sat: int = 20_000) -> Coin:
    """An output that pays to the reserve's key."""
    return Coin(OutPoint(sha256(b"coin %d" % number).digest(), number), Sat(value_sat))


def make_reserve_request(keys: Keys, *, drained: int = 1, coins: int = 2) -> SettlementRequest:
    """The settlement of `make_request`, with coins that help to pay for it."""
    reserve = Reserve(keys.reserve_key(), tuple(map(make_coin, range(coins))))
    request = make_request(keys, drained=drained)
    return msgspec.structs.replace(request, destination_script=reserve.funding_script, reserve=reserve)


def make_child_request(parent: SettlementRequest, fee_sat: int = 2_000) -> ChildRequest:
    """A child of a settlement, under another id than it was asked for with."""
    return ChildRequest(8, parent, Sat(fee_sat))


def mutated(value: Any, path: str, new: Any) -> Any:
    """A copy with one field replaced: `mutated(request, "claims.0.payment.flag", 1)`."""
    name, _, rest = path.partition(".")
    if isinstance(value, tuple):
        items = list(value)
        items[int(name)] = mutated(items[int(name)], rest, new) if rest else new
        return tuple(items)
    return msgspec.structs.replace(value, **{name: mutated(getattr(value, name), rest, new) if rest else new})


def with_high_s(signature: bytes) -> bytes:
    """The other S that verifies by consensus but is not relayed (BIP62 rule 5)."""
    r, s = signature[: 4 + signature[3]], signature[6 + signature[3] :]
    high = b"\x00" + (ORDER - int.from_bytes(s, "big")).to_bytes(32, "big")
    body = r[2:] + b"\x02" + bytes([len(high)]) + high
    return b"\x30" + bytes([len(body)]) + body


def with_padded_s(signature: bytes) -> bytes:
    """The same S with a zero byte before it that DER doesn't allow."""
    size = signature[3]
    body = signature[2 : 4 + size] + b"\x02" + bytes([signature[5 + size] + 1]) + b"\x00" + signature[6 + size :]
    return b"\x30" + bytes([len(body)]) + body
