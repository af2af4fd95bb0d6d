"""Attacks of a hostile server that fail: settling old payments, burning channels as fee, using up the hour's value."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from paychan.protocol.fees import CHILD_BYTES, most_sat
from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    ChildReply,
    FundingReply,
    FundingRequest,
    HealthReply,
    NewestReply,
    NewestRequest,
    Refusal,
    SettlementReply,
    SettlementRequest,
    ShownReply,
    ShownRequest,
)
from paychan.signer_client.limits import contradictions
from signer.judge import behind
from signer.judge.facts import Limits
from signer.judge.queries import Identity
from signer.keys.ring import KeyRing, hardened_keys
from signer.ledger.base import Entry
from signer.ledger.entries import Output, decode_entry, encode_entry, entries_of, request_size
from signer.ledger.leveldb import LevelDbLedger
from tests.lib.channels import RULES
from tests.lib.ledger import MemoryLedger, put
from tests.lib.looped import looped
from tests.signer.messages import (
    EXPIRY,
    Answers,
    destination,
    funding_transaction,
    make_child_request,
    make_claim,
    make_fundings,
    make_handler,
    make_request,
    mutated,
    server_key,
)

KEYS = KeyRing([hardened_keys(bytes(32))])
SERVER_KEY = server_key(KEYS)
REQUEST = make_request(KEYS, drained=0)
HOUR = 3_600


def paid(change_sat: int, number: int = 0) -> Claim:
    return make_claim(SERVER_KEY, change_sat=change_sat, number=number)


def settle(claim: Claim, fee_sat: int = 5_000) -> SettlementRequest:
    return SettlementRequest(7, (claim,), destination(KEYS), Sat(fee_sat))


def newest(*claims: Claim) -> NewestRequest:
    return NewestRequest(9, claims)


def tag(reply: Any) -> str:
    return reply.tag if isinstance(reply, Refusal) else ""


# --- old payments ----------------------------------------------------------------------------------------------------


def test_fault_73_the_opening_payment_is_not_settled_once_a_newer_one_was_shown(tmp_path: Path) -> None:
    """For an unsigned channel the signer knows the newest payment, also after a restart, and signs only that or less."""
    for _ in range(2):
        with closing(LevelDbLedger(tmp_path / "ledger", tmp_path / "audit")) as ledger:
            handler = make_handler(KEYS, REQUEST, ledger=ledger)
            assert handler(newest(paid(400_000))) == NewestReply(9)
            for change_sat in (990_000, 400_001):
                reply = handler(settle(paid(change_sat)))
                assert tag(reply) == "policy-watermark"
                assert isinstance(reply, Refusal)
                assert "400000 sat of the newest payment that was shown" in reply.reason

    with closing(LevelDbLedger(tmp_path / "ledger", tmp_path / "audit")) as ledger:
        handler = Answers(KEYS, ledger, Identity("regtest", "hardened"))
        assert isinstance(handler(settle(paid(400_000))), SettlementReply)
        assert isinstance(handler(settle(paid(399_000), 6_000)), SettlementReply)


def test_fault_73_a_shown_payment_is_never_lowered() -> None:
    """An older payment than was shown or signed for is reported as refused, and changes no entry."""
    ledger = MemoryLedger()
    handler = make_handler(KEYS, REQUEST, ledger=ledger)
    assert handler(newest(paid(500_000))) == NewestReply(9)
    assert handler(newest(paid(500_001))) == NewestReply(9, refused=(0,))
    assert handler(newest(paid(500_000))) == NewestReply(9)
    assert handler(newest(paid(300_000), paid(200_000), paid(250_000))) == NewestReply(9, refused=(2,))
    assert isinstance(handler(settle(paid(100_000))), SettlementReply)
    remembered = ledger.remembered

    assert handler(newest(paid(100_001), paid(200_000))) == NewestReply(9, refused=(0, 1))
    assert ledger.remembered == remembered


def test_fault_32_the_shown_channels_are_listed_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shown channel that expires later is named once, and a signed settlement, whose key begins with the same byte, is left out."""
    monkeypatch.setattr(behind, "_PAGE", 2)
    claims = {number: paid(400_000, number) for number in range(5)}
    of_the_same_byte = OutPoint(b"w" + bytes(31), 7)
    with closing(LevelDbLedger(tmp_path / "ledger", tmp_path / "audit")) as ledger:
        signed = entries_of(settle(paid(400_000)))
        put(ledger, Entry(newest={claim.outpoint: claim for claim in claims.values()}))
        put(ledger, Entry(signed={of_the_same_byte: next(iter(signed.values()))}))
        handler = Answers(KEYS, ledger, Identity("regtest", "hardened"))

        def listed(expires_after: int) -> list[OutPoint]:
            found, after = list[OutPoint](), None
            while True:
                reply = handler(ShownRequest(1, UnixTime(expires_after), after))
                assert isinstance(reply, ShownReply)
                assert len(reply.outpoints) <= 2
                found += reply.outpoints
                after = reply.after
                if after is None:
                    return found

        assert sorted(listed(EXPIRY - 1), key=str) == sorted((claim.outpoint for claim in claims.values()), key=str)
        assert listed(EXPIRY) == []


