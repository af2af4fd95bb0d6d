"""What the signer signs: the published vectors byte for byte, SIGHASH_ALL only, and never anything by accident."""

from __future__ import annotations

import pytest
from bitcoin.core import CTransaction
from bitcoin.core.script import SIGHASH_ALL, CScript, SignatureHash
from hypothesis import given, settings

from paychan.protocol.address import decode_address, key_script
from paychan.protocol.signerwire import (
    MAX_CLAIMS,
    ChildReply,
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
    Refusal,
    ReserveReply,
    ReserveRequest,
    SettlementReply,
    SettlementRequest,
    encode_frame,
    frame_size,
)
from paychan.protocol.types import Sat, UnixTime
from signer.handlers import Handler
from signer.keys import Keys, StaticKey, hardened_keys, rbpcp_v2_keys
from signer.policy import MAX_COINS
from tests.lib.kernel import interpreter_accepts
from tests.lib.ledger import MemoryLedger
from tests.lib.vectors import JS_CASES, Case
from tests.signer.messages import (
    CLIENT,
    CLIENT_KEY,
    EXPIRY,
    make_child_request,
    make_request,
    make_reserve_request,
    mutated,
)
from tests.signer.requests import damaged_requests

KEYS = hardened_keys(bytes(32))
REQUEST = make_request(KEYS)


def handler(keys: Keys = KEYS) -> Handler:
    return Handler(keys, MemoryLedger(), "regtest", "hardened", debug=False)


class RecordingKeys:
    """The keys of a tree, with every digest that was signed."""

    def __init__(self, keys: Keys) -> None:
        self.public_key = keys.public_key
        self.destination_script = keys.destination_script
        self.reserve_key = keys.reserve_key
        self.destination_key = keys.destination_key
        self._keys = keys
        self.digests: list[bytes] = []

    def sign(self, client_key: bytes, expiry: UnixTime, digest: bytes) -> bytes:
        self.digests.append(digest)
        return self._keys.sign(client_key, expiry, digest)

    def sign_destination(self, client_key: bytes, expiry: UnixTime, digest: bytes) -> bytes:
        self.digests.append(digest)
        return self._keys.sign_destination(client_key, expiry, digest)

    def sign_reserve(self, digest: bytes) -> bytes:
        self.digests.append(digest)
        return self._keys.sign_reserve(digest)


def pushes(script: bytes) -> list[bytes]:
    """Data pushed by a scriptSig; OP_1 and the like count as empty."""
    return [data or b"" for _, data, _ in CScript(script).raw_iter()]


def test_health_says_who_it_is() -> None:
    """Health tells network, key mode and debug under the id that was asked with."""
    assert handler()(Health(3)) == HealthReply(3, "regtest", "hardened", debug=False)


def test_key_reply_is_what_settlements_are_held_to() -> None:
    """The key and destination that are handed out are those that a settlement of the channel needs."""
    reply = handler()(KeyRequest(4, CLIENT_KEY, EXPIRY))

    assert isinstance(reply, KeyReply)
    assert (reply.server_key, reply.destination_script) == (
        REQUEST.claims[0].terms.server_key,
        REQUEST.destination_script,
    )


def test_reserve_key_is_told() -> None:
    """The key that coins are to pay to is the one that the reserve of a settlement must have."""
    assert handler()(ReserveRequest(6)) == ReserveReply(6, KEYS.reserve_key())


@pytest.mark.parametrize(
    ("client_key", "expiry", "reason"),
    [
        (b"\x02" + b"\xff" * 32, EXPIRY, "not a point"),
        (b"\x05" + CLIENT_KEY[1:], EXPIRY, "compressed"),
        (CLIENT_KEY, 499_999_999, "not a time"),
        (CLIENT_KEY, 1 << 32, "not a time"),
        (CLIENT_KEY, -1, "not a time"),
    ],
)
def test_no_key_for_an_impossible_channel(client_key: bytes, expiry: int, reason: str) -> None:
    """A client key off the curve or an expiry that is no time gets no server key."""
    reply = handler()(KeyRequest(5, client_key, UnixTime(expiry)))

    assert isinstance(reply, Refusal)
    assert reply.tag == "policy-template"
    assert reason in reply.reason


def test_no_key_for_a_client_with_the_servers_key() -> None:
    """A client that brings the server's own key gets none: one side could spend alone."""
    keys = StaticKey(CLIENT.secret, b"")
    reply = handler(keys)(KeyRequest(5, CLIENT_KEY, EXPIRY))

    assert isinstance(reply, Refusal)
    assert reply.tag == "policy-template"


@pytest.mark.parametrize("case", JS_CASES, ids=lambda case: case.name)
def test_settlements_of_the_vectors_are_reproduced(case: Case) -> None:
    """With the vectors' server key, each settlement is the published one byte for byte."""
    expected = case.raw["settlement"]
    destination = decode_address(expected["server_address"], case.network)
    keys = StaticKey(case.server_key.secret, destination)

    reply = handler(keys)(SettlementRequest(9, (case.claim(),), destination, Sat(expected["fee"])))

    assert isinstance(reply, SettlementReply)
    assert reply.settlement.transaction.hex() == expected["tx_hex"]
    assert reply.settlement.txid[::-1].hex() == expected["txid"]
    assert reply.settlement.fee_sat == expected["fee"]


