"""A record takes over facts of a transaction that spends its funding output, and keeps newer facts of its own."""

from __future__ import annotations

import msgspec
from bitcoin.core import CMutableTransaction, CTransaction
from bitcoin.core.script import CScript

from paychan.protocol.channel import (
    Accepted,
    Channel,
    Close,
    CloseReason,
    Found,
    Funded,
    Published,
    Rejected,
    Signed,
    State,
    Unfunded,
    Vanished,
)
from paychan.protocol.ending import end_of
from paychan.protocol.errors import ChannelMoved, ChannelMoving
from paychan.protocol.finding import lags, read_claim
from paychan.protocol.kinds.refund import sign_refund
from paychan.protocol.opening import successor
from paychan.protocol.settlement import sign_settlement
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Sat
from tests.lib.channels import NOW, SERVER_DESTINATION, VIEW, Payer, confirmed, found_by, step
from tests.lib.looped import looped

PLAIN, MOVER = Payer("found"), Payer("found and moves", movable=True)
PAID = 50_000


def at(payer: Payer, paid_sat: int) -> Channel:
    """The record after payments of `paid_sat` in total."""
    return payer.pay(payer.channel(), paid_sat - 10_000)


def test_fault_12_a_settlement_tells_its_payment_and_address() -> None:
    """The claim of any settlement is read from its bytes: alone, to another address, drained, or in a batch."""
    closing = step(at(PLAIN, PAID), Close(CloseReason.OPERATOR))
    alone = PLAIN.settlement(closing).transaction
    assert read_claim(closing, alone) == closing.claim
    assert read_claim(msgspec.structs.replace(closing, payment=PLAIN.payment(999_000)), alone) == closing.claim
    elsewhere = msgspec.structs.replace(closing, change_script=SERVER_DESTINATION)
    claim = read_claim(elsewhere, alone)
    assert claim is not None
    assert claim.change_script == PLAIN.change_script

    drained = [Payer(f"drained {n}") for n in range(3)]
    claims = [closing.claim] + [msgspec.structs.replace(p.channel().claim, payment=p.payment(0)) for p in drained]
    signers = [PLAIN, *drained]
    batch = sign_settlement(
        claims, SERVER_DESTINATION, Sat(9_000), lambda i, digest: signers[i].server_key.sign(digest, hasher=None)
    )
    for payer, claim in zip(drained, claims[1:], strict=True):
        assert read_claim(payer.channel(), batch.transaction) == claim
    assert read_claim(Payer("a stranger").channel(), batch.transaction) is None


def test_fault_12_a_refund_is_no_settlement() -> None:
    """A refund with further items below it on the stack, which any miner may add, is no settlement either."""
    channel = at(PLAIN, PAID)
    refund = sign_refund(PLAIN.key, PLAIN.terms, PLAIN.outpoint, PLAIN.funding_sat, PLAIN.change_script, Sat(9_000))
    assert read_claim(channel, refund.transaction) is None
    changed = CMutableTransaction.from_tx(CTransaction.deserialize(refund.transaction))
    changed.vin[0].scriptSig = CScript(b"\x51" * 5 + bytes(changed.vin[0].scriptSig))
    assert read_claim(channel, bytes(changed.serialize())) is None


def test_fault_12_junk_below_a_settlement_hides_nothing() -> None:
    """The reader uses the last four pushes and ignores the items below."""
    closing = step(at(PLAIN, PAID), Close(CloseReason.OPERATOR))
    changed = CMutableTransaction.from_tx(CTransaction.deserialize(PLAIN.settlement(closing).transaction))
    changed.vin[0].scriptSig = CScript(b"\x51" * 5 + bytes(changed.vin[0].scriptSig))
    assert read_claim(closing, bytes(changed.serialize())) == closing.claim


@looped("deep", [False, True])
def test_fault_12_an_older_settlement_takes_nothing_from_a_newer_record(deep: bool) -> None:
    """The record closes to replace it; once it is deep, the record takes it over, but keeps the newer payment."""
    newer, older = at(PLAIN, PAID), found_by(PLAIN, at(PLAIN, 20_000), deep=deep)

    after = step(newer, older)

    assert after.payment == newer.payment
    assert after.closing is not None
    assert (after.state, after.closing.settlement) == (
        (State.PUBLISHED, older.settlement) if deep else (State.CLOSING, None)
    )
    if not deep:
        assert step(after, older) is after


