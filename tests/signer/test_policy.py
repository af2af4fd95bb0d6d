"""Each policy by mutation: one changed field of a valid request gives that policy's refusal and no other.

Children are tested in `test_child`, peers and deadlines in `test_service`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from coincurve import PublicKey

from paychan.protocol.address import key_script, p2sh_script, witness_script
from paychan.protocol.types import MAX_MONEY_SAT, Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    MAX_CLAIMS,
    KeyReply,
    KeyRequest,
    Refusal,
    SettlementReply,
    SettlementRequest,
    encode_frame,
    frame_size,
)
from signer.judge.facts import TRIABLE, Limits
from signer.judge.policies import OTHER_POLICIES, POLICIES
from signer.judge.validation import MAX_COINS
from signer.keys.ring import KeyRing, hardened_keys
from signer.ledger.entries import Output, request_size
from tests.lib.ledger import MemoryLedger
from tests.lib.looped import looped
from tests.signer.messages import (
    CHANGE_SCRIPT,
    CLIENT_KEY,
    EXPIRY,
    make_claim,
    make_coin,
    make_fundings,
    make_handler,
    make_request,
    make_reserve_request,
    mutated,
    server_key,
    with_high_s,
    with_padded_s,
)

KEYS = KeyRing([hardened_keys(bytes(32))])
SERVER_KEY = server_key(KEYS)
OTHER_KEY = PublicKey.from_secret(b"\x07" * 32).format()
DESTINATION_KEY = next(KEYS.destinations(CLIENT_KEY, EXPIRY)).key.public_key  # type: ignore[union-attr]
REQUEST = make_request(KEYS)
WITH_RESERVE = make_reserve_request(KEYS)
MOST_SAT = 200 * request_size(REQUEST)
"""By the default of policy.max_fee_sat_per_vb."""
WITH_CHANGE, DRAINED = REQUEST.claims
SIGNATURE = WITH_CHANGE.payment.signature

TEMPLATE = [
    ("claims", (), "0 claims"),
    ("claims", tuple(make_claim(SERVER_KEY, change_sat=0, number=n) for n in range(MAX_CLAIMS + 1)), "201 claims"),
    ("claims", (DRAINED, WITH_CHANGE), "must come first"),
    ("claims", (WITH_CHANGE, DRAINED, DRAINED), "claimed twice"),
    ("claims.0.terms.server_key", OTHER_KEY, "no key of this signer for this channel"),
    ("claims.0.terms.server_key", CLIENT_KEY, "no key of this signer for this channel"),
    ("claims.1.terms.server_key", OTHER_KEY, "claim 1"),
    ("claims.0.terms.client_key", OTHER_KEY, "no key of this signer for this channel"),
    ("claims.0.terms.client_key", b"\x02" + b"\xff" * 32, "not a point"),
    ("claims.0.terms.client_key", b"\x04" + CLIENT_KEY[1:], "compressed"),
    ("claims.0.terms.expiry.lock_time", EXPIRY + 1, "no key of this signer for this channel"),
    ("claims.0.terms.expiry.lock_time", 499_999_999, "not a time"),
    ("claims.0.terms.expiry.lock_time", 1 << 32, "not a time"),
    ("claims.0.terms.expiry.lock_time", 0, "not a time"),
    ("claims.0.terms.expiry.lock_time", -1, "not a time"),
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
    ("claims.1.payment.change_sat", 1, "at a place where its payment is not valid"),
    ("claims.0.change_script", b"", "0 bytes"),
    ("claims.0.change_script", b"\x6a" + CHANGE_SCRIPT[1:], "25 bytes"),
    ("claims.0.change_script", b"\x6a" + p2sh_script(b"")[1:], "23 bytes"),
    ("claims.0.change_script", witness_script(0, bytes(20))[:-1], "21 bytes"),
    ("claims.0.change_script", witness_script(0, bytes(31)), "33 bytes"),
    ("claims.0.change_script", witness_script(1, bytes(2)), "4 bytes"),
    ("claims.0.change_script", witness_script(1, bytes(20)), "22 bytes"),
    ("claims.0.change_script", witness_script(2, bytes(32)), "34 bytes is not P2PKH, P2SH, P2WPKH, P2WSH or P2TR"),
    ("claims.0.change_script", b"\x4f" + bytes([32]) + bytes(32), "34 bytes"),
    ("claims.0.change_script", CHANGE_SCRIPT + b"\xac", "26 bytes"),
    ("claims.0.change_script", bytes(10_000), "10000 bytes"),
]
DESTINATION = [
    ("destination_script", b"", "not allowed"),
    ("destination_script", bytes(60_000), "60000 bytes"),
    ("destination_script", key_script(OTHER_KEY), "not allowed"),
    ("destination_script", key_script(SERVER_KEY), "not allowed"),
    ("destination_script", CHANGE_SCRIPT, "not allowed"),
    ("destination_script", REQUEST.destination_script + b"\x00", "not allowed"),
    ("destination_script", next(KEYS.destinations(OTHER_KEY, EXPIRY)).script, "not allowed"),
    ("destination_script", key_script(KEYS.reserve().public_key), "not allowed"),
]
RESERVE_DESTINATION = [
    ("reserve.public_key", OTHER_KEY, "is no key of this signer"),
    ("reserve.public_key", SERVER_KEY, "is no key of this signer"),
    ("reserve.public_key", DESTINATION_KEY, "is no key of this signer"),
    ("destination_script", REQUEST.destination_script, "not allowed"),
    ("destination_script", key_script(OTHER_KEY), "not allowed"),
    ("destination_script", b"", "not allowed"),
    ("reserve", None, "not allowed"),
]
CLIENT_SIGNATURE = [
    ("claims.0.outpoint.txid", bytes(32), "does not verify"),
    ("claims.0.outpoint.vout", 1, "does not verify"),
    ("claims.1.outpoint.vout", 2, "claim 1"),
    ("claims.0.change_script", key_script(OTHER_KEY), "does not verify"),
    ("claims.0.change_script", p2sh_script(b""), "does not verify"),
    ("claims.0.change_script", witness_script(0, bytes(20)), "does not verify"),
    ("claims.0.change_script", witness_script(0, bytes(32)), "does not verify"),
    ("claims.0.change_script", witness_script(1, bytes(32)), "does not verify"),
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
LAYOUT = [
    ("fee_sat", -1, "-1 sat, want 0 to the 1600000 sat"),
    ("fee_sat", 1_600_001, "want 0 to the 1600000 sat"),
    ("fee_sat", (1 << 63) - 1, "want 0 to the 1600000 sat"),
]
COINS = [
    *LAYOUT,
    ("reserve.coins", tuple(make_coin(KEYS, number) for number in range(MAX_COINS + 1)), "5 coins, want up to 4"),
    ("reserve.coins", (make_coin(KEYS), make_coin(KEYS)), "spent twice"),
    ("reserve.coins.0.outpoint.txid", b"", "coin 0: not an outpoint: 0 bytes"),
    ("reserve.coins.1.outpoint.txid", bytes(33), "coin 1: not an outpoint: 33 bytes"),
    ("reserve.coins.0.outpoint.vout", -1, "index -1"),
    ("reserve.coins.0.outpoint.vout", 1 << 32, "index 4294967296"),
    ("reserve.coins.0.value_sat", 0, "value of 0 sat"),
    ("reserve.coins.1.value_sat", -1, "coin 1: value of -1 sat"),
    ("reserve.coins.0.value_sat", MAX_MONEY_SAT + 1, "value of 2100000000000001 sat"),
    ("reserve.coins.0.value_sat", MAX_MONEY_SAT, "more than all bitcoins"),
    ("reserve.coins.1.outpoint", WITH_CHANGE.outpoint, f"{WITH_CHANGE.outpoint} pays to a914"),
]
FEE = [
    ("fee_sat", MOST_SAT + 1, f"want up to {MOST_SAT} sat"),
    ("fee_sat", 1_600_000, "fee of 1600000 sat, want up to "),
    ("claims.0.funding_sat", 999_999, "is claimed to hold 999999 sat, and holds 1000000 sat"),
    ("claims.0.funding_sat", 1_000_001, "is claimed to hold 1000001 sat, and holds 1000000 sat"),
    ("claims.1.funding_sat", 500_000, "is claimed to hold 500000 sat, and holds 1000000 sat"),
]
RESERVE_FEE = [
    ("fee_sat", 200 * request_size(WITH_RESERVE) + 1, f"want up to {200 * request_size(WITH_RESERVE)} sat"),
    ("reserve.coins.0.value_sat", 19_999, "is claimed to hold 19999 sat, and holds 20000 sat"),
    ("reserve.coins.1.value_sat", 1, "is claimed to hold 1 sat, and holds 20000 sat"),
]


def expect_refusal(request: Any, tag: str, reason: str, valid: SettlementRequest = REQUEST, **given: Any) -> None:
    """The request gets this short refusal, and the valid request gets the same settlement before and after."""
    ledger = MemoryLedger()
    handler = make_handler(KEYS, REQUEST, WITH_RESERVE, ledger=ledger, **given)
    untouched = ledger.remembered
    assert isinstance(handler(request), Refusal)
    assert ledger.remembered == untouched
    before = handler(valid)
    assert isinstance(before, SettlementReply)
    remembered = ledger.remembered

    reply = handler(request)

    assert isinstance(reply, Refusal)
    assert (reply.id, reply.tag) == (valid.id, tag)
    assert reply.need_sat == 0 or f"fee of {request.fee_sat} sat, want up to {reply.need_sat} sat" == reply.reason
    assert reason in reply.reason
    assert frame_size(encode_frame(reply)[:4]) < 500
    assert ledger.remembered == remembered
    assert [decision.verdict for decision in ledger.decisions[-2:]] == ["signed", "refused"]
    assert (ledger.decisions[-1].tag, ledger.decisions[-1].reason) == (tag, reply.reason)
    assert handler(valid) == before


@looped(("path", "new", "reason"), TEMPLATE)
def test_policy_template(path: str, new: Any, reason: str) -> None:
    """Only own keys, possible values, standard change scripts, and a layout that can be signed."""
    expect_refusal(mutated(REQUEST, path, new), "policy-template", reason)


@looped(("path", "new", "reason"), DESTINATION)
def test_policy_destination(path: str, new: Any, reason: str) -> None:
    """The server's output pays only to a destination of one of the claims."""
    expect_refusal(mutated(REQUEST, path, new), "policy-destination", reason)


