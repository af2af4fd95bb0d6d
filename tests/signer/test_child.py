"""Children: they spend a signed settlement, pay to one of the signer's scripts, and their fee is limited."""

from __future__ import annotations

from typing import Any

from bitcoin.core import CTransaction
from coincurve import PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from paychan.protocol.address import key_script
from paychan.protocol.settlement import CHILD_BYTES, Settlement
from paychan.protocol.wire.signer_messages import ChildReply, ChildRequest, Refusal, SettlementReply, SettlementRequest
from signer.judge.facts import Limits
from signer.judge.handler import Handler
from signer.keys.ring import KeyRing, StaticKey, hardened_keys, rbpcp_v2_keys
from tests.lib.kernel import interpreter_accepts
from tests.lib.ledger import MemoryLedger
from tests.lib.looped import looped
from tests.signer.messages import (
    make_child_request,
    make_handler,
    make_request,
    make_reserve_request,
    mutated,
)
from tests.signer.requests import INTEGERS, damaged_requests

SEED = bytes(32)
KEYS = KeyRing([hardened_keys(SEED)])
PARENT = make_request(KEYS)
WITH_RESERVE = make_reserve_request(KEYS)
ELSEWHERE = key_script(PublicKey.from_secret(b"\x07" * 32).format())


def signing(keys: KeyRing, *signed: SettlementRequest) -> tuple[Handler, MemoryLedger, list[Settlement]]:
    """A signer that has signed these requests."""
    ledger = MemoryLedger()
    limits = Limits(max_fee_percent=100, max_fee_sat=10**9, max_fee_sat_per_vb=10_000)
    shown = [make_reserve_request(keys, drained=2), *signed]
    handler = make_handler(keys, *shown, ledger=ledger, limits=limits)
    replies = [handler(request) for request in signed]
    return handler, ledger, [reply.settlement for reply in replies if isinstance(reply, SettlementReply)]


def spendable_sat(parent: SettlementRequest) -> int:
    coins = parent.reserve.coins if parent.reserve else ()
    return sum(claim.received_sat for claim in parent.claims) + sum(coin.value_sat for coin in coins) - parent.fee_sat


@looped("keys", [KEYS, KeyRing([rbpcp_v2_keys(SEED)])], ids=["hardened", "rbpcp-v2"])
@looped("make", [make_request, make_reserve_request])
def test_child_spends_the_server_output_to_the_same_script(keys: KeyRing, make: Any) -> None:
    """Core's interpreter accepts the child as a spend of the settlement's output, and only the fee is taken from it."""
    parent = make(keys)
    handler, _, [settlement] = signing(keys, parent)

    reply = handler(make_child_request(parent))

    assert isinstance(reply, ChildReply)
    child, [_, output] = (
        CTransaction.deserialize(reply.child.transaction),
        CTransaction.deserialize(settlement.transaction).vout,
    )
    assert (reply.id, reply.child.fee_sat, reply.child.txid) == (8, 2_000, child.GetTxid())
    assert (bytes(child.vin[0].prevout.hash), child.vin[0].prevout.n, len(child.vin)) == (settlement.txid, 1, 1)
    assert [(out.nValue, bytes(out.scriptPubKey)) for out in child.vout] == [
        (spendable_sat(parent) - 2_000, parent.destination_script)
    ]
    assert interpreter_accepts(parent.destination_script, reply.child.transaction, 0, output.nValue)
    assert reply.child.size <= CHILD_BYTES


def test_settlement_with_coins_is_valid() -> None:
    """Core's interpreter accepts every input of a settlement with coins of the reserve, and the reserve gets the rest."""
    _, _, [settlement] = signing(KEYS, WITH_RESERVE)
    assert WITH_RESERVE.reserve is not None
    scripts = [(claim.terms.funding_script, claim.funding_sat) for claim in WITH_RESERVE.claims]
    scripts += [(key_script(KEYS.reserve().public_key), coin.value_sat) for coin in WITH_RESERVE.reserve.coins]

    assert len(CTransaction.deserialize(settlement.transaction).vin) == len(scripts) == 4
    for index, (script, value_sat) in enumerate(scripts):
        assert interpreter_accepts(script, settlement.transaction, index, value_sat)
    rest = CTransaction.deserialize(settlement.transaction).vout[1]
    assert (rest.nValue, bytes(rest.scriptPubKey)) == (1_635_000, key_script(KEYS.reserve().public_key))


def test_static_key_signs_children_of_its_reserve_alone() -> None:
    """With one key for all channels and the operator's address, only the reserve's output has a key here."""
    keys = KeyRing([StaticKey(b"\x05" * 32)], ELSEWHERE)
    handler, _, _ = signing(keys, make_request(keys))
    refused = handler(make_child_request(make_request(keys)))
    with_reserve = mutated(make_reserve_request(keys), "fee_sat", 9_000)
    assert isinstance(handler(with_reserve), SettlementReply)

    assert isinstance(refused, Refusal)
    assert refused.tag == "policy-destination"
    assert isinstance(handler(make_child_request(with_reserve)), ChildReply)


