"""Settlements: Core's interpreter accepts them; the order of inputs and outputs; the fee (RBPCP §8)."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript

from paychan.protocol.address import key_script
from paychan.protocol.fees import RELAY_FLOOR_SAT_PER_VB, Shortfall, plan_fee
from paychan.protocol.kinds.base import SIGHASH_ALL, ChannelKind
from paychan.protocol.kinds.p2sh import P2SH
from paychan.protocol.payment import Payment
from paychan.protocol.settlement import (
    MAX_SIGNATURE_BYTES,
    Claim,
    Settlement,
    build_settlement,
    settlement_size,
    sign_settlement,
)
from paychan.protocol.types import Sat, UnixTime
from tests.lib.channels import RULES, Payer, private_key
from tests.lib.ecdsa import sign_with_nonce
from tests.lib.kernel import interpreter_accepts
from tests.lib.looped import looped
from tests.lib.sighash import whole_transaction_digest

DUST = Sat(700)
ALL_OF_IT = msgspec.structs.replace(RULES, dust_sat=DUST)
"""Rules by which all received value may become fee."""
RATE = 10
DESTINATION = key_script(private_key("destination").public_key.format())
FIVE_BYTE_EXPIRY = UnixTime(2**31)

PAYERS = {
    payer.terms.server_key: payer
    for payer in (Payer("first"), Payer("second", FIVE_BYTE_EXPIRY), Payer("third"), Payer("fourth", FIVE_BYTE_EXPIRY))
}
FIRST, SECOND, THIRD, FOURTH = PAYERS.values()


def claim(payer: Payer, change_sat: int) -> Claim:
    """The claim of a payer's channel after a payment that leaves this change."""
    return Claim(payer.terms, payer.outpoint, payer.funding_sat, payer.change_script, payer.payment(change_sat))


def settle(claims: Sequence[Claim], fee_sat: int) -> Settlement:
    """Sign a settlement with every channel's own server key."""
    return sign_settlement(
        claims,
        DESTINATION,
        Sat(fee_sat),
        lambda index, digest: PAYERS[claims[index].terms.server_key].server_key.sign(digest, hasher=None),
    )


def accepted_inputs(claims: Sequence[Claim], transaction: bytes) -> list[bool]:
    """For each input, whether Core's interpreter accepts it."""
    return [
        interpreter_accepts(c.terms.funding_script, transaction, index, c.funding_sat) for index, c in enumerate(claims)
    ]


SHAPES = {
    "with change": ([claim(FIRST, 900_000)], 1000),
    "with change, 5-byte expiry": ([claim(SECOND, 900_000)], 1000),
    "drained": ([claim(FIRST, 0)], 1000),
    "drained, 5-byte expiry": ([claim(SECOND, 0)], 1000),
    "fee takes all that was received": ([claim(FIRST, 999_500)], 500),
    "several drained": ([claim(FIRST, 0), claim(SECOND, 0), claim(THIRD, 0)], 5000),
    "change first, then drained": ([claim(SECOND, 900_000), claim(FIRST, 0), claim(FOURTH, 0)], 5000),
    "change first, its fee from the others": ([claim(FIRST, 1_000_000), claim(SECOND, 0)], 5000),
}
each_shape = pytest.mark.parametrize(("claims", "fee_sat"), SHAPES.values(), ids=SHAPES)


# --- Bitcoin Core judges --------------------------------------------------------------------------------------------


@each_shape
def test_core_takes_every_shape(claims: list[Claim], fee_sat: int) -> None:
    """Every input of every form of settlement is valid, and outputs and fee add up to the inputs."""
    signed = settle(claims, fee_sat)

    assert all(accepted_inputs(claims, signed.transaction))
    transaction = CTransaction.deserialize(signed.transaction)
    assert sum(out.nValue for out in transaction.vout) + fee_sat == sum(c.funding_sat for c in claims)
    assert transaction.GetTxid() == signed.txid
    assert signed.fee_sat == fee_sat


@each_shape
def test_core_refuses_every_changed_byte(claims: list[Claim], fee_sat: int) -> None:
    """Signatures, scripts, sequence, outputs, lock time, version: a flipped bit in any byte makes an input invalid.

    The OP_1 of each scriptSig is the exception: no signature covers it (see threat 18 below).
    """
    raw = settle(claims, fee_sat).transaction
    selectors = _selector_positions(claims, raw)
    for position in range(len(raw)):
        if position in selectors:
            continue
        changed = raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]
        assert not all(accepted_inputs(claims, changed)), f"byte {position} of {raw.hex()}"


