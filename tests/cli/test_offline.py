"""Settling from a backup's records: batches signed before, new signatures, and refusals of the signer."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from bitcoin.core import CTransaction

from actors.settling.backup_units import Outcome, Result, sort_out
from actors.settling.offline import Settler
from paychan.chain.debug import DebugChain
from paychan.cli.operator.settle import Report, _print
from paychan.protocol.channel import (
    Channel,
    Close,
    CloseReason,
    Confirmed,
    Published,
    Signed,
    State,
    Unfunded,
    Vanished,
    View,
)
from paychan.protocol.fees import ChainFees
from paychan.protocol.opening import successor
from paychan.protocol.settlement import Coin, Reserve, Settlement, outpoints_of
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Network, OutPoint, Sat
from paychan.store.backup.archive import Manifest
from tests.lib.channels import NOW, RULES, SERVER_DESTINATION, accepted, step
from tests.lib.looped import looped
from tests.lib.world import DebugPayer, LocalSigner

PAYERS = [DebugPayer(f"offline {number}") for number in range(3)]
FIRST, SECOND, THIRD = PAYERS


def closing(payer: DebugPayer, paid_sat: int = 0) -> Channel:
    """A closing channel, drained by default."""
    channel = payer.channel(paid_sat or payer.funding_sat)
    return channel if channel.state is State.CLOSING else step(channel, Close(CloseReason.OPERATOR))


async def together(
    signer: LocalSigner, members: Sequence[Channel], fee_sat: int, reserve: Reserve | None = None
) -> Settlement:
    """Sign one settlement of all these channels, as the server had done before."""
    script = reserve.funding_script if reserve else SERVER_DESTINATION
    return await signer.sign_settlement([member.claim for member in members], script, Sat(fee_sat), reserve)


async def settle(
    signer: LocalSigner,
    channels: Sequence[Channel],
    chain: DebugChain | None = None,
    rate: int | None = None,
    *,
    plans: bool = False,
) -> dict[OutPoint, Result]:
    """Settle these channels; with a chain, broadcast. `plans`: nothing is signed or broadcast."""
    view = View(NOW, msgspec.structs.replace(RULES, fee_share_percent=50))
    units, results = sort_out(channels, view)
    settler = Settler(signer, chain, view, ChainFees(), rate, signs=not plans, publishes=not plans)
    results += await settler.settle_all(units, lambda _done: None)
    assert len(results) == len(channels)
    return {result.channel.outpoint: result for result in results}


def inputs(result: Result) -> list[bytes]:
    assert result.settlement is not None
    return [bytes(txin.prevout.hash) for txin in CTransaction.deserialize(result.settlement.transaction).vin]


@looped("counts", [True, False])
@looped("state", [State.OPEN, State.CLOSING])
def test_fault_7_a_payment_that_was_offered_is_settled_offline_by_the_rule(state: State, counts: bool) -> None:
    """There is no application to ask: the operator's rule decides about a payment without an answer."""
    asking = msgspec.structs.replace(RULES, asks_application=True, unanswered_counts=counts)
    offered = accepted(apply(FIRST.channel(10_000), FIRST.pays(70_000), View(NOW, asking)))
    if state is State.CLOSING:
        offered = accepted(apply(offered, Close(CloseReason.EXPIRY), View(NOW, asking)))

    [unit], results = sort_out([offered], View(NOW, asking))

    assert results == []
    assert [member.received_sat for member in unit.members] == [70_000 if counts else 10_000]


async def test_a_signed_batch_stays_together() -> None:
    """Whichever records hold the batch: after a crash between two of them it stays complete."""
    signer, members = LocalSigner(), [closing(payer) for payer in PAYERS]
    batch = await together(signer, members, 20_000)
    adopted = [step(members[0], Signed(batch)), *members[1:]]
    found = await settle(signer, adopted[::-1])
    assert [found[payer.outpoint].settlement for payer in PAYERS] == [batch] * 3


