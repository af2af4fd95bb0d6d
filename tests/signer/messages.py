"""Valid requests to the signer, for tests to send, mutate and compare."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import msgspec
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from coincurve import PrivateKey

from paychan.protocol.address import key_script
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import sign_payment
from paychan.protocol.settlement import Claim, Coin, Reserve
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    ChildRequest,
    FundingReply,
    FundingRequest,
    Reply,
    Request,
    SettlementRequest,
)
from signer.judge.facts import Limits
from signer.judge.handler import Handler
from signer.judge.queries import Identity
from signer.keys.ring import KeyRing
from tests.lib import background
from tests.lib.ledger import MemoryLedger

CLIENT = PrivateKey(sha256(b"a client of the signer's tests").digest())
CLIENT_KEY = CLIENT.public_key.format()
CHANGE_SCRIPT = key_script(CLIENT_KEY)
EXPIRY = UnixTime(1_900_000_000)
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def funding_transaction(script: bytes, value_sat: int, number: int) -> CTransaction:
    """A transaction whose output `number % 3` has this script and value; each number gives another transaction."""
    spent = CTxIn(COutPoint(sha256(b"funding %d" % number).digest(), number))
    outputs = [CTxOut(value_sat, CScript(script)) for _ in range(number % 3 + 1)]
    return CTransaction([spent], outputs)


def make_funding(outputs: int, number: int = 0, *, request_id: int = 9) -> FundingRequest:
    """A funding transaction with this number of outputs, the last of which is shown; each number gives another one."""
    spent = CTxIn(COutPoint(sha256(b"large %d" % number).digest(), 0))
    transaction = CTransaction([spent], [CTxOut(1_000, CScript(CHANGE_SCRIPT))] * outputs)
    return FundingRequest(request_id, transaction.serialize(), (outputs - 1,))


_MADE: dict[OutPoint, bytes] = {}


def _outpoint(script: bytes, value_sat: int, number: int) -> OutPoint:
    transaction = funding_transaction(script, value_sat, number)
    outpoint = OutPoint(bytes(transaction.GetTxid()), number % 3)
    _MADE[outpoint] = transaction.serialize()
    return outpoint


def make_claim(server_key: bytes, *, change_sat: int = 400_000, number: int = 0, at: OutPoint | None = None) -> Claim:
    """A claim of a channel of 1,000,000 satoshi; each `number` gives another channel of the same keys."""
    terms = make_terms(server_key, CLIENT_KEY, EXPIRY)
    outpoint = at or _outpoint(terms.funding_script, 1_000_000, number)
    payment = sign_payment(CLIENT, terms, outpoint, Sat(1_000_000), CHANGE_SCRIPT, Sat(change_sat))
    return Claim(terms, outpoint, Sat(1_000_000), CHANGE_SCRIPT, payment)


def server_key(keys: KeyRing) -> bytes:
    """The server's key for the only client of these tests."""
    return keys.new(CLIENT_KEY, EXPIRY).public_key


def destination(keys: KeyRing) -> bytes:
    """Destination of settlements with that client."""
    return next(keys.destinations(CLIENT_KEY, EXPIRY)).script


def make_request(keys: KeyRing, *, drained: int = 1, request_id: int = 7) -> SettlementRequest:
    """A channel with change and `drained` channels without, settled together for 5,000 satoshi."""
    key = server_key(keys)
    claims = [make_claim(key)]
    claims += [make_claim(key, change_sat=0, number=n) for n in range(1, drained + 1)]
    return SettlementRequest(request_id, tuple(claims), destination(keys), Sat(5_000))


def make_coin(keys: KeyRing, number: int = 0, value_sat: int = 20_000) -> Coin:
    """An output that pays to the reserve's key."""
    return Coin(_outpoint(key_script(keys.reserve().public_key), value_sat, number), Sat(value_sat))


def make_reserve_request(keys: KeyRing, *, drained: int = 1, coins: int = 2) -> SettlementRequest:
    """The settlement of `make_request`, with coins that help to pay for it."""
    reserve = Reserve(keys.reserve().public_key, tuple(make_coin(keys, number) for number in range(coins)))
    request = make_request(keys, drained=drained)
    return msgspec.structs.replace(request, destination_script=reserve.funding_script, reserve=reserve)


def make_fundings(*requests: SettlementRequest) -> list[FundingRequest]:
    """Fundings that a server shows before it requests these settlements; none for outpoints that were not made here."""
    spent = dict.fromkeys(claim.outpoint for request in requests for claim in request.claims)
    spent |= dict.fromkeys(coin.outpoint for each in requests if each.reserve for coin in each.reserve.coins)
    return [FundingRequest(1, _MADE[outpoint], (outpoint.vout,)) for outpoint in spent if outpoint in _MADE]


class Answers(Handler):
    """A handler that a test calls without a loop: it answers on the background loop, and the caller waits."""

    def __call__(self, request: Request, peer_uid: int = 0) -> Reply:
        return background.run(self.handle, request, peer_uid)


def make_handler(
    keys: KeyRing,
    *shown: SettlementRequest,
    ledger: Any = None,
    limits: Limits | None = None,
    **more: Any,
) -> Answers:
    """A handler that was shown the outputs that these requests spend."""
    handler = Answers(keys, ledger or MemoryLedger(), Identity("regtest", "hardened"), limits, **more)
    for funding in make_fundings(*shown):
        assert isinstance(handler(funding), FundingReply)
    return handler


def make_child_request(parent: SettlementRequest, fee_sat: int = 2_000) -> ChildRequest:
    """A child of a settlement, with another request id than the settlement had."""
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
    """The same S with an extra leading zero byte, which DER does not allow."""
    size = signature[3]
    body = signature[2 : 4 + size] + b"\x02" + bytes([signature[5 + size] + 1]) + b"\x00" + signature[6 + size :]
    return b"\x30" + bytes([len(body)]) + body