def _selector_positions(claims: Sequence[Claim], raw: bytes) -> set[int]:
    """Offset of OP_1 in each scriptSig: just before OP_PUSHDATA1 and the redeem script."""
    return {raw.index(b"\x51\x4c" + bytes([len(s)]) + s) for s in (c.terms.redeem_script for c in claims)}


def test_threat_18_the_branch_selector_is_malleable() -> None:
    """Any true value selects the server's branch, so a miner can change the txid, but not the outputs."""
    claims, fee_sat = SHAPES["with change"]
    raw = settle(claims, fee_sat).transaction
    (position,) = _selector_positions(claims, raw)

    changed = raw[:position] + b"\x52" + raw[position + 1 :]

    assert all(accepted_inputs(claims, changed))
    assert CTransaction.deserialize(changed).vout == CTransaction.deserialize(raw).vout


def test_threat_18_the_client_can_sign_again() -> None:
    """Another signature of the client for the same payment gives another txid with the same outputs, and is valid."""
    claims, fee_sat = SHAPES["with change"]
    raw, payment = settle(claims, fee_sat).transaction, claims[0].payment
    digest = FIRST.terms.kind.payment_digest(
        FIRST.terms, FIRST.outpoint, FIRST.funding_sat, FIRST.change_script, payment.change_sat
    )
    others = (sign_with_nonce(FIRST.key, digest, nonce) for nonce in range(1, 100))
    other = next(signature for signature in others if len(signature) == len(payment.signature))

    changed = raw.replace(payment.signature, other)

    assert changed != raw
    assert all(accepted_inputs(claims, changed))


def test_threat_16_the_server_signs_all_and_nothing_else() -> None:
    """The server's signatures have SIGHASH_ALL: another output of the same value makes them invalid."""
    claims, fee_sat = SHAPES["drained"]
    raw = settle(claims, fee_sat).transaction
    redirected = raw.replace(DESTINATION, key_script(private_key("thief").public_key.format()))

    assert raw != redirected
    assert raw[raw.index(b"\x51\x4c\x50") - 1] == SIGHASH_ALL
    assert accepted_inputs(claims, redirected) == [False]


# --- threat 15: the index of a claim with change --------------------------------------------------------------------


@looped(
    "claims",
    [
        [claim(FIRST, 0), claim(SECOND, 900_000)],
        [claim(FIRST, 900_000), claim(SECOND, 900_000)],
        [claim(FIRST, 0), claim(SECOND, 0), claim(THIRD, 900_000)],
    ],
    ids=["second of two", "both of two", "third of three"],
)
def test_threat_15_change_anywhere_but_first_is_refused(claims: list[Claim]) -> None:
    """A claim with change at an index other than 0 is never built, measured, planned or signed."""
    for attempt in (
        lambda: build_settlement(claims, DESTINATION, Sat(1000)),
        lambda: settle(claims, 1000),
        lambda: settlement_size(claims, DESTINATION),
        lambda: plan_fee(claims, DESTINATION, RATE, ALL_OF_IT),
    ):
        with pytest.raises(ValueError, match=r"must come first|at a place"):
            attempt()


def test_threat_15_core_would_refuse_it_too() -> None:
    """The rule is Bitcoin's: at index 1 the client's signature fails, while all others are valid."""
    claims = [claim(FIRST, 0), claim(SECOND, 900_000)]
    inputs = [CTxIn(COutPoint(c.outpoint.txid, c.outpoint.vout)) for c in claims]
    outputs = [CTxOut(1_090_000, CScript(DESTINATION)), CTxOut(900_000, CScript(claims[1].change_script))]
    unsigned = CTransaction(inputs, outputs, nVersion=1)
    for index, (payer, c) in enumerate(zip((FIRST, SECOND), claims, strict=True)):
        digest = whole_transaction_digest(unsigned, index, c.terms.redeem_script)
        signature = payer.server_key.sign(digest, hasher=None)
        inputs[index] = CTxIn(inputs[index].prevout, CScript(P2SH.input(c, signature)[0]))

    assert accepted_inputs(claims, CTransaction(inputs, outputs, nVersion=1).serialize()) == [True, False]


# --- layouts that can't be signed -----------------------------------------------------------------------------------


@looped("fee_sat", [-1, 100_001, 10**9])
def test_a_fee_outside_what_was_received_is_refused(fee_sat: int) -> None:
    """A negative fee needs more output than input; a fee above the received value takes the client's money."""
    with pytest.raises(ValueError, match=f"fee of {fee_sat} sat does not fit claims of 100000 sat"):
        build_settlement([claim(FIRST, 900_000)], DESTINATION, Sat(fee_sat))


