"""A second channel kind is one file and its registration: `tests/lib/p2wsh.py` opens, pays, settles and is refunded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import pytest
from bitcoin.core import CTransaction

from paychan.protocol.channel import Channel, CloseReason, State
from paychan.protocol.errors import BadSignature, DamagedRecord
from paychan.protocol.finding import read_claim
from paychan.protocol.kinds.refund import input_size, sign_refund
from paychan.protocol.payment import PaymentVerifier
from paychan.protocol.record import decode_record, encode_record
from paychan.protocol.settlement import (
    Claim,
    Settlement,
    layout_problem,
    settlement_size,
    sign_settlement,
    spends_by_server_branch,
)
from paychan.protocol.tx import virtual_size, without_witness
from paychan.protocol.types import Sat
from paychan.protocol.wire.signer_messages import SettlementRequest
from paychan.signer_client.reply_checks import check_settlement
from signer.ledger.entries import decode_entry, encode_entry, request_digest
from tests.lib.channels import SERVER_DESTINATION, Payer, private_key
from tests.lib.kernel import interpreter_accepts
from tests.lib.looped import looped
from tests.lib.p2wsh import SegwitPayer, forget, registered


@pytest.fixture(autouse=True)
def second_kind() -> Iterator[None]:
    """Both kinds are known."""
    with registered():
        yield


PAYER = SegwitPayer("second kind")
MOVABLE = SegwitPayer("second kind", movable=True)
LEGACY = Payer("first kind")


def claim_of(payer: Payer, change_sat: int) -> Claim:
    """The claim of a payer's channel with this change."""
    payment = payer.payment(change_sat)
    return Claim(payer.terms, payer.outpoint, payer.funding_sat, payer.change_script, payment)


def settled(payers: Sequence[Payer], claims: Sequence[Claim], fee_sat: int = 2_000) -> Settlement:
    """A settlement, signed by each channel's server key."""
    return sign_settlement(
        claims, SERVER_DESTINATION, Sat(fee_sat), lambda at, digest: payers[at].server_key.sign(digest, hasher=None)
    )


@looped("payer", [PAYER, MOVABLE], ids=["change to a key", "change funds the channel again"])
@looped("reason", [CloseReason.OPERATOR, CloseReason.EXPIRY])
def test_a_channel_opens_pays_and_settles(payer: SegwitPayer, reason: CloseReason) -> None:
    """Every transition of the core works, and Core's interpreter accepts the settlement for this value alone."""
    paid = payer.pay(payer.channel(), 20_000)
    assert paid.received_sat == 30_000

    closed = payer.history(State.CLOSED, paid_sat=30_000, reason=reason)[-1]

    raw = _settlement_of(closed).transaction
    assert interpreter_accepts(payer.terms.funding_script, raw, 0, payer.funding_sat)
    assert not interpreter_accepts(payer.terms.funding_script, raw, 0, payer.funding_sat - 1)
    assert CTransaction.deserialize(raw).vin[0].scriptSig == b""


def test_a_drained_channel_settles() -> None:
    """A payment without change has no output, and its settlement is valid."""
    raw = settled([PAYER], [claim_of(PAYER, 0)]).transaction

    assert interpreter_accepts(PAYER.terms.funding_script, raw, 0, PAYER.funding_sat)