@looped(("path", "new", "reason"), RESERVE_DESTINATION)
def test_policy_destination_of_the_reserve(path: str, new: Any, reason: str) -> None:
    """With coins of the reserve, the server's output pays back to the reserve, whose key is the signer's own."""
    expect_refusal(mutated(WITH_RESERVE, path, new), "policy-destination", reason, WITH_RESERVE)


@looped(("path", "new", "reason"), CLIENT_SIGNATURE)
def test_policy_client_signature(path: str, new: Any, reason: str) -> None:
    """The client's signature covers exactly this outpoint, change value and script, with the right flag."""
    expect_refusal(mutated(REQUEST, path, new), "policy-client-signature", reason)


@looped(("path", "new", "reason"), LAYOUT)
def test_policy_template_of_the_fee(path: str, new: Any, reason: str) -> None:
    """No transaction has a fee that is negative, or more than was received."""
    expect_refusal(mutated(REQUEST, path, new), "policy-template", reason)


@looped(("path", "new", "reason"), COINS)
def test_policy_template_of_the_reserve(path: str, new: Any, reason: str) -> None:
    """The reserve's coins are distinct, possible outputs, and none of their value becomes fee."""
    expect_refusal(mutated(WITH_RESERVE, path, new), "policy-template", reason, WITH_RESERVE)