@pytest.mark.parametrize("keys", [KEYS, rbpcp_v2_keys(bytes(32))], ids=["hardened", "rbpcp-v2"])
@pytest.mark.parametrize("drained", [0, 1, 5])
def test_policy_sighash(keys: Keys, drained: int) -> None:
    """Every digest that is signed is the SIGHASH_ALL digest of its input, and every server signature says ALL."""
    recording = RecordingKeys(keys)
    request = make_request(keys, drained=drained)

    reply = handler(recording)(request)

    assert isinstance(reply, SettlementReply)
    transaction = CTransaction.deserialize(reply.settlement.transaction)
    scripts = [CScript(claim.terms.redeem_script) for claim in request.claims]
    assert recording.digests == [SignatureHash(s, transaction, i, SIGHASH_ALL) for i, s in enumerate(scripts)]
    assert [pushes(txin.scriptSig)[1][-1] for txin in transaction.vin] == [SIGHASH_ALL] * len(scripts)


def test_policy_sighash_of_coins_and_children() -> None:
    """What is signed for coins of the reserve, and for a child, is SIGHASH_ALL too."""
    recording = RecordingKeys(KEYS)
    signs = handler(recording)
    request = make_reserve_request(KEYS)

    replies = signs(request), signs(make_child_request(request))

    assert isinstance(replies[0], SettlementReply)
    assert isinstance(replies[1], ChildReply)
    settlement, child = (
        CTransaction.deserialize(raw) for raw in (replies[0].settlement.transaction, replies[1].child.transaction)
    )
    script = CScript(key_script(KEYS.reserve_key()))
    assert recording.digests[2:4] == [SignatureHash(script, settlement, i, SIGHASH_ALL) for i in (2, 3)]
    assert recording.digests[-1] == SignatureHash(script, child, 0, SIGHASH_ALL)
    assert [pushes(txin.scriptSig)[0][-1] for txin in (*settlement.vin[2:], *child.vin)] == [SIGHASH_ALL] * 3


@pytest.mark.parametrize("flag", range(256))
def test_policy_sighash_does_not_follow_the_client(flag: int) -> None:
    """Whatever hash flag the client's payment has, no server signature has any but ALL."""
    recording = RecordingKeys(KEYS)
    reply = handler(recording)(mutated(REQUEST, "claims.0.payment.flag", flag))

    if flag == 0x83:
        assert isinstance(reply, SettlementReply)
        transaction = CTransaction.deserialize(reply.settlement.transaction)
        assert all(pushes(txin.scriptSig)[1][-1] == SIGHASH_ALL for txin in transaction.vin)
    else:
        assert isinstance(reply, Refusal)
        assert not recording.digests


def test_nothing_is_signed_before_everything_is_checked() -> None:
    """A batch whose last claim is bad gets no signature for its good ones either."""
    recording = RecordingKeys(KEYS)
    request = make_request(KEYS, drained=5)

    reply = handler(recording)(mutated(request, "claims.5.payment.flag", 0x83))

    assert isinstance(reply, Refusal)
    assert not recording.digests


def test_largest_settlement_fits_its_frames() -> None:
    """Request and reply of as many claims as are allowed stay below the frame limit."""
    request = make_reserve_request(KEYS, drained=MAX_CLAIMS - 1, coins=MAX_COINS)
    signs = handler()
    reply = signs(request)

    assert isinstance(reply, SettlementReply)
    for message in (request, reply, make_child_request(request), signs(make_child_request(request))):
        frame = encode_frame(message)
        assert frame_size(frame[:4]) == len(frame) - 4


@settings(max_examples=200, deadline=None)
@given(request=damaged_requests(KEYS))
def test_whatever_is_asked_is_refused_or_sound(request: SettlementRequest) -> None:
    """No request makes the handler fail, and what it signs is valid and pays all but the fee to its owners."""
    reply = handler()(request)

    if isinstance(reply, Refusal):
        return
    assert isinstance(reply, SettlementReply)
    transaction = CTransaction.deserialize(reply.settlement.transaction)
    coins = request.reserve.coins if request.reserve else ()
    spent = [(claim.terms.funding_script, claim.funding_sat) for claim in request.claims]
    spent += [(key_script(KEYS.reserve_key()), coin.value_sat) for coin in coins]
    for index, (script, value_sat) in enumerate(spent):
        assert interpreter_accepts(script, reply.settlement.transaction, index, value_sat)
    paid = {bytes(out.scriptPubKey): out.nValue for out in transaction.vout}
    change_sat = request.claims[0].payment.change_sat
    assert paid.pop(request.claims[0].change_script, 0) == change_sat
    total_sat = sum(value_sat for _, value_sat in spent) - change_sat - request.fee_sat
    ours = key_script(KEYS.reserve_key()) if request.reserve else KEYS.destination_script(CLIENT_KEY, EXPIRY)
    assert paid == ({ours: total_sat} if total_sat else {})