async def test_a_batch_at_a_higher_rate_is_signed_as_a_whole() -> None:
    """All members are in the new batch, in the order of its inputs, at the requested rate."""
    signer, members = LocalSigner(), [closing(FIRST, 50_000), closing(SECOND), closing(THIRD)]
    batch = await together(signer, members, 10_000)
    found = await settle(signer, [step(member, Signed(batch)) for member in members], rate=30)
    dearer = found[SECOND.outpoint].settlement
    assert dearer is not None
    assert inputs(found[FIRST.outpoint]) == [payer.outpoint.txid for payer in PAYERS]
    assert [found[payer.outpoint].settlement for payer in PAYERS] == [dearer] * 3
    assert dearer.fee_sat == pytest.approx(30 * dearer.size, rel=0.01)


async def test_threat_23_a_batch_that_lost_an_input_is_settled_one_by_one() -> None:
    """Another transaction spent the funding of one member: the others don't wait for it."""
    signer, members, chain = LocalSigner(), [closing(payer) for payer in PAYERS], DebugChain()
    batch = await together(signer, members, 10_000)
    theft = await together(LocalSigner(), [closing(SECOND)], 1_000)
    refund = CTransaction.deserialize(theft.transaction)
    script = bytes(refund.vin[0].scriptSig).replace(b"\x51\x4c", b"\x00\x4c")  # the other branch
    await chain.publish(theft.transaction.replace(bytes(refund.vin[0].scriptSig), script))

    found = await settle(signer, [step(member, Signed(batch)) for member in members], chain)
    assert found[SECOND.outpoint].outcome is Outcome.REFUNDED
    for payer in (FIRST, THIRD):
        assert found[payer.outpoint].outcome is Outcome.PUBLISHED
        assert inputs(found[payer.outpoint]) == [payer.outpoint.txid]