def test_policy_template_leaves_an_output() -> None:
    """A fee of all value of a drained channel would leave no output; with change there is one."""
    expect_refusal(
        mutated(mutated(REQUEST, "claims", (DRAINED,)), "fee_sat", 1_000_000), "policy-template", "no output"
    )

    without_coins = mutated(mutated(WITH_RESERVE, "claims", (DRAINED,)), "reserve.coins", ())
    expect_refusal(mutated(without_coins, "fee_sat", 1_000_000), "policy-template", "no output", WITH_RESERVE)

    for request in (REQUEST, WITH_RESERVE, mutated(WITH_RESERVE, "claims", (WITH_CHANGE,))):
        handler = make_handler(KEYS, request, limits=Limits(max_fee_percent=100, max_fee_sat_per_vb=10_000))
        received = sum(claim.received_sat for claim in request.claims)
        assert isinstance(handler(mutated(request, "fee_sat", received)), SettlementReply)


def test_policy_template_of_the_funding_script() -> None:
    """An output that was shown with another script is not the channel's, even if the claim says so."""
    ledger = MemoryLedger()
    handler = make_handler(KEYS, REQUEST, ledger=ledger)
    for script in (p2sh_script(b"\x51"), key_script(SERVER_KEY)):
        ledger.shown_outputs[DRAINED.outpoint] = Output(Sat(1_000_000), script)

        reply = handler(REQUEST)

        assert isinstance(reply, Refusal)
        assert (reply.tag, reply.reason[:8]) == ("policy-template", "claim 1:")
        assert f"pays to {script.hex()}, not to {DRAINED.terms.funding_script.hex()}" in reply.reason