@looped(
    ("parent", "path", "new", "tag", "reason"),
    [
        (PARENT, "parent.fee_sat", 5_001, "policy-template", "no settlement that was signed before"),
        (PARENT, "parent.claims", PARENT.claims[:1], "policy-template", "no settlement that was signed before"),
        (
            PARENT,
            "parent.claims",
            make_request(KEYS, drained=2).claims,
            "policy-template",
            "no settlement that was signed before",
        ),
        (PARENT, "parent", WITH_RESERVE, "policy-template", "no settlement that was signed before"),
        (PARENT, "parent.claims", (), "policy-template", "no settlement that was signed before"),
        (PARENT, "parent.claims.0.outpoint.vout", -1, "policy-template", "no settlement that was signed before"),
        (PARENT, "parent.claims.0.payment.flag", 1, "policy-template", "no settlement that was signed before"),
        (PARENT, "parent.destination_script", ELSEWHERE, "policy-template", "no settlement that was signed before"),
        (PARENT, "parent.fee_sat", -1, "policy-template", "no settlement that was signed before"),
        (PARENT, "fee_sat", -1, "policy-fee", "want 0 to 1594454 sat of the 1595000 sat"),
        (PARENT, "fee_sat", 1_594_455, "policy-fee", "want 0 to 1594454 sat of the 1595000 sat"),
        (PARENT, "fee_sat", 1 << 62, "policy-fee", "want 0 to 1594454 sat"),
        (WITH_RESERVE, "fee_sat", 1_595_001, "policy-fee", "want 0 to 1595000 sat of the 1635000 sat"),
        (WITH_RESERVE, "parent.reserve", None, "policy-template", "no settlement that was signed before"),
        (
            WITH_RESERVE,
            "parent.reserve.coins.0.value_sat",
            20_001,
            "policy-template",
            "no settlement that was signed before",
        ),
    ],
)
def test_policies_of_children(parent: SettlementRequest, path: str, new: Any, tag: str, reason: str) -> None:
    """A child of an unsigned parent, or one with too high a fee, is refused and changes no entry."""
    handler, ledger, _ = signing(KEYS, parent)
    valid, remembered = make_child_request(parent), ledger.remembered
    before = handler(valid)

    reply = handler(mutated(valid, path, new))

    assert isinstance(reply, Refusal)
    assert (reply.id, reply.tag) == (8, tag)
    assert reply.need_sat == 0 or f"want 0 to {reply.need_sat} sat of the" in reply.reason
    assert (reply.need_sat > 0) == (tag == "policy-fee")
    assert reason in reply.reason
    assert ledger.remembered == remembered
    assert isinstance(before, ChildReply)
    assert handler(valid) == before


@looped(("parent", "fee_sat"), [(PARENT, 1_594_454), (WITH_RESERVE, 1_595_000), (PARENT, 0)])
def test_child_may_cost_up_to_its_limits(parent: SettlementRequest, fee_sat: int) -> None:
    """A child leaves at least 546 sat, and its fee and the parent's together are at most the value received."""
    handler, _, _ = signing(KEYS, parent)

    assert isinstance(handler(make_child_request(parent, fee_sat)), ChildReply)


def test_no_child_where_the_operator_has_the_key() -> None:
    """A settlement to the configured address has no child: only the operator has the key."""
    keys = KeyRing([hardened_keys(SEED)], ELSEWHERE)
    parent = make_request(keys)
    handler, _, [_] = signing(keys, parent)

    reply = handler(make_child_request(parent))

    assert isinstance(reply, Refusal)
    assert (reply.tag, reply.reason[:31]) == ("policy-destination", "the parent pays to an address w")


def test_no_child_where_nothing_was_left() -> None:
    """A settlement whose fee is all that was received has no output for a child to spend."""
    parent = mutated(mutated(PARENT, "claims", PARENT.claims[:1]), "fee_sat", 600_000)
    handler, _, [_] = signing(KEYS, parent)

    reply = handler(make_child_request(parent, 0))

    assert isinstance(reply, Refusal)
    assert reply.tag == "policy-fee"


def test_fault_02_an_earlier_settlement_has_children_too() -> None:
    """A node without replacement keeps the earlier settlement, and only one can confirm: a child may spend either."""
    first = mutated(mutated(PARENT, "claims", PARENT.claims[:1]), "fee_sat", 5_000)
    handler, _, _ = signing(KEYS, PARENT)

    assert isinstance(handler(make_child_request(PARENT)), ChildReply)
    assert isinstance(handler(first), SettlementReply)
    assert isinstance(handler(make_child_request(PARENT)), ChildReply)
    assert isinstance(handler(make_child_request(first)), ChildReply)


@settings(max_examples=150, deadline=None)
@given(parent=damaged_requests(KEYS), fee_sat=INTEGERS, known=st.booleans())
def test_any_child_request_is_refused_or_answered_correctly(
    parent: SettlementRequest, fee_sat: int, known: bool
) -> None:
    """No request for a child makes the handler fail, and no child is signed for an unsigned parent."""
    handler, _, signed = signing(KEYS, *([parent] if known else []))

    reply = handler(ChildRequest(1, parent, fee_sat))  # type: ignore[arg-type]

    if isinstance(reply, Refusal):
        return
    assert isinstance(reply, ChildReply)
    assert signed
    own_sat = spendable_sat(parent)
    assert interpreter_accepts(parent.destination_script, reply.child.transaction, 0, own_sat)
    assert [out.nValue for out in CTransaction.deserialize(reply.child.transaction).vout] == [own_sat - fee_sat]
