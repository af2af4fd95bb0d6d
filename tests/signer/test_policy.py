"""Each policy by mutation: one field of a valid request changed gives that policy's refusal and nothing else.

What was signed before comes in with `test_replacement`, children with `test_child`.
"""

from __future__ import annotations

from typing import Any

import pytest
from coincurve import PublicKey

from paychan.protocol.address import key_script, p2sh_script
from paychan.protocol.signerwire import (
    MAX_CLAIMS,
    Refusal,
    SettlementReply,
    SettlementRequest,
    encode_frame,
    frame_size,
)
from paychan.protocol.types import MAX_MONEY_SAT
from signer.handlers import Handler
from signer.keys import hardened_keys
from signer.policy import MAX_COINS, POLICIES
from tests.lib.ledger import MemoryLedger
from tests.signer.messages import (
    CHANGE_SCRIPT,
    CLIENT_KEY,
    EXPIRY,
    make_claim,
    make_coin,
    make_request,
    make_reserve_request,
    mutated,
    with_high_s,
    with_padded_s,
)

KEYS = hardened_keys(bytes(32))
SERVER_KEY = KEYS.public_key(CLIENT_KEY, EXPIRY)
OTHER_KEY = PublicKey.from_secret(b"\x07" * 32).format()
REQUEST = make_request(KEYS)
WITH_RESERVE = make_reserve_request(KEYS)
WITH_CHANGE, DRAINED = REQUEST.claims
SIGNATURE = WITH_CHANGE.payment.signature