def test_protocol_funding() -> None:
    """Each claim and coin is spent only after it was shown."""
    fundings = make_fundings(WITH_RESERVE)
    for missing in range(len(fundings)):
        handler = make_handler(KEYS)
        for funding in fundings[:missing] + fundings[missing + 1 :]:
            handler(funding)

        reply = handler(WITH_RESERVE)

        assert isinstance(reply, Refusal)
        assert reply.tag == "protocol-funding"
        assert "was not shown" in reply.reason
        handler(fundings[missing])
        assert isinstance(handler(WITH_RESERVE), SettlementReply)


@looped(("path", "new", "reason"), FEE)
def test_policy_fee(path: str, new: Any, reason: str) -> None:
    """The fee is within share and cap, and no value may be understated, which would burn the difference."""
    expect_refusal(mutated(REQUEST, path, new), "policy-fee", reason)


@looped(("path", "new", "reason"), RESERVE_FEE)
def test_policy_fee_with_a_reserve(path: str, new: Any, reason: str) -> None:
    """The same holds for coins of the reserve: their values are those that were shown."""
    expect_refusal(mutated(WITH_RESERVE, path, new), "policy-fee", reason, WITH_RESERVE)


@looped(
    ("limits", "most_sat"),
    [
        (Limits(max_fee_percent=10, max_fee_sat_per_vb=1_000), 160_000),
        (Limits(max_fee_sat=7_000), 7_000),
        (Limits(max_fee_percent=100, max_fee_sat=10**9, max_fee_sat_per_vb=10_000), 1_600_000),
    ],
)
def test_policy_fee_has_a_share_and_a_cap(limits: Limits, most_sat: int) -> None:
    """The lower of share and cap is the limit: a fee up to it is signed, a satoshi more is not."""
    handler = make_handler(KEYS, REQUEST, limits=limits)

    assert isinstance(handler(mutated(REQUEST, "fee_sat", most_sat)), SettlementReply)
    refused = handler(mutated(REQUEST, "fee_sat", most_sat + 1))
    assert isinstance(refused, Refusal)
    named = ("policy-fee", most_sat) if most_sat < 1_600_000 else ("policy-template", 0)
    assert (refused.tag, refused.need_sat) == named


