"""policy-replacement: a settlement is signed again, or replaced by one with a higher fee rate."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from coincurve import PublicKey
from hypothesis import given
from hypothesis import strategies as st

from paychan.protocol.address import key_script
from paychan.protocol.expiry import Expiry
from paychan.protocol.kinds.base import ChannelTerms
from paychan.protocol.payment import Payment, sign_payment
from paychan.protocol.settlement import Claim, Coin, Reserve
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import Refusal, SettlementReply, SettlementRequest
from signer.judge.facts import Facts, Limits, OwnKeys
from signer.judge.policies import Objection, replacement
from signer.keys.ring import KeyRing, hardened_keys
from signer.ledger.base import Entry
from signer.ledger.entries import Entries, Flow, Output, Signed, entries_of, request_digest, request_size
from tests.lib.ledger import MemoryLedger, Written
from tests.lib.looped import looped
from tests.signer.messages import (
    CHANGE_SCRIPT,
    CLIENT,
    make_claim,
    make_coin,
    make_handler,
    make_request,
    make_reserve_request,
    mutated,
    server_key,
)

KEYS = KeyRing([hardened_keys(bytes(32))])
SERVER_KEY = server_key(KEYS)
REQUEST = make_request(KEYS)
DEARER = mutated(REQUEST, "fee_sat", 5_001)
OTHER_SCRIPT = key_script(PublicKey.from_secret(b"\x07" * 32).format())
SIZE = request_size(REQUEST)
SHOWN = [
    make_request(KEYS, drained=2),
    mutated(make_reserve_request(KEYS), "reserve.coins", (make_coin(KEYS, 0), make_coin(KEYS, 1), make_coin(KEYS, 7))),
]


class Signer:
    """A handler and its ledger."""

    def __init__(self, *requests: SettlementRequest) -> None:
        self.ledger = MemoryLedger()
        limits = Limits(max_fee_percent=100, max_fee_sat=10**9, max_fee_sat_per_vb=10_000)
        self.handler = make_handler(KEYS, *SHOWN, ledger=self.ledger, limits=limits)
        for request in requests:
            self.signs(request)

    def signs(self, request: SettlementRequest) -> SettlementReply:
        reply = self.handler(request)
        assert isinstance(reply, SettlementReply), reply
        return reply

    def refuses(self, request: SettlementRequest) -> Refusal:
        """Check that policy-replacement refuses the request, and that no entry changes."""
        before = self.ledger.remembered
        reply = self.handler(request)
        assert isinstance(reply, Refusal)
        assert (reply.id, reply.tag) == (request.id, "policy-replacement"), reply.reason
        assert self.ledger.remembered == before
        return reply


def claim_to(script: bytes, change_sat: int = 400_000) -> Claim:
    """Claim 0 of the request with another change script, which the client has signed as well."""
    claim = REQUEST.claims[0]
    payment = sign_payment(CLIENT, claim.terms, claim.outpoint, claim.funding_sat, script, Sat(change_sat))
    return mutated(mutated(claim, "change_script", script), "payment", payment)


def test_the_same_request_is_signed_again() -> None:
    """A repeated request, under any id, gets the same bytes, and only the log gets a new line."""
    signer = Signer()
    first = signer.signs(REQUEST)
    remembered = signer.ledger.remembered

    assert signer.signs(mutated(REQUEST, "id", 99)).settlement == first.settlement
    assert signer.ledger.remembered == remembered
    assert signer.ledger.entries == entries_of(REQUEST)
    assert [decision.verdict for decision in signer.ledger.decisions[-2:]] == ["signed", "signed"]


def test_a_dearer_settlement_is_signed_and_remembered() -> None:
    """A fee higher by one satoshi is a higher rate; then the earlier request is refused like any cheaper one."""
    signer = Signer(REQUEST, DEARER)

    assert signer.ledger.entries == entries_of(DEARER)
    assert signer.refuses(REQUEST).need_sat == 5_002
    assert signer.signs(DEARER)


@looped(
    ("path", "new", "reason", "need"),
    [
        ("fee_sat", 4_999, "no higher rate", 5_001),
        ("fee_sat", 0, "no higher rate", 5_001),
        ("claims", (*REQUEST.claims, make_claim(SERVER_KEY, change_sat=0, number=2)), "no higher rate", None),
    ],
)
def test_policy_replacement(path: str, new: Any, reason: str, need: int | None) -> None:
    """A second settlement pays a higher rate."""
    changed = mutated(DEARER, path, new)
    signer = Signer(REQUEST)

    refusal = signer.refuses(changed)

    assert reason in refusal.reason
    least = 5_000 * request_size(changed) // SIZE + 1
    assert refusal.need_sat == (least if need is None else need)
    if need is None:  # otherwise it is the signed request
        signer.refuses(mutated(changed, "fee_sat", refusal.need_sat - 1))
    signer.signs(mutated(changed, "fee_sat", refusal.need_sat))


@looped("claim", [claim_to(OTHER_SCRIPT), claim_to(OTHER_SCRIPT, 399_999)])
def test_fault_04_another_script_that_the_client_signed_for_is_no_harm(claim: Claim) -> None:
    """The same or less change at another script is signed, at a higher rate; more change is not, at any script."""
    signer = Signer(REQUEST)
    need = signer.refuses(mutated(mutated(REQUEST, "fee_sat", 4_900), "claims.0", claim)).need_sat
    elsewhere = mutated(mutated(REQUEST, "claims.0", claim), "fee_sat", need)
    signer.signs(elsewhere)
    assert signer.ledger.entries == entries_of(elsewhere)
    more = signer.handler(mutated(mutated(elsewhere, "claims.0", claim_to(OTHER_SCRIPT, 400_001)), "fee_sat", 9_000))
    assert isinstance(more, Refusal)
    assert more.tag == "policy-watermark"


@looped("change_sat", [0, 399_999])
def test_less_change_may_follow(change_sat: int) -> None:
    """A newer payment, which leaves the client less, may be settled at a higher rate."""
    newer = mutated(DEARER, "claims.0", make_claim(SERVER_KEY, change_sat=change_sat))

    assert Signer(REQUEST).signs(mutated(newer, "fee_sat", 6_000))


def test_coins_of_the_reserve_count_by_their_size() -> None:
    """A settlement with coins of the reserve also pays for their inputs."""
    with_reserve = make_reserve_request(KEYS)
    signer = Signer(REQUEST)
    need = signer.refuses(mutated(with_reserve, "fee_sat", 5_001)).need_sat

    assert need == 5_000 * request_size(with_reserve) // SIZE + 1 > 7_000
    signer.refuses(mutated(with_reserve, "fee_sat", need - 1))
    signer.signs(mutated(with_reserve, "fee_sat", need))


@looped("old", [REQUEST, mutated(make_reserve_request(KEYS, coins=1), "fee_sat", 5_000)])
def test_fault_05_a_settlement_without_all_inputs_need_not_pay_the_rate_of_all(old: SettlementRequest) -> None:
    """Without all inputs of an earlier settlement, which may be dead, its share by value or by size is enough."""
    signer = Signer(old)
    claims = REQUEST.claims[:1] if old is REQUEST else REQUEST.claims
    left = mutated(mutated(REQUEST, "claims", claims), "fee_sat", 0)
    need = signer.refuses(left).need_sat
    brought = sum(claim.received_sat for claim in claims)
    by_value = 5_000 * brought // (1_600_000 if old is REQUEST else 1_620_000)
    assert need == min(by_value, 5_000 * request_size(left) // request_size(old))
    signer.refuses(mutated(left, "fee_sat", need - 1))
    signer.signs(mutated(left, "fee_sat", need))


def test_fault_05_a_small_member_of_a_dead_batch_is_settled_alone() -> None:
    """2,000 sat received beside 1,000,000: for any fee of the batch within its share, the small one can be settled alone."""
    small, large = make_claim(SERVER_KEY, change_sat=998_000), make_claim(SERVER_KEY, change_sat=0, number=1)
    together = mutated(mutated(REQUEST, "claims", (small, large)), "fee_sat", 100_000)
    signer = Signer(together)
    alone = mutated(mutated(REQUEST, "claims", (small,)), "fee_sat", 1_000)
    assert 100_000 * request_size(alone) // request_size(together) > small.received_sat
    signer.signs(alone)
    assert signer.refuses(mutated(alone, "fee_sat", 999)).need_sat == 1_001


def test_fault_05_a_large_member_of_a_dead_batch_is_settled_alone_within_the_cap() -> None:
    """Most of the value, beside 20 small claims: its share of the fee by value would be above the rate's cap."""
    large = make_claim(SERVER_KEY, change_sat=0)
    small = [make_claim(SERVER_KEY, change_sat=0, number=number) for number in range(1, 21)]
    small = [mutated(claim, "funding_sat", 20_000) for claim in small]
    together = mutated(mutated(REQUEST, "claims", (large, *small)), "fee_sat", 0)
    rate = 30
    together = mutated(together, "fee_sat", rate * request_size(together))
    alone = mutated(REQUEST, "claims", (large,))
    ledger = MemoryLedger()
    for claim in together.claims:
        ledger.put(Entry(outputs={claim.outpoint: Output(claim.funding_sat, claim.terms.funding_script)}))
    handler = make_handler(KEYS, ledger=ledger, limits=Limits())
    assert isinstance(handler(together), SettlementReply)

    refused = handler(mutated(alone, "fee_sat", rate * request_size(alone) - 1))
    assert isinstance(refused, Refusal)
    assert refused.need_sat == rate * request_size(alone)
    assert isinstance(handler(mutated(alone, "fee_sat", refused.need_sat)), SettlementReply)