@looped(("fee_sat", "server"), [(0, [100_000]), (99_999, [1]), (100_000, [])])
def test_a_fee_from_nothing_to_all_is_laid_out(fee_sat: int, server: list[int]) -> None:
    """The received value less the fee is the server's output; 0 means no output."""
    transaction = build_settlement([claim(FIRST, 900_000)], DESTINATION, Sat(fee_sat))

    assert [value_sat for value_sat, _ in transaction.outputs] == [900_000, *server]


@looped(("change_sat", "flag"), [(900_000, 0x82), (0, 0x83), (900_000, 0x01), (0, 0x01)])
def test_threat_14_a_flag_that_does_not_fit_is_never_settled(change_sat: int, flag: int) -> None:
    """Change under 0x82 would become fee beyond the requested one, and 0x83 without change has no output."""
    good = claim(FIRST, change_sat)
    payment = Payment(good.payment.change_sat, good.payment.signature, flag)
    bad = Claim(good.terms, good.outpoint, good.funding_sat, good.change_script, payment)

    with pytest.raises(ValueError, match="flag does not fit"):
        build_settlement([bad], DESTINATION, Sat(1000))


def test_threat_40_a_claim_of_less_than_nothing_is_refused() -> None:
    """One channel's change above its funding must not be paid out of another's."""
    over = claim(FIRST, FIRST.funding_sat + 1)

    with pytest.raises(ValueError, match="does not fit claims"):
        build_settlement([over, claim(SECOND, 0)], DESTINATION, Sat(1000))


def test_a_fee_that_leaves_no_output_is_refused() -> None:
    """A drained channel whose fee takes everything would need a transaction without outputs."""
    with pytest.raises(ValueError, match="without outputs"):
        build_settlement([claim(FIRST, 0)], DESTINATION, FIRST.funding_sat)


@looped(("change_sat", "outputs"), [(900_000, 2), (0, 1)])
def test_outputs_are_change_then_server(change_sat: int, outputs: int) -> None:
    """The client's change is output 0, and the server gets the rest."""
    raw = build_settlement([claim(FIRST, change_sat)], DESTINATION, Sat(1000)).serialize()

    transaction = CTransaction.deserialize(raw)
    values = [(out.nValue, bytes(out.scriptPubKey)) for out in transaction.vout]
    server = (FIRST.funding_sat - change_sat - 1000, DESTINATION)
    assert values == [(change_sat, FIRST.change_script), server][-outputs:]
    assert (transaction.nVersion, transaction.nLockTime, transaction.vin[0].nSequence) == (1, 0, 0xFFFFFFFF)


# --- size -----------------------------------------------------------------------------------------------------------


@each_shape
def test_size_is_known_before_signing(claims: list[Claim], fee_sat: int) -> None:
    """The size for the fee is at least the signed size, and larger only if signatures are shorter."""
    raw = settle(claims, fee_sat).transaction
    server_output = fee_sat < sum(c.received_sat for c in claims)

    size = settlement_size(claims, DESTINATION, server_output=server_output)

    assert len(raw) <= size <= len(raw) + 4 * len(claims)


@looped(("change_sat", "low", "high"), [(900_000, 345, 349), (0, 311, 315)])
@looped("terms", [FIRST, SECOND], ids=["80 bytes", "81 bytes"])
def test_size_is_in_the_documented_range(terms: Payer, change_sat: int, low: int, high: int) -> None:
    """RBPCP §8.1: 345 to 349 bytes with two outputs, 311 to 315 with one."""
    assert low <= settlement_size([claim(terms, change_sat)], DESTINATION) <= high


@looped("terms", [FIRST, SECOND], ids=["80 bytes", "81 bytes"])
def test_the_weight_of_an_input_is_that_of_its_bytes(terms: Payer) -> None:
    """The kind computes the weight that the laid out input has."""
    assert P2SH.input_weight(claim(terms, 0)) == ChannelKind.input_weight(P2SH, claim(terms, 0))


def test_the_longest_signature_is_provided_for() -> None:
    """A low-S signature has at most 71 bytes, with flag 72."""
    lengths = {len(FIRST.server_key.sign(bytes([n]) * 32, hasher=None)) + 1 for n in range(64)}

    assert max(lengths) == MAX_SIGNATURE_BYTES


# --- the fee --------------------------------------------------------------------------------------------------------


def with_received(received_sat: int) -> Claim:
    """A claim with change and this received value; its signature is of another payment, but no fee depends on it."""
    signed = claim(FIRST, 900_000)
    return Claim(signed.terms, signed.outpoint, Sat(900_000 + received_sat), signed.change_script, signed.payment)