def test_policy_fee_always_allows_a_relayed_fee() -> None:
    """A small channel may pay a satoshi per byte, plus an output's dust, although that is most of its value."""
    small = mutated(REQUEST, "claims", (make_claim(SERVER_KEY, change_sat=999_000),))

    assert isinstance(make_handler(KEYS, small)(mutated(small, "fee_sat", 1_000)), SettlementReply)


@looped("change_sat", [400_001, 999_999])
def test_policy_watermark(change_sat: int) -> None:
    """An older payment of the client, which leaves it more, is no longer signed, at any fee."""
    older = mutated(REQUEST, "claims.0", make_claim(SERVER_KEY, change_sat=change_sat))
    ledger = MemoryLedger()
    handler = make_handler(KEYS, REQUEST, ledger=ledger)
    assert isinstance(handler(REQUEST), SettlementReply)
    remembered = ledger.remembered

    for fee_sat in (5_000, 5_001, 100_000):
        reply = handler(mutated(older, "fee_sat", fee_sat))
        assert isinstance(reply, Refusal)
        assert (reply.tag, reply.need_sat) == ("policy-watermark", 0)
        assert f"change of {change_sat} sat, more than the 400000 sat signed before" in reply.reason
    assert ledger.remembered == remembered


RATE = [
    (Limits(value_per_hour_sat=1_600_000), 3_599, "after 1600000 sat in the last hour, want up to 1600000 sat"),
    (Limits(value_per_day_sat=1_600_000), 86_399, "after 1600000 sat in the last day, want up to 1600000 sat"),
]


@looped(("limits", "seconds", "reason"), RATE)
def test_policy_rate(limits: Limits, seconds: int, reason: str) -> None:
    """Beyond a sum per hour or day nothing new is signed until that time is over; a repetition is."""
    now = [EXPIRY - 1_000_000]
    other = mutated(REQUEST, "claims", (make_claim(SERVER_KEY, change_sat=999_999, number=5),))
    other = mutated(other, "fee_sat", 1)
    handler = make_handler(KEYS, REQUEST, other, limits=limits, clock=lambda: now[0])
    assert isinstance(handler(REQUEST), SettlementReply)
    now[0] += seconds

    refused = handler(other)

    assert isinstance(refused, Refusal)
    assert refused.tag == "policy-rate"
    assert "1 sat " + reason in refused.reason
    assert isinstance(handler(REQUEST), SettlementReply)
    assert isinstance(handler(mutated(REQUEST, "fee_sat", 5_001)), SettlementReply)
    now[0] += 601
    assert isinstance(handler(other), SettlementReply)


@looped("ahead", [2 * 3_600, 365 * 86_400])
@looped("limits", [limits for limits, _, _ in RATE])
def test_fault_16_sums_of_a_clock_that_was_ahead_do_not_count(limits: Limits, ahead: int) -> None:
    """Sums of a clock that was hours or a year ahead use no limit once it is right; of one set back by minutes they do."""
    now = [EXPIRY - 1_000_000]
    other = mutated(REQUEST, "claims", (make_claim(SERVER_KEY, change_sat=999_999, number=5),))
    other = mutated(other, "fee_sat", 1)
    handler = make_handler(KEYS, REQUEST, other, limits=limits, clock=lambda: now[0])
    assert isinstance(handler(REQUEST), SettlementReply)

    now[0] -= 3_000
    assert isinstance(handler(other), Refusal)
    now[0] -= ahead
    assert isinstance(handler(other), SettlementReply)


def test_policy_rate_of_one_settlement() -> None:
    """A single settlement of more than the hour's sum is not signed either."""
    reply = make_handler(KEYS, REQUEST, limits=Limits(value_per_hour_sat=1_599_999))(REQUEST)

    assert isinstance(reply, Refusal)
    assert (reply.tag, reply.reason[:36]) == ("policy-rate", "1600000 sat after 0 sat in the last ")