def test_channels_of_a_batch_have_separate_entries() -> None:
    """One of a batch may be settled alone; then the whole batch must outbid that settlement and its own earlier one."""
    alone = mutated(mutated(REQUEST, "claims", REQUEST.claims[1:]), "fee_sat", 4_000)
    signer = Signer(REQUEST, alone)
    need = signer.refuses(REQUEST).need_sat

    assert need == 4_000 * SIZE // request_size(alone) + 1
    batch = mutated(REQUEST, "fee_sat", need)
    signer.signs(batch)
    assert signer.ledger.entries == entries_of(batch)


def test_need_is_zero_if_no_fee_would_pass() -> None:
    """If no fee up to the value received is a higher rate, the least fee is 0."""
    small = mutated(REQUEST, "claims", (make_claim(SERVER_KEY, change_sat=999_000),))
    signer = Signer(mutated(small, "fee_sat", 1_000))

    refusal = signer.refuses(mutated(small, "fee_sat", 990))

    assert refusal.need_sat == 0
    assert "need more than the channels received" in refusal.reason


def test_need_may_be_all_that_was_received() -> None:
    """If a fee that leaves an output is too low, one without that output may pass, because it is smaller."""
    small = mutated(REQUEST, "claims", (make_claim(SERVER_KEY, change_sat=999_000),))
    size = request_size(mutated(small, "fee_sat", 999))
    earlier = {small.claims[0].outpoint: Signed(bytes(32), Sat(999), size - 5, Sat(999_000), CHANGE_SCRIPT)}

    def judged(fee_sat: int) -> Objection | None:
        request = mutated(small, "fee_sat", fee_sat)
        return replacement(Facts(request, OwnKeys((), ()), Limits(), {}, earlier, Flow(), UnixTime(0), UnixTime(0)))

    objection = judged(999)

    assert objection is not None
    assert objection.need_sat == 1_000
    assert judged(1_000) is None


