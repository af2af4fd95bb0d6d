"""What the signer signs: the published vectors byte for byte, SIGHASH_ALL only, and never anything by accident."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from bitcoin.core import CTransaction
from bitcoin.core.script import SIGHASH_ALL, CScript, SignatureHash
from hypothesis import given, settings
from hypothesis import strategies as st

from paychan.protocol.address import decode_address
from paychan.protocol.signerwire import (
    MAX_CLAIMS,
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
    Refusal,
    SettlementReply,
    SettlementRequest,
    encode_frame,
    frame_size,
)
from paychan.protocol.types import Sat, UnixTime
from signer.handlers import Handler
from signer.keys import Keys, StaticKey, hardened_keys, rbpcp_v2_keys
from tests.lib.kernel import interpreter_accepts
from tests.lib.vectors import JS_CASES, Case
from tests.signer.messages import CLIENT, CLIENT_KEY, EXPIRY, make_request, mutated

KEYS = hardened_keys(bytes(32))
REQUEST = make_request(KEYS)


def handler(keys: Keys = KEYS) -> Handler:
    return Handler(keys, "regtest", "hardened", debug=False)


class RecordingKeys:
    """The keys of a tree, with every digest that was signed."""

    def __init__(self, keys: Keys) -> None:
        self.public_key = keys.public_key
        self.destination_script = keys.destination_script
        self._keys = keys
        self.digests: list[bytes] = []

    def sign(self, client_key: bytes, expiry: UnixTime, digest: bytes) -> bytes:
        self.digests.append(digest)
        return self._keys.sign(client_key, expiry, digest)


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
    request = make_request(KEYS, drained=MAX_CLAIMS - 1)
    reply = handler()(request)

    assert isinstance(reply, SettlementReply)
    for message in (request, reply):
        frame = encode_frame(message)
        assert frame_size(frame[:4]) == len(frame) - 4


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Paths of all fields of a request that are no structure."""
    if isinstance(value, tuple):
        named = [(str(index), item) for index, item in enumerate(value)]
    elif isinstance(value, msgspec.Struct):
        named = [(name, getattr(value, name)) for name in value.__struct_fields__]
    else:
        yield path
        return
    for name, item in named:
        yield from leaves(item, f"{path}.{name}" if path else name)


INTEGERS = st.one_of(st.integers(-(1 << 63), (1 << 64) - 1), st.integers(-2, 1_000_001), st.sampled_from([0x82, 0x83]))
"""All that msgpack has, and those near the edges."""


@st.composite
def damaged_requests(draw: st.DrawFn) -> SettlementRequest:
    """A valid request with up to four fields replaced by what the decoder would let through."""
    request = make_request(KEYS, drained=draw(st.integers(0, 2)))
    for path in draw(st.lists(st.sampled_from(sorted(leaves(request))), max_size=4)):
        if isinstance(_value(request, path), int):
            new: Any = draw(INTEGERS)
        elif path.endswith("_key"):
            new = draw(st.one_of(st.binary(min_size=33, max_size=33), st.just(CLIENT_KEY)))
        elif path.endswith("signature"):
            new = draw(st.binary(min_size=8, max_size=72))
        else:
            new = draw(st.binary(max_size=300))
        request = mutated(request, path, new)
    return request


def _value(request: Any, path: str) -> Any:
    for name in path.split("."):
        request = request[int(name)] if isinstance(request, tuple) else getattr(request, name)
    return request


@settings(max_examples=200, deadline=None)
@given(request=damaged_requests())
def test_whatever_is_asked_is_refused_or_sound(request: SettlementRequest) -> None:
    """No request makes the handler fail, and what it signs is valid and pays all but the fee to its owners."""
    reply = handler()(request)

    if isinstance(reply, Refusal):
        return
    assert isinstance(reply, SettlementReply)
    transaction = CTransaction.deserialize(reply.settlement.transaction)
    for index, claim in enumerate(request.claims):
        raw = reply.settlement.transaction
        assert interpreter_accepts(claim.terms.funding_script, raw, index, claim.funding_sat)
    paid = {bytes(out.scriptPubKey): out.nValue for out in transaction.vout}
    change_sat = request.claims[0].payment.change_sat
    assert paid.pop(request.claims[0].change_script, 0) == change_sat
    total_sat = sum(claim.funding_sat for claim in request.claims) - change_sat - request.fee_sat
    assert paid == ({KEYS.destination_script(CLIENT_KEY, EXPIRY): total_sat} if total_sat else {})