TEMPLATE = [
    ("claims", (), "0 claims"),
    ("claims", tuple(make_claim(SERVER_KEY, change_sat=0, number=n) for n in range(MAX_CLAIMS + 1)), "201 claims"),
    ("claims", (DRAINED, WITH_CHANGE), "only claim 0"),
    ("claims", (WITH_CHANGE, DRAINED, DRAINED), "claimed twice"),
    ("claims.0.terms.server_key", OTHER_KEY, "ours for this channel is"),
    ("claims.0.terms.server_key", CLIENT_KEY, "ours for this channel is"),
    ("claims.1.terms.server_key", OTHER_KEY, "claim 1"),
    ("claims.0.terms.client_key", OTHER_KEY, "ours for this channel is"),
    ("claims.0.terms.client_key", b"\x02" + b"\xff" * 32, "not a point"),
    ("claims.0.terms.client_key", b"\x04" + CLIENT_KEY[1:], "compressed"),
    ("claims.0.terms.expiry", EXPIRY + 1, "ours for this channel is"),
    ("claims.0.terms.expiry", 499_999_999, "not a time"),
    ("claims.0.terms.expiry", 1 << 32, "not a time"),
    ("claims.0.terms.expiry", 0, "not a time"),
    ("claims.0.terms.expiry", -1, "not a time"),
    ("claims.0.outpoint.txid", b"", "0 bytes of txid"),
    ("claims.0.outpoint.txid", bytes(31), "31 bytes of txid"),
    ("claims.0.outpoint.txid", bytes(33), "33 bytes of txid"),
    ("claims.0.outpoint.vout", -1, "index -1"),
    ("claims.0.outpoint.vout", 1 << 32, "index 4294967296"),
    ("claims.0.funding_sat", 0, "funding of 0 sat"),
    ("claims.0.funding_sat", -1, "funding of -1 sat"),
    ("claims.0.funding_sat", MAX_MONEY_SAT + 1, "funding of 2100000000000001 sat"),
    ("claims.0.funding_sat", MAX_MONEY_SAT, "more than all bitcoins"),
    ("claims.0.funding_sat", 399_999, "change of 400000 sat out of 399999 sat"),
    ("claims.0.payment.change_sat", 1_000_001, "change of 1000001 sat out of 1000000 sat"),
    ("claims.0.payment.change_sat", -1, "change of -1 sat"),
    ("claims.1.payment.change_sat", 1, "only claim 0"),
    ("claims.0.change_script", b"", "0 bytes"),
    ("claims.0.change_script", b"\x6a" + CHANGE_SCRIPT[1:], "25 bytes"),
    ("claims.0.change_script", b"\x6a" + p2sh_script(b"")[1:], "23 bytes"),
    ("claims.0.change_script", b"\x00\x14" + bytes(20), "22 bytes"),
    ("claims.0.change_script", CHANGE_SCRIPT + b"\xac", "26 bytes"),
    ("claims.0.change_script", bytes(10_000), "10000 bytes"),
]
DESTINATION = [
    ("destination_script", b"", "not ours"),
    ("destination_script", bytes(60_000), "60000 bytes"),
    ("destination_script", key_script(OTHER_KEY), "not ours"),
    ("destination_script", key_script(SERVER_KEY), "not ours"),
    ("destination_script", CHANGE_SCRIPT, "not ours"),
    ("destination_script", REQUEST.destination_script + b"\x00", "not ours"),
    ("destination_script", KEYS.destination_script(OTHER_KEY, EXPIRY), "not ours"),
]
RESERVE_DESTINATION = [
    ("reserve.public_key", OTHER_KEY, "reserve key is"),
    ("reserve.public_key", SERVER_KEY, "reserve key is"),
    ("reserve.public_key", KEYS.destination_key(CLIENT_KEY, EXPIRY), "reserve key is"),
    ("destination_script", REQUEST.destination_script, "not ours"),
    ("destination_script", key_script(OTHER_KEY), "not ours"),
    ("destination_script", b"", "not ours"),
    ("reserve", None, "not ours"),
]
CLIENT_SIGNATURE = [
    ("claims.0.outpoint.txid", bytes(32), "does not verify"),
    ("claims.0.outpoint.vout", 1, "does not verify"),
    ("claims.1.outpoint.vout", 2, "claim 1"),
    ("claims.0.change_script", key_script(OTHER_KEY), "does not verify"),
    ("claims.0.change_script", p2sh_script(b""), "does not verify"),
    ("claims.0.payment.change_sat", 399_999, "does not verify"),
    ("claims.0.payment.change_sat", 400_001, "does not verify"),
    ("claims.0.payment.change_sat", 0, "does not fit a change value of 0 sat"),
    ("claims.0.payment.flag", 0x82, "does not fit a change value of 400000 sat"),
    ("claims.1.payment.flag", 0x83, "does not fit a change value of 0 sat"),
    *[("claims.0.payment.flag", flag, "got 0x") for flag in (*range(0x82), *range(0x84, 0x101), 0x183)],
    ("claims.0.payment.flag", -1, "need 0x83"),
    ("claims.0.payment.signature", with_high_s(SIGNATURE), "upper half"),
    ("claims.0.payment.signature", with_padded_s(SIGNATURE), "padded integer"),
    ("claims.0.payment.signature", SIGNATURE[:-1] + bytes([SIGNATURE[-1] ^ 1]), "does not verify"),
    ("claims.0.payment.signature", SIGNATURE[:-1], "strict DER"),
    ("claims.0.payment.signature", SIGNATURE + b"\x00", "strict DER"),
    ("claims.0.payment.signature", bytes(8), "strict DER"),
    ("claims.0.payment.signature", bytes.fromhex("3006020100020100"), "does not verify"),
    ("claims.0.payment.signature", bytes.fromhex("302e022a") + b"\x01" * 42 + b"\x02\x01\x01", "strict DER"),
    ("claims.0.payment", DRAINED.payment, "does not verify"),
    ("claims.1.payment.signature", SIGNATURE, "claim 1"),
]
FEE = [
    ("fee_sat", -1, "-1 sat, want 0 to the 1600000 sat"),
    ("fee_sat", 1_600_001, "want 0 to the 1600000 sat"),
    ("fee_sat", (1 << 63) - 1, "want 0 to the 1600000 sat"),
]
RESERVE_FEE = [
    ("fee_sat", -1, "-1 sat, want 0 to the 1600000 sat"),
    ("fee_sat", 1_600_001, "want 0 to the 1600000 sat received"),
    ("reserve.coins", tuple(map(make_coin, range(MAX_COINS + 1))), "5 coins, want up to 4"),
    ("reserve.coins", (make_coin(), make_coin()), "spent twice"),
    ("reserve.coins.1.outpoint", WITH_CHANGE.outpoint, "spent twice"),
    ("reserve.coins.0.outpoint.txid", b"", "coin 0: no outpoint: 0 bytes"),
    ("reserve.coins.1.outpoint.txid", bytes(33), "coin 1: no outpoint: 33 bytes"),
    ("reserve.coins.0.outpoint.vout", -1, "index -1"),
    ("reserve.coins.0.outpoint.vout", 1 << 32, "index 4294967296"),
    ("reserve.coins.0.value_sat", 0, "value of 0 sat"),
    ("reserve.coins.1.value_sat", -1, "coin 1: value of -1 sat"),
    ("reserve.coins.0.value_sat", MAX_MONEY_SAT + 1, "value of 2100000000000001 sat"),
    ("reserve.coins.0.value_sat", MAX_MONEY_SAT, "more than all bitcoins"),
]