def test_policy_rate_of_requests() -> None:
    """Keys have a rate limit, over ten seconds; requests above it are counted in the log."""
    now = [1_000.0]
    ledger = MemoryLedger()
    handler = make_handler(KEYS, ledger=ledger, limits=Limits(keys_per_second=2), clock=lambda: now[0])
    asked = KeyRequest(1, CLIENT_KEY, EXPIRY)

    replies = [handler(asked) for _ in range(50)]
    now[0] += 1
    replies += [handler(asked) for _ in range(10)]

    assert [isinstance(reply, KeyReply) for reply in replies] == [True] * 20 + [False] * 30 + [True] * 2 + [False] * 8
    assert all(isinstance(reply, KeyReply) or reply.tag == "policy-rate" for reply in replies)  # type: ignore[union-attr]
    assert not ledger.decisions
    handler.close()
    counts = {(each.verdict, each.tag): each.about["count"] for each in ledger.decisions}
    assert counts == {("given", ""): 22, ("refused", "policy-rate"): 38}


def test_policy_rate_of_outputs_shown() -> None:
    """Only a limited number of funding outputs is recorded; one that was shown before uses none of it."""
    ledger = MemoryLedger()
    handler = make_handler(KEYS, REQUEST, ledger=ledger, limits=Limits(max_fundings=3))
    first, second, *_ = make_fundings(make_request(KEYS, drained=3))[2:]
    assert not isinstance(handler(first), Refusal)

    refused = handler(second)

    assert isinstance(refused, Refusal)
    assert (refused.tag, refused.reason) == ("policy-rate", "3 outputs were shown, want up to 3")
    assert not isinstance(handler(first), Refusal)
    assert ledger.shown == 3


def test_fault_16_a_heartbeat_of_a_clock_that_was_ahead_does_not_count() -> None:
    """Otherwise one heartbeat, sent while the clock was a year ahead, would last for a year."""
    now = EXPIRY - 1_000_000
    limits = Limits(heartbeat_seconds=7_200, value_without_heartbeat_sat=2_000)
    handler = make_handler(
        KEYS, REQUEST, limits=limits, clock=lambda: now, heartbeat=lambda: UnixTime(now + 365 * 86_400)
    )

    refused = handler(REQUEST)

    assert isinstance(refused, Refusal)
    assert refused.tag == "policy-heartbeat"


def test_policy_heartbeat() -> None:
    """Without a fresh heartbeat only a small sum is signed; a fresh one removes the limit and resets the sum."""
    now, beat = [EXPIRY - 1_000_000], [EXPIRY - 1_000_000]
    small = [mutated(REQUEST, "claims", (make_claim(SERVER_KEY, change_sat=999_000, number=n),)) for n in range(4, 9)]
    small = [mutated(request, "fee_sat", 300) for request in small]
    handler = make_handler(
        KEYS,
        REQUEST,
        *small,
        limits=Limits(heartbeat_seconds=7_200, value_without_heartbeat_sat=2_000),
        clock=lambda: now[0],
        heartbeat=lambda: UnixTime(beat[0]),
    )
    assert isinstance(handler(small[0]), SettlementReply)
    now[0] += 7_201
    assert isinstance(handler(small[1]), SettlementReply)
    assert isinstance(handler(small[2]), SettlementReply)

    refused = handler(small[3])

    assert isinstance(refused, Refusal)
    assert refused.tag == "policy-heartbeat"
    assert "1000 sat after 2000 sat without a heartbeat for 2 h, want up to 2000 sat" in refused.reason
    assert isinstance(handler(small[2]), SettlementReply)
    beat[0] = now[0]
    assert isinstance(handler(small[3]), SettlementReply)
    assert isinstance(handler(REQUEST), SettlementReply)
    now[0] += 7_201
    assert isinstance(handler(small[4]), SettlementReply)


TRIALS = [
    ("policy-destination", "destination_script", key_script(OTHER_KEY), Limits()),
    ("policy-fee", "fee_sat", 800_001, Limits()),
    ("policy-rate", "fee_sat", 5_002, Limits(value_per_hour_sat=1)),
    ("policy-heartbeat", "fee_sat", 5_002, Limits(heartbeat_seconds=1, value_without_heartbeat_sat=1)),
]