@given(
    fee=st.integers(0, 10**12), size=st.integers(1, 100_000), new_size=st.integers(1, 100_000), more=st.integers(0, 9)
)
def test_least_fee_is_exact(fee: int, size: int, new_size: int, more: int) -> None:
    """The least fee above a rate is above it, as an exact fraction, and a satoshi less is not."""
    signed = Signed(bytes(32), Sat(fee), size, Sat(0), b"")
    least = signed.least_fee_above(new_size)

    assert signed.pays_less_than(least + more, new_size)
    assert not signed.pays_less_than(least - 1 - more, new_size)


class SlowLedger(MemoryLedger):
    """Waits between reading and writing, and keeps the order of writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Sat] = []

    def read(self, outpoints: Collection[OutPoint]) -> Entries:
        found = super().read(outpoints)
        time.sleep(0.02)
        return found

    def put(self, entry: Entry) -> Written:
        self.written += {signed.fee_sat for signed in entry.signed.values()}
        return super().put(entry)


def test_concurrent_requests_are_judged_in_turn() -> None:
    """Concurrent requests for one outpoint are each judged with the result of the one before."""
    ledger = SlowLedger()
    handler = make_handler(KEYS, REQUEST, ledger=ledger)
    rivals = [mutated(REQUEST, "fee_sat", 5_000 - number) for number in range(8)]

    with ThreadPoolExecutor(len(rivals)) as threads:
        replies = list(threads.map(handler, rivals))

    signed = [reply.settlement.fee_sat for reply in replies if isinstance(reply, SettlementReply)]
    assert ledger.written == sorted(signed)
    assert all(isinstance(reply, SettlementReply | Refusal) for reply in replies)


def test_digest_never_changes() -> None:
    """A request has the same digest in every release: a signer that was updated still knows its signatures."""
    payment = Payment(Sat(1), bytes(8), 0x83)
    claim = Claim(
        ChannelTerms("p2sh", bytes(33), bytes(33), Expiry(7)), OutPoint(bytes(32), 1), Sat(2), b"\x03", payment
    )
    reserve = Reserve(bytes(33), (Coin(OutPoint(bytes(32), 8), Sat(9)),))
    request = SettlementRequest(4, (claim,), b"\x05", Sat(6), reserve)

    assert digest_hex(request) == FROZEN_DIGEST
    assert digest_hex(mutated(request, "id", 5)) == FROZEN_DIGEST
    for path, new in [("fee_sat", 7), ("reserve", None), ("claims.0.terms.expiry.lock_time", 1), ("claims", ())]:
        assert digest_hex(mutated(request, path, new)) != FROZEN_DIGEST


def digest_hex(request: SettlementRequest) -> str:
    return request_digest(request).hex()


FROZEN_DIGEST = "001feb11f3a77020df4edc3322d5a8412e606e3f58df79fbd9c0664f7214ac3c"


@looped("shown", [False, True], ids=["no payment known", "payment shown"])
def test_fault_08_a_settlement_with_dependent_payments_is_not_replaced(shown: bool) -> None:
    """A withdrawal whose change output funds a channel with payments is signed again, but for no other fee."""
    terms = REQUEST.claims[0].terms
    drained = REQUEST.claims[0]
    payment = sign_payment(CLIENT, terms, drained.outpoint, drained.funding_sat, terms.funding_script, Sat(400_000))
    claim = mutated(mutated(drained, "change_script", terms.funding_script), "payment", payment)
    withdrawal = mutated(mutated(REQUEST, "claims", (claim,)), "fee_sat", 5_000)
    signer = Signer(withdrawal)
    if shown:
        moved = OutPoint(signer.signs(withdrawal).settlement.txid, 0)
        newest = mutated(make_claim(SERVER_KEY, change_sat=200_000, at=moved), "funding_sat", 400_000)
        signer.ledger.payments[moved] = newest
        assert "use a child to pay more" in signer.refuses(mutated(withdrawal, "fee_sat", 9_000)).reason
        assert signer.signs(withdrawal)
    else:
        assert signer.signs(mutated(withdrawal, "fee_sat", 9_000))