def expect_refusal(request: Any, tag: str, reason: str, valid: SettlementRequest = REQUEST) -> None:
    """The request gets this refusal, briefly, and the valid one gets the same settlement before and after."""
    ledger = MemoryLedger()
    handler = Handler(KEYS, ledger, "regtest", "hardened", debug=False)
    assert isinstance(handler(request), Refusal)
    assert not ledger.entries
    before = handler(valid)
    assert isinstance(before, SettlementReply)
    remembered = dict(ledger.entries)

    reply = handler(request)

    assert isinstance(reply, Refusal)
    assert (reply.id, reply.tag, reply.need_sat) == (valid.id, tag, 0)
    assert reason in reply.reason
    assert frame_size(encode_frame(reply)[:4]) < 500
    assert ledger.entries == remembered
    assert handler(valid) == before


@pytest.mark.parametrize(("path", "new", "reason"), TEMPLATE)
def test_policy_template(path: str, new: Any, reason: str) -> None:
    """Only own keys, values that exist, standard change scripts, and a layout that can be signed."""
    expect_refusal(mutated(REQUEST, path, new), "policy-template", reason)


@pytest.mark.parametrize(("path", "new", "reason"), DESTINATION)
def test_policy_destination(path: str, new: Any, reason: str) -> None:
    """The server's output goes to nobody but the destination that belongs to one of the claims."""
    expect_refusal(mutated(REQUEST, path, new), "policy-destination", reason)


@pytest.mark.parametrize(("path", "new", "reason"), RESERVE_DESTINATION)
def test_policy_destination_of_the_reserve(path: str, new: Any, reason: str) -> None:
    """With coins of the reserve, the server's output goes back to the reserve, whose key is the signer's own."""
    expect_refusal(mutated(WITH_RESERVE, path, new), "policy-destination", reason, WITH_RESERVE)


@pytest.mark.parametrize(("path", "new", "reason"), CLIENT_SIGNATURE)
def test_policy_client_signature(path: str, new: Any, reason: str) -> None:
    """The client's signature must be over exactly this outpoint, change value and script, with the flag that fits."""
    expect_refusal(mutated(REQUEST, path, new), "policy-client-signature", reason)


@pytest.mark.parametrize(("path", "new", "reason"), FEE)
def test_policy_fee(path: str, new: Any, reason: str) -> None:
    """The fee is not negative, and not more than what was received."""
    expect_refusal(mutated(REQUEST, path, new), "policy-fee", reason)


@pytest.mark.parametrize(("path", "new", "reason"), RESERVE_FEE)
def test_policy_fee_with_a_reserve(path: str, new: Any, reason: str) -> None:
    """The reserve's coins are distinct outputs that can exist, and of their value nothing becomes fee in the end."""
    expect_refusal(mutated(WITH_RESERVE, path, new), "policy-fee", reason, WITH_RESERVE)


def test_policy_fee_leaves_an_output() -> None:
    """All of a drained channel as fee would be a transaction without outputs; with change it is one with change."""
    expect_refusal(mutated(mutated(REQUEST, "claims", (DRAINED,)), "fee_sat", 1_000_000), "policy-fee", "no output")

    without_coins = mutated(mutated(WITH_RESERVE, "claims", (DRAINED,)), "reserve.coins", ())
    expect_refusal(mutated(without_coins, "fee_sat", 1_000_000), "policy-fee", "no output", WITH_RESERVE)

    for request in (REQUEST, WITH_RESERVE, mutated(WITH_RESERVE, "claims", (WITH_CHANGE,))):
        handler = Handler(KEYS, MemoryLedger(), "regtest", "hardened", debug=False)
        received = sum(claim.received_sat for claim in request.claims)
        assert isinstance(handler(mutated(request, "fee_sat", received)), SettlementReply)


def test_every_policy_has_its_test() -> None:
    """The table of policies and the tests of this module name the same tags."""
    tests = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_policy_")}

    assert {tag for tag, _ in POLICIES} <= tests