@looped(("tag", "path", "new", "limits"), TRIALS)
def test_policies_on_trial_sign_and_log(tag: str, path: str, new: Any, limits: Limits) -> None:
    """A policy on trial refuses nothing and logs what it would refuse; all others still refuse."""
    ledger = MemoryLedger()
    limits = mutated(limits, "trial", frozenset((tag,)))
    handler = make_handler(KEYS, REQUEST, ledger=ledger, limits=limits)

    assert isinstance(handler(mutated(REQUEST, path, new)), SettlementReply)

    tried, signed = ledger.decisions[-2:]
    assert (tried.verdict, tried.tag, signed.verdict) == ("would-refuse", tag, "signed")
    refused = handler(mutated(REQUEST, "claims.0.payment.flag", 1))
    assert isinstance(refused, Refusal)
    assert refused.tag == "policy-client-signature"


@looped("tag", ["policy-watermark", "policy-replacement"])
def test_a_trial_does_not_lower_the_recorded_limits(tag: str) -> None:
    """A signature on trial lowers neither the watermark nor the rate: after the trial the limits are the same."""
    ledger = MemoryLedger()
    older = mutated(REQUEST, "claims.0", make_claim(SERVER_KEY, change_sat=500_000))
    trial = make_handler(KEYS, REQUEST, ledger=ledger, limits=Limits(trial=frozenset((tag,))))
    assert isinstance(trial(REQUEST), SettlementReply)
    remembered = ledger.remembered[:3]
    other = mutated(older, "fee_sat", 9_000) if tag == "policy-watermark" else mutated(REQUEST, "fee_sat", 4_000)

    assert isinstance(trial(other), SettlementReply)

    assert ledger.remembered[:3] == remembered
    refused = make_handler(KEYS, ledger=ledger)(other)
    assert isinstance(refused, Refusal)
    assert refused.tag == tag


def test_every_policy_has_its_code_documentation_and_test() -> None:
    """Code, the table in signer/README.md and tests name the same tags, each once."""
    tags = [tag for tag, _ in POLICIES]
    folder = Path(__file__).parent
    page = (folder.parents[1] / "signer" / "README.md").read_text()
    sources = "".join(path.read_text() for path in (folder.parents[1] / "signer").rglob("*.py"))
    tests = "".join(path.read_text() for path in folder.glob("test_*.py"))

    assert len(set(tags)) == len(tags)
    for tag, rule in POLICIES:
        assert rule.__doc__ is not None
        assert rule.__doc__.startswith(tag + ":")
    every = {tag for tag in tags if tag.startswith("policy-")} | {tag for tag, _ in OTHER_POLICIES}
    assert set(re.findall(r"^\| `(policy-[a-z-]+)` \|", page, re.MULTILINE)) == every
    assert set(re.findall(r"\bpolicy-[a-z]+(?:-[a-z]+)*", sources)) == every
    for tag in every:
        assert f"def test_{tag.replace('-', '_')}" in tests, tag
    assert every >= TRIABLE


@looped(("seconds", "most_sat"), [(6 * 3600 + 1, 100_000), (6 * 3600, 120_000), (-3600, 120_000)])
def test_fault_09_near_expiry_the_rate_alone_bounds_the_fee(seconds: int, most_sat: int) -> None:
    """Half of 200,000 sat received, until six hours before the expiry by the signer's clock; then only 200 sat/vB."""
    request = mutated(make_request(KEYS, drained=0), "claims", (make_claim(server_key(KEYS), change_sat=800_000),))
    size = request_size(request)
    limits = Limits(max_fee_percent=50, max_fee_sat_per_vb=120_000 // size)
    most_sat = min(most_sat, size * limits.max_fee_sat_per_vb)
    now = float(EXPIRY - seconds)
    for fee_sat, signs in ((most_sat, True), (most_sat + 1, False)):
        handler = make_handler(KEYS, request, limits=limits, clock=lambda: now)
        reply = handler(mutated(request, "fee_sat", fee_sat))
        assert isinstance(reply, SettlementReply) == signs, reply