WRONG = [
    ("payment.signature", bytes(70)),
    ("payment.change_sat", 300_000),
    ("payment.flag", 0x82),
    ("funding_sat", 2_000_000),
    ("change_script", b"\x51"),
    ("terms.expiry.lock_time", EXPIRY + 1),
    ("terms.expiry.lock_time", -1),
    ("terms.server_key", b"\x02" * 33),
    ("terms.client_key", b"\x05" * 33),
]


@looped(("path", "wrong"), WRONG)
def test_fault_73_the_watermark_needs_the_clients_signature(path: str, wrong: Any) -> None:
    """A payment is checked as in a settlement; a wrong one in a batch stops no other.

    Otherwise a hostile server could invent a payment with less change, and no true one would be settled any more.
    """
    ledger = MemoryLedger()
    handler = make_handler(KEYS, make_request(KEYS, drained=2), ledger=ledger)
    batch = (paid(400_000), mutated(paid(600_000, 1), path, wrong), paid(0, 2))

    assert handler(newest(*batch)) == NewestReply(9, refused=(1,))
    assert list(ledger.payments.values()) == [batch[0], batch[2]]
    assert isinstance(handler(settle(paid(990_000, 1))), SettlementReply)


def test_fault_73_payments_of_unshown_channels_are_reported() -> None:
    """Without the funding transaction the payment can't be checked and is not recorded."""
    ledger = MemoryLedger()
    handler = make_handler(KEYS, ledger=ledger)
    unknown = mutated(paid(400_000), "outpoint.txid", b"short")

    assert handler(newest(paid(400_000), unknown)) == NewestReply(9, unshown=(0, 1))
    assert ledger.payments == {}
    assert handler(newest()) == NewestReply(9)


def test_fault_73_showing_has_a_budget_of_its_own() -> None:
    """Settlements are signed during any number of shown payments and key requests."""
    handler = make_handler(KEYS, REQUEST, clock=lambda: 1_000.0, limits=Limits(keys_per_second=1))
    replies = [handler(newest(paid(400_000))) for _ in range(300)]

    assert [tag(reply) for reply in replies].count("policy-rate") == 100
    assert isinstance(handler(settle(paid(400_000))), SettlementReply)


# --- fees ------------------------------------------------------------------------------------------------------------


def test_fault_73_a_fee_has_a_cap_of_its_rate() -> None:
    """For twenty channels, a fee of half the value is refused; at the cap each is signed, and its child at the same rate."""
    requests = [settle(paid(0, number)) for number in range(20)]
    handler = make_handler(KEYS, *requests, limits=Limits(max_fee_percent=50))

    for request in requests:
        most = 200 * request_size(request)
        for fee_sat in (500_000, most + 1):
            reply = handler(mutated(request, "fee_sat", fee_sat))
            assert tag(reply) == "policy-fee"
            assert isinstance(reply, Refusal)
            assert f"want up to {most} sat" in reply.reason
        parent = mutated(request, "fee_sat", most)
        assert isinstance(handler(parent), SettlementReply)
        assert tag(handler(make_child_request(parent, 200 * CHILD_BYTES + 1))) == "policy-fee"
        assert isinstance(handler(make_child_request(parent, 200 * CHILD_BYTES)), ChildReply)


def test_fault_73_the_most_that_a_server_pays_is_signed() -> None:
    """With equal caps no settlement is refused that the server may request, for any number of channels."""
    rules = msgspec.structs.replace(RULES, max_fee_sat_per_vb=200, fee_share_percent=50)
    for drained in (0, 1, 19):
        request = make_request(KEYS, drained=drained)
        most = most_sat(request.claims, request_size(request), rules, request.destination_script)
        handler = make_handler(KEYS, request, limits=Limits())
        assert isinstance(handler(mutated(request, "fee_sat", most)), SettlementReply)