def test_txid_and_size_are_those_of_segwit() -> None:
    """The txid leaves the witness out, and the size counts it as a quarter."""
    claims = [claim_of(PAYER, 900_000)]
    settlement = settled([PAYER], claims)
    whole = CTransaction.deserialize(settlement.transaction)

    assert settlement.txid == whole.GetTxid()
    assert len(without_witness(settlement.transaction)) < settlement.size < len(settlement.transaction)
    assert settlement.size == virtual_size(settlement.transaction) == -(-whole.calc_weight() // 4)
    assert 0 <= settlement_size(claims, SERVER_DESTINATION) - settlement.size <= 1


def test_a_payment_signs_the_value_of_the_funding() -> None:
    """The verifier gets the value, and refuses a payment from an output of another value (BIP143)."""
    payment = PAYER.payment(900_000)
    verifiers = [
        PaymentVerifier(PAYER.terms, PAYER.outpoint, Sat(PAYER.funding_sat + more), PAYER.change_script)
        for more in (0, 1, -1)
    ]

    assert [verifier.problem(payment) for verifier in verifiers] == [
        None, *[BadSignature(change_sat=Sat(900_000))] * 2
    ]  # fmt: skip


def test_a_payment_is_of_its_kind() -> None:
    """The same keys, expiry and output give another signature for each kind."""
    as_first = msgspec.structs.replace(PAYER.terms, tag="p2sh")
    claim = claim_of(PAYER, 900_000)

    assert claim.problem() is None
    assert isinstance(msgspec.structs.replace(claim, terms=as_first).problem(), BadSignature)


def test_both_kinds_settle_together() -> None:
    """Claims with change of the second kind follow one of the first; Core accepts every input."""
    payers = [LEGACY, PAYER, SegwitPayer("another"), Payer("drained"), SegwitPayer("drained too")]
    claims = [claim_of(payer, change) for payer, change in zip(payers, [700_000, 800_000, 900_000, 0, 0], strict=True)]

    settlement = settled(payers, claims)

    for index, payer in enumerate(payers):
        assert interpreter_accepts(payer.terms.funding_script, settlement.transaction, index, payer.funding_sat)
    assert 0 <= settlement_size(claims, SERVER_DESTINATION) - settlement.size <= len(claims)


@looped(
    ("changes", "problem"),
    [
        ([(PAYER, 1_000), (LEGACY, 1_000)], "at a place"),
        ([(LEGACY, 0), (PAYER, 1_000)], "must come first"),
        ([(LEGACY, 1_000), (Payer("another"), 1_000)], "at a place"),
        ([(PAYER, 1_000), (LEGACY, 0)], None),
        ([(LEGACY, 1_000), (PAYER, 1_000)], None),
    ],
)
def test_each_kind_says_where_it_may_leave_change(changes: list[tuple[Payer, int]], problem: str | None) -> None:
    """RBPCP's kind leaves change at input 0 only, the second kind anywhere before the claims without change."""
    claims = [claim_of(payer, change) for payer, change in changes]

    found = layout_problem(claims)

    assert found is None if problem is None else found is not None and problem in found


def test_the_refund_is_valid() -> None:
    """The client takes everything back by its own branch; its size is known before."""
    refund = sign_refund(PAYER.key, PAYER.terms, PAYER.outpoint, PAYER.funding_sat, SERVER_DESTINATION, Sat(500))

    assert interpreter_accepts(PAYER.terms.funding_script, refund.transaction, 0, PAYER.funding_sat)
    assert refund.txid == CTransaction.deserialize(refund.transaction).GetTxid()
    assert not spends_by_server_branch(refund.transaction, PAYER.outpoint)
    assert refund.size <= input_size(PAYER.terms) + 44 + 1  # outputs and counts; marker and flag of segwit


def test_the_chain_shows_a_settlement() -> None:
    """The claim is read out of a settlement of either kind, at any input."""
    payers = [LEGACY, PAYER]
    claims = [claim_of(LEGACY, 700_000), claim_of(PAYER, 800_000)]
    raw = settled(payers, claims).transaction

    for payer, claim in zip(payers, claims, strict=True):
        assert spends_by_server_branch(raw, payer.outpoint)
        assert read_claim(payer.channel(), raw) == claim


def test_records_name_the_kind() -> None:
    """A record keeps the kind; a program that does not know it refuses the record."""
    channel = PAYER.channel()
    raw = encode_record(channel)
    assert decode_record(raw) == channel

    forget()
    with pytest.raises(DamagedRecord, match="unknown channel kind 'p2wsh'"):
        decode_record(raw)


def test_requests_to_the_signer_name_the_kind() -> None:
    """Two requests that differ in the kind alone have different digests; the server checks the signer's reply."""
    claim = claim_of(PAYER, 900_000)
    request = SettlementRequest(1, (claim,), SERVER_DESTINATION, Sat(2_000))
    other = msgspec.structs.replace(claim, terms=msgspec.structs.replace(claim.terms, tag="p2sh"))

    check_settlement(settled([PAYER], [claim]), request)

    assert request_digest(request) != request_digest(msgspec.structs.replace(request, claims=(other,)))
    assert decode_entry(encode_entry(request), SettlementRequest) == request


def test_a_reply_with_a_foreign_signature_is_refused() -> None:
    """The server's signature in the witness is verified against the digest of the kind."""
    claim = claim_of(PAYER, 900_000)
    request = SettlementRequest(1, (claim,), SERVER_DESTINATION, Sat(2_000))
    foreign = sign_settlement(
        [claim], SERVER_DESTINATION, Sat(2_000), lambda _, digest: private_key("foreign").sign(digest, hasher=None)
    )

    with pytest.raises(Exception, match="no signature of"):
        check_settlement(foreign, request)


def _settlement_of(channel: Channel) -> Settlement:
    assert channel.closing is not None
    assert channel.closing.settlement is not None
    return channel.closing.settlement
