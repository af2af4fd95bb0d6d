"""A ledger of an earlier release: its requests are the same requests, its claims the same claims."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plyvel
import pytest

from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.wire.signer_messages import (
    AgainReply,
    AgainRequest,
    ChildReply,
    NewestRequest,
    Refusal,
    SettlementReply,
    SettlementRequest,
    ShownReply,
    ShownRequest,
)
from signer.judge.facts import Limits
from signer.judge.queries import Identity
from signer.keys.ring import KeyRing, hardened_keys
from signer.ledger.entries import VERSION, decode_entry, encode_entry
from signer.ledger.leveldb import LevelDbLedger
from tests.lib.vectors import DIRECTORY
from tests.signer.messages import (
    EXPIRY,
    Answers,
    destination,
    make_child_request,
    make_claim,
    make_reserve_request,
    mutated,
    server_key,
)

KEYS = KeyRing([hardened_keys(bytes(32))])
FROZEN = json.loads((DIRECTORY / "ledger" / "v3.json").read_text())
"""Written by the release with wire version 5: it signed `JOINT` and `ALONE`, and was shown `NEWEST`."""

JOINT = make_reserve_request(KEYS)
ALONE = SettlementRequest(
    9, (make_claim(server_key(KEYS), change_sat=350_000, number=6),), destination(KEYS), Sat(4_000)
)
NEWEST = make_claim(server_key(KEYS), change_sat=300_000, number=5)
LIMITS = Limits(max_fee_percent=100, max_fee_sat=10**9, max_fee_sat_per_vb=10_000)


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[Answers]:
    """A signer of this release with the ledger and the audit log of the earlier one."""
    database = plyvel.DB(str(tmp_path / "ledger"), create_if_missing=True)
    for key, value in FROZEN["entries"].items():
        database.put(bytes.fromhex(key), bytes.fromhex(value))
    database.close()
    (tmp_path / "audit.log").write_text(FROZEN["audit"])
    (tmp_path / "audit.log").chmod(0o600)
    ledger = LevelDbLedger(tmp_path / "ledger", tmp_path / "audit.log")
    handler = Answers(KEYS, ledger, Identity("regtest", "hardened"), LIMITS)
    yield handler
    handler.close()
    ledger.close()


@pytest.mark.parametrize(("request_", "number"), [(JOINT, 0), (ALONE, 1)], ids=["joint", "alone"])
def test_a_request_that_was_signed_is_signed_again(handler: Answers, request_: SettlementRequest, number: int) -> None:
    """The same request has the same digest, so it is no replacement; the settlement has the same bytes."""
    reply = handler(request_)

    assert isinstance(reply, SettlementReply), reply
    assert reply.settlement.transaction.hex() == FROZEN["settlements"][number]


def test_another_request_is_a_replacement(handler: Answers) -> None:
    """A request that differs needs a higher rate, as before the update."""
    lower, higher = (handler(mutated(ALONE, "fee_sat", fee)) for fee in (3_999, 4_001))

    assert isinstance(lower, Refusal)
    assert lower.tag == "policy-replacement"
    assert isinstance(higher, SettlementReply)


def test_a_child_of_an_earlier_settlement_is_signed(handler: Answers) -> None:
    """The signer knows the parent by its digest."""
    assert isinstance(handler(make_child_request(JOINT)), ChildReply)


@pytest.mark.parametrize("claim", [JOINT.claims[0], ALONE.claims[0]], ids=["joint", "alone"])
def test_claim_request_and_settlement_are_returned(handler: Answers, claim: Claim) -> None:
    """A server whose store lacks a settlement gets it, with the request and the claim of the earlier release."""
    reply = handler(AgainRequest(1, claim.outpoint))

    assert isinstance(reply, AgainReply), reply
    assert reply.claim == claim
    assert reply.request in (mutated(JOINT, "id", reply.request.id), mutated(ALONE, "id", reply.request.id))  # type: ignore[union-attr]
    assert reply.settlement is not None
    assert reply.settlement.transaction.hex() in FROZEN["settlements"]


def test_a_payment_that_was_shown_stays_the_watermark(handler: Answers) -> None:
    """An earlier payment of that channel is refused, and the channel is listed as shown."""
    older = make_claim(server_key(KEYS), change_sat=300_001, number=5)
    refused = handler(SettlementRequest(1, (older,), destination(KEYS), Sat(1_000)))

    assert isinstance(refused, Refusal)
    assert refused.tag == "policy-watermark"
    assert handler(NewestRequest(2, (older,))).refused == (0,)  # type: ignore[union-attr]
    assert _shown(handler) == (NEWEST.outpoint,)


def _shown(handler: Answers) -> tuple[OutPoint, ...]:
    reply = handler(ShownRequest(3, EXPIRY - 1))  # type: ignore[arg-type]
    assert isinstance(reply, ShownReply)
    return reply.outpoints


@pytest.mark.parametrize(
    ("prefix", "kind", "values"), [("77", Claim, [NEWEST]), ("71", SettlementRequest, [JOINT, ALONE])]
)
def test_entries_are_written_back_in_the_new_version(prefix: str, kind: Any, values: list[Any]) -> None:
    """Claims and requests of the earlier version decode to those of today, and are encoded with a kind."""
    raws = [bytes.fromhex(value) for key, value in FROZEN["entries"].items() if key.startswith(prefix)]
    raws = [raw for raw in raws if raw[1] in (0x95, 0x96)]
    read = [decode_entry(raw, kind) for raw in raws]

    assert len(read) == len(values)
    assert all(raw[0] == VERSION - 1 for raw in raws)
    assert {_without_id(each) for each in read} == {_without_id(each) for each in values}
    for each in read:
        assert encode_entry(each)[0] == VERSION
        assert decode_entry(encode_entry(each), kind) == each


def _without_id(value: Any) -> Any:
    return mutated(value, "id", 0) if isinstance(value, SettlementRequest) else value