def test_fault_12_a_reorg_of_an_older_settlement_lets_the_newer_payment_be_signed() -> None:
    """The record took over a deep settlement; after a reorg it replaces it, but keeps it until then."""
    newer, older = at(PLAIN, PAID), found_by(PLAIN, at(PLAIN, 20_000), deep=True)
    followed = step(newer, older)

    again = step(step(followed, confirmed(followed)), Vanished())

    assert again.closing is not None
    assert (again.state, again.closing.settlement, again.received_sat) == (State.CLOSING, older.settlement, PAID)
    assert lags(again)
    dearer = sign_settlement(
        [again.claim], SERVER_DESTINATION, Sat(40_000), lambda _, digest: PLAIN.server_key.sign(digest, hasher=None)
    )
    assert not lags(step(again, Signed(dearer)))


@looped("state", [State.CLOSING, State.PUBLISHED, State.CLOSED])
def test_fault_12_a_records_own_settlement_yields_to_deep_ones_alone(state: State) -> None:
    """Another settlement in the mempool does not change a record that has its own; a deep one does."""
    record = PLAIN.history(state)[-1]
    other = at(PLAIN, PAID)

    assert step(record, found_by(PLAIN, other)) is record
    after = step(record, found_by(PLAIN, other, deep=True))
    assert (after.state, after.received_sat) == (State.PUBLISHED, PAID)


@looped("state", [State.OPEN, State.LOST, State.UNFUNDED])
def test_fault_11_a_settlement_back_to_the_funding_script_is_a_move(state: State) -> None:
    """In every state of the stale record it leads to the change output, with the value of that output."""
    record, other = MOVER.history(state)[-1], at(MOVER, PAID)
    found = found_by(MOVER, other)
    after = step(record, found)
    assert after.moves
    moved = step(after, confirmed(after))
    end = end_of(moved)
    assert isinstance(end, ChannelMoved)
    assert end.fields["funding_sat"] == successor(moved, NOW).funding_sat == MOVER.funding_sat - PAID
    assert str(successor(moved, NOW).outpoint) == end.fields["outpoint"]


def test_fault_11_a_close_that_the_record_signed_is_no_move() -> None:
    """Its change goes to the funding script too, but the operator closed: only an unknown settlement is a move."""
    closed = MOVER.history(State.CLOSED)[-1]
    again = Found(closed.claim, msgspec.structs.replace(MOVER.settlement(closed), txid=b"\x07" * 32), deep=True)

    after = step(closed, again)

    assert not after.moves


def test_fault_11_the_opening_payment_is_never_a_move() -> None:
    """It would publish the secret, so no withdrawal uses it: such a settlement ends the channel."""
    opened = MOVER.channel()
    assert not step(opened, found_by(MOVER, opened)).moves


@looped("state", [State.CLOSING, State.PUBLISHED, State.CLOSED])
def test_fault_16_closing_a_channel_that_moves_is_refused(state: State) -> None:
    """The refusal tells the operator that the channel moves, or where it went; another withdrawal has no effect."""
    moving = MOVER.history(state, reason=CloseReason.WITHDRAW)[-1]

    refused = apply(moving, Close(CloseReason.OPERATOR), VIEW)

    assert isinstance(refused, Rejected)
    assert isinstance(refused.error, ChannelMoved if state is State.CLOSED else ChannelMoving)
    assert apply(moving, Close(CloseReason.WITHDRAW), VIEW) == Accepted(moving)


def test_fault_16_each_payment_counts_on_one_record() -> None:
    """The continued channel begins with no payments: the earlier ones belong to the moved record."""
    moving = step(at(MOVER, PAID), Close(CloseReason.WITHDRAW))
    published = step(step(moving, Signed(MOVER.settlement(moving))), Published())
    moved = step(published, confirmed(published))
    assert (moved.payments, successor(moved, NOW).payments) == (1, 0)


def test_fault_10_what_was_never_funded_goes_on_where_it_was() -> None:
    """An open channel accepts payments again, a closing one continues to close, and an ended one stays ended."""
    for state, after in ((State.OPEN, State.OPEN), (State.CLOSING, State.CLOSING), (State.PUBLISHED, State.CLOSING)):
        unfunded = step(PLAIN.history(state)[-1], Unfunded())
        assert unfunded.state is State.UNFUNDED
        assert step(unfunded, Funded()).state is after
    for state in (State.CLOSED, State.LOST):
        record = PLAIN.history(state)[-1]
        assert step(record, Unfunded()) is record