def drained_of(received_sat: int) -> Claim:
    """A claim without change and this received value."""
    signed = claim(FIRST, 0)
    return Claim(signed.terms, signed.outpoint, Sat(received_sat), signed.change_script, signed.payment)


SIZE = settlement_size([with_received(1)], DESTINATION)
SIZE_ALONE = settlement_size([with_received(1)], DESTINATION, server_output=False)
SIZE_DRAINED = settlement_size([drained_of(1)], DESTINATION)


@looped(
    ("received", "want"),
    [
        (1_000_000, SIZE * RATE),
        (SIZE * RATE + DUST, SIZE * RATE),
        (SIZE * RATE + DUST - 1, SIZE * RATE - 1),
        (SIZE + DUST + 1, SIZE + 1),
        (SIZE + DUST, SIZE),
        (SIZE + DUST - 1, Shortfall(Sat(SIZE + DUST - 1), Sat(SIZE + DUST))),
        (1, Shortfall(Sat(1), Sat(SIZE + DUST))),
        (0, Shortfall(Sat(0), Sat(SIZE + DUST))),
    ],
)
def test_threat_13_fee_of_a_channel_with_change(received: int, want: Sat | Shortfall) -> None:
    """The fee is the rate, lowered to leave no dust, down to the relay floor; below that there is no settlement."""
    assert plan_fee([with_received(received)], DESTINATION, RATE, ALL_OF_IT) == want


@looped(
    ("received", "want"),
    [
        (SIZE + DUST, SIZE),
        (SIZE + DUST - 1, SIZE + DUST - 1),
        (SIZE_ALONE, SIZE_ALONE),
        (SIZE_ALONE - 1, Shortfall(Sat(SIZE_ALONE - 1), Sat(SIZE_ALONE))),
        (0, Shortfall(Sat(0), Sat(SIZE_ALONE))),
    ],
)
def test_threat_13_all_may_become_fee_when_the_client_asks(received: int, want: Sat | Shortfall) -> None:
    """A closing client gets its change even if nothing is left for the server, while nodes relay the settlement."""
    assert plan_fee([with_received(received)], DESTINATION, RATE, ALL_OF_IT, may_give_all=True) == want


@looped("may_give_all", [False, True])
@looped(
    ("received", "want"),
    [
        (SIZE_DRAINED * RATE + DUST, SIZE_DRAINED * RATE),
        (SIZE_DRAINED + DUST, SIZE_DRAINED),
        (SIZE_DRAINED + DUST - 1, None),
    ],
)
def test_threat_13_fee_of_a_drained_channel(received: int, want: int | None, may_give_all: bool) -> None:
    """A drained channel always needs the server's output; otherwise there would be no output."""
    plan = plan_fee([drained_of(received)], DESTINATION, RATE, ALL_OF_IT, may_give_all=may_give_all)

    if want is None:
        assert isinstance(plan, Shortfall)
        assert plan.received_sat == received < plan.needed_sat
    else:
        assert plan == want


@looped(
    ("client_fee", "want"),
    [(0, SIZE * RATE), (SIZE * RATE - 1, SIZE * RATE), (SIZE * RATE + 1, SIZE * RATE + 1)],
)
def test_the_client_may_offer_a_higher_fee(client_fee: int, want: int) -> None:
    """The fee is the larger of the server's rate and the client's offer (RBPCP §8.1)."""
    plan = plan_fee([with_received(500_000)], DESTINATION, RATE, ALL_OF_IT, client_fee_sat=Sat(client_fee))

    assert plan == want


@looped("rate", [0, 1])
def test_the_fee_is_never_below_the_relay_floor(rate: int) -> None:
    """At any rate a settlement pays at least the relay floor."""
    plan = plan_fee([with_received(500_000)], DESTINATION, rate, ALL_OF_IT)

    assert plan == SIZE * RELAY_FLOOR_SAT_PER_VB


def test_a_planned_fee_can_be_built() -> None:
    """The fee of `plan_fee` for the largest destination also fits a smaller one."""
    claims = [with_received(SIZE + DUST + 40)]
    largest = plan_fee(claims, bytes(34), RATE, ALL_OF_IT)
    actual = plan_fee(claims, DESTINATION, RATE, ALL_OF_IT)

    assert not isinstance(largest, Shortfall)
    assert not isinstance(actual, Shortfall)
    assert build_settlement(claims, DESTINATION, actual).outputs[1][0] >= DUST


def test_terms_of_the_samples_cover_both_script_lengths() -> None:
    """The samples above have scripts of 80 and of 81 bytes."""
    lengths = {len(payer.terms.redeem_script) for payer in PAYERS.values()}

    assert lengths == {80, 81}