@pytest.mark.parametrize("rate", [None, 40])
async def test_a_plan_shows_what_was_settled_since_the_backup(
    rate: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asks the chain, names transaction and confirmations, and counts fees of the other channels alone."""
    signer, members, chain = LocalSigner(), [closing(FIRST), closing(SECOND)], DebugChain()
    done = await together(signer, members[:1], 10_000)
    await chain.publish(done.transaction)

    found = await settle(signer, [step(members[0], Signed(done)), members[1]], chain, rate, plans=True)

    first, second = found[FIRST.outpoint], found[SECOND.outpoint]
    assert (first.outcome, first.txid) == (Outcome.SETTLED, done.txid)
    assert first.confirmations > 0
    assert second.outcome is Outcome.PLANNED
    assert second.plan is not None
    manifest = Manifest(
        format=1, network="debug", created_at=NOW, paychan="1", records=2, states={}, unsettled_sat=Sat(0), sha256=""
    )
    _print(Report(manifest, "1 sat/vB", [first, second], Network.TEST))
    said = capsys.readouterr().out
    assert f"for fees of {second.plan.fee_sat:,} sat" in said
    assert f"settled: {first.confirmations:,} confirmation" in said
    _print(Report(manifest, "1 sat/vB", [first], Network.TEST))
    said = capsys.readouterr().out
    assert "for fees of" not in said
    assert "need no new settlement, and no fee" in said


async def test_a_channel_s_settlement_with_the_highest_fee_is_used() -> None:
    """One record has the replacement, the other still the first settlement: the replacement settles both."""
    signer, members = LocalSigner(), [closing(FIRST), closing(SECOND)]
    first = await together(signer, members, 10_000)
    second = await together(signer, members, 20_000)
    found = await settle(signer, [step(members[0], Signed(first)), step(members[1], Signed(second))])
    assert [found[payer.outpoint].settlement for payer in (FIRST, SECOND)] == [second] * 2


async def test_a_settlement_with_help_of_the_reserve_is_used_unchanged() -> None:
    """Its coin is no channel of the backup; a rate beyond the budget changes nothing."""
    signer, small = LocalSigner(), closing(FIRST, 10_000)
    coin = Coin(OutPoint(b"\x07" * 32, 0), Sat(50_000))
    leaning = await together(signer, [small], 9_000, Reserve(await signer.reserve_key(), (coin,)))
    for rate in (None, 40):
        found = await settle(signer, [step(small, Signed(leaning))], rate=rate)
        assert found[FIRST.outpoint].settlement == leaning


async def test_a_settlement_newer_than_the_backup_is_outbid_within_the_budget() -> None:
    """The signer signed it after the backup: a slightly higher fee outbids it, or the refusal is reported."""
    signer = LocalSigner()
    before = await together(signer, [closing(FIRST, 100_000)], 30_000)
    await together(signer, [closing(SECOND, 10_000)], 9_000)
    found = await settle(signer, [FIRST.channel(100_000), SECOND.channel(10_000)])
    outbid = found[FIRST.outpoint].settlement
    assert outbid is not None
    assert outbid.is_dearer_than(before)
    assert outbid.fee_sat <= before.fee_sat * 102 // 100
    assert found[SECOND.outpoint].outcome is Outcome.REFUSED
    assert found[SECOND.outpoint].reason.startswith("policy-replacement: ")


async def test_ended_channels_name_the_transaction_that_ended_them() -> None:
    """No settlement is signed for channels that were closed or lost before the backup."""
    records = [FIRST.history(State.CLOSED)[-1], SECOND.history(State.LOST)[-1]]
    found = await settle(LocalSigner(), records)
    results = [found[payer.outpoint] for payer in (FIRST, SECOND)]
    assert [result.outcome for result in results] == [Outcome.CLOSED, Outcome.LOST]
    assert all(len(result.txid) == 32 and result.settlement is None for result in results)


async def test_a_repeated_run_gives_the_same_bytes() -> None:
    """The same records, rate and time give the same transactions, at every run."""
    signer, channels = LocalSigner(), [FIRST.channel(), SECOND.channel(20_000)]
    once, again = await settle(signer, channels), await settle(signer, channels)
    assert {key: result.settlement for key, result in once.items()} == {
        key: result.settlement for key, result in again.items()
    }


async def test_fault_08_a_withdrawal_that_another_channel_depends_on_is_not_replaced() -> None:
    """At any requested rate: with another txid, the channel that continues there would lose its coins."""
    payer = DebugPayer("offline mover", movable=True)
    signer = LocalSigner()
    began = step(payer.pay(payer.channel(49_000), 1_000), Close(CloseReason.WITHDRAW))
    withdrawal = await together(signer, [began], 4_000)
    old = began
    for command in (Signed(withdrawal), Published(), Confirmed(withdrawal.txid), Vanished()):
        old = step(old, command)
    moved = DebugPayer(
        "offline mover", movable=True, funding_sat=began.payment.change_sat, at=OutPoint(withdrawal.txid, 0)
    )
    new = moved.pay(successor(old, NOW), 20_000)
    found = await settle(signer, [old, new], rate=60)
    assert found[payer.outpoint].settlement == withdrawal
    dearer = found[moved.outpoint].settlement
    assert dearer is not None
    assert outpoints_of(dearer.transaction) == [moved.outpoint]
    untouched = successor(old, NOW)
    offered = msgspec.structs.replace(untouched, offered=new.payment)
    for record, stays in ((offered, True), (untouched, False)):
        other = LocalSigner()
        assert await together(other, [began], 4_000) == withdrawal
        found = await settle(other, [old, record], rate=60)
        assert (found[payer.outpoint].settlement == withdrawal) == stays


@pytest.mark.parametrize("state", [State.CLOSING, State.PUBLISHED])
async def test_fault_12_a_pending_withdrawal_is_completed(state: State) -> None:
    """A moving channel does not count as too small: its stored withdrawal settles it."""
    signer, mover = LocalSigner(), DebugPayer("offline mover", movable=True)
    opened = mover.channel(100_000)
    moving = step(step(opened, mover.pays(100_001)), Close(CloseReason.WITHDRAW))
    withdrawal = await together(signer, [moving], 5_000)
    signed = step(moving, Signed(withdrawal))
    record = signed if state is State.CLOSING else step(signed, Published())

    found = await settle(signer, [record])

    assert found[mover.outpoint].outcome is Outcome.SIGNED
    assert found[mover.outpoint].settlement is not None
    assert inputs(found[mover.outpoint]) == [mover.outpoint.txid]


@pytest.mark.parametrize("drained", [False, True])
async def test_fault_10_a_channel_whose_funding_returned_is_settled(drained: bool) -> None:
    """A backup made while the funding seemed replaced must not keep its coins from being settled."""
    signer, payer = LocalSigner(), DebugPayer("offline unfunded")
    record = step(closing(payer) if drained else payer.channel(100_000), Unfunded())

    found = await settle(signer, [record])

    assert found[payer.outpoint].outcome is Outcome.SIGNED