@looped(
    ("rate", "share", "names"),
    [(200, 50, []), (201, 50, ["max_fee_sat_per_vb"]), (200, 51, ["max_fee_percent"]), (9_000, 60, None)],
)
def test_fault_73_limits_that_contradict_each_other_are_named(rate: int, share: int, names: list[str] | None) -> None:
    """A server that may pay what its signer refuses reports that with both numbers, before fees are high."""
    health = HealthReply(1, "regtest", "hardened", False, "", UnixTime(0), 50, Sat(5_000_000), 200)
    rules = msgspec.structs.replace(RULES, max_fee_sat_per_vb=rate, fee_share_percent=share)

    said = contradictions(health, rules)

    assert len(said) == (2 if names is None else len(names))
    assert all(f"policy.{name} is" in text for name, text in zip(names or (), said, strict=False))


# --- the hour's value ------------------------------------------------------------------------------------------------


def test_fault_73_invented_channels_do_not_use_up_the_hour() -> None:
    """Channels that are settled right after they were shown share half of the limit; the others have all of it."""
    now = [float(EXPIRY - 1_000_000)]
    limits = Limits(value_per_hour_sat=5_000_000, aged_seconds=6 * HOUR)
    honest = [settle(paid(0, number)) for number in range(5)]
    handler = make_handler(KEYS, *honest, limits=limits, clock=lambda: now[0])
    now[0] += 6 * HOUR
    invented = [settle(paid(0, number)) for number in range(10, 15)]
    for funding in make_fundings(*invented):
        assert isinstance(handler(funding), FundingReply)

    assert [tag(handler(request)) for request in invented] == ["", "", *["policy-rate"] * 3]
    assert [tag(handler(request)) for request in honest] == [""] * 5
    assert tag(handler(settle(paid(999_999, 12), 1))) == ""

    now[0] += 6 * HOUR
    assert [tag(handler(request)) for request in invented] == [""] * 5


def test_fault_73_a_funding_that_is_shown_again_gets_no_younger() -> None:
    """Otherwise a hostile server could show all honest channels again."""
    now = [float(EXPIRY - 1_000_000)]
    request = settle(paid(0))
    handler = make_handler(
        KEYS, request, limits=Limits(value_per_hour_sat=1_000_000, aged_seconds=HOUR), clock=lambda: now[0]
    )
    assert tag(handler(request)) == "policy-rate"  # half of a million is its share
    now[0] += HOUR
    raw = funding_transaction(request.claims[0].terms.funding_script, 1_000_000, 0).serialize()
    assert isinstance(handler(FundingRequest(1, raw, (0,))), FundingReply)

    assert tag(handler(request)) == ""


@looped(
    ("aged_seconds", "set_back_seconds", "said"),
    [
        (HOUR, 1, "policy-rate"),
        (HOUR, HOUR, "policy-rate"),
        (HOUR, HOUR + 1, ""),
        (HOUR, 1_000_000, ""),
        (0, 1, ""),
    ],
)
def test_fault_73_a_clock_that_is_set_back_makes_no_funding_aged_or_young_for_ever(
    aged_seconds: int, set_back_seconds: int, said: str
) -> None:
    """A clock set back by up to an hour ages no funding; one shown by a clock further ahead is aged at once."""
    now = [float(EXPIRY - 1_000_000)]
    request = settle(paid(0))  # it is worth the whole limit; young channels share half of that
    limits = Limits(value_per_hour_sat=1_000_000, aged_seconds=aged_seconds)
    handler = make_handler(KEYS, request, limits=limits, clock=lambda: now[0])
    now[0] -= set_back_seconds

    assert tag(handler(request)) == said
    now[0] += set_back_seconds + aged_seconds
    assert tag(handler(request)) == ""


def test_fault_73_fundings_of_an_older_release_are_aged() -> None:
    """An older ledger has no times of showing: for the limits, that is long ago."""

    class Old(msgspec.Struct, frozen=True, array_like=True):
        value_sat: int
        script: bytes

    assert decode_entry(encode_entry(Old(7, b"s")), Output) == Output(Sat(7), b"s", UnixTime(0))
