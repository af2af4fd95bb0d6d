"""The settlement planner: which channels wait for others, which never do, and bad inputs (threats 15, 21 and 23)."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from bitcoin.core import CTransaction
from bitcoin.core.script import CScript

from paychan.chain.base import ChainFailed, Spend
from paychan.chain.debug import DebugChain
from paychan.protocol.channel import Channel, Close, CloseByPayment, CloseReason, State, Vanished
from paychan.protocol.errors import FeesTooHigh, NotWithdrawable, OutpointUsed
from paychan.protocol.fees import ChainFees
from paychan.protocol.settlement import Settlement, outpoints_of
from paychan.protocol.types import OutPoint, UnixTime
from paychan.signer_client.base import SignerAbsent, SignerRefused
from paychan.store.base import Change
from tests.lib.channels import NOW, RULES, step
from tests.lib.kernel import interpreter_accepts
from tests.lib.world import Clock, DebugPayer, Local, accepted, local, refused

PAYERS = [DebugPayer(f"planner {number}") for number in range(4)]
FIRST, SECOND, THIRD, FOURTH = PAYERS
WAIT = 600


async def drain(server: Local, *payers: DebugPayer) -> None:
    """Open channels and pay everything over them."""
    for payer in payers:
        await server.open(payer)
        accepted(await server.registry.ask(payer.outpoint, payer.pays(payer.funding_sat)))


async def settlement(server: Local, payer: DebugPayer) -> Settlement | None:
    closing = (await server.stored(payer)).closing
    return closing.settlement if closing else None


def inputs(signed: Settlement | None) -> list[bytes]:
    assert signed is not None
    return [bytes(txin.prevout.hash) for txin in CTransaction.deserialize(signed.transaction).vin]


async def test_drained_channels_wait_and_settle_together(tmp_path: Path) -> None:
    """Before the waiting time ends no settlement is signed; then one settlement has all channels, with valid inputs."""
    async with local(tmp_path, settings={"batch_seconds": WAIT}) as server:
        await drain(server, FIRST, SECOND, THIRD)
        server.clock.now += WAIT - 1
        await server.watcher.scan()
        assert await settlement(server, FIRST) is None
        assert not server.signer.calls["sign_settlement"]

        server.clock.now += 1
        await server.watcher.scan()
        together = await settlement(server, FIRST)
        assert sorted(inputs(together)) == sorted(payer.outpoint.txid for payer in (FIRST, SECOND, THIRD))
        assert together is not None
        for index, txid in enumerate(inputs(together)):
            (payer,) = (payer for payer in PAYERS if payer.outpoint.txid == txid)
            script = payer.terms.funding_script
            assert interpreter_accepts(script, together.transaction, index, payer.funding_sat)
            stored = await server.stored(payer)
            assert (stored.state, await settlement(server, payer)) == (State.CLOSED, together)
        assert server.signer.calls["sign_settlement"] == 1


async def test_without_the_setting_no_channel_waits(tmp_path: Path) -> None:
    """A channel that a payment drains is settled in that request."""
    async with local(tmp_path) as server:
        await drain(server, FIRST)
        assert (await server.stored(FIRST)).state is State.CLOSED


async def test_enough_channels_do_not_wait(tmp_path: Path) -> None:
    """A settlement that the waiting channels fill is signed at once; the next channel starts a new wait."""
    async with local(tmp_path, settings={"batch_seconds": WAIT, "batch_channels": 2}) as server:
        await drain(server, FIRST, SECOND, THIRD)
        await server.watcher.scan()
        assert len(inputs(await settlement(server, FIRST))) == 2
        assert await settlement(server, FIRST) == await settlement(server, SECOND)
        assert await settlement(server, THIRD) is None


async def test_threat_15_a_channel_with_change_settles_with_the_waiting_ones(tmp_path: Path) -> None:
    """It is input 0 with its change as output 0; it does not wait itself."""
    async with local(tmp_path, settings={"batch_seconds": WAIT}) as server:
        await drain(server, FIRST, SECOND)
        opened = await server.open(THIRD)
        accepted(await server.registry.ask(THIRD.outpoint, Close(CloseReason.OPERATOR)))
        together = await settlement(server, THIRD)
        assert inputs(together)[0] == THIRD.outpoint.txid
        assert len(inputs(together)) == 3
        assert together is not None
        change = CTransaction.deserialize(together.transaction).vout[0]
        assert (change.nValue, bytes(change.scriptPubKey)) == (opened.payment.change_sat, THIRD.change_script)
        await server.watcher.scan()
        assert await settlement(server, FIRST) == await settlement(server, SECOND) == together


async def test_threat_21_no_channel_near_the_deadline_waits(tmp_path: Path) -> None:
    """After half of the time to the deadline, a drained channel is settled alone and at once."""
    payer = DebugPayer("in a hurry", UnixTime(NOW + 3 * 86_400))
    async with local(tmp_path, settings={"batch_seconds": 10 * 86_400}) as server:
        await drain(server, FIRST, payer)
        server.clock.now = payer.expiry - (payer.expiry - NOW) // 2
        await server.watcher.scan()
        assert inputs(await settlement(server, payer)) == [payer.outpoint.txid]
        assert await settlement(server, FIRST) is None


async def test_a_channel_that_waits_in_vain_settles_alone(tmp_path: Path) -> None:
    """No other channel comes in time."""
    async with local(tmp_path, settings={"batch_seconds": WAIT}) as server:
        await drain(server, FIRST)
        server.clock.now += WAIT
        await server.watcher.scan()
        assert inputs(await settlement(server, FIRST)) == [FIRST.outpoint.txid]


class Thieving(DebugChain):
    """A chain on which another transaction has spent the funding output of `SECOND`."""

    async def unspent(self, outpoints):
        return {key: value for key, value in (await super().unspent(outpoints)).items() if key != SECOND.outpoint}

    async def spender(self, outpoint):
        return Spend(b"\x66" * 32, 0) if outpoint == SECOND.outpoint else await super().spender(outpoint)

    async def transaction(self, txid):
        return b"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00" if txid == b"\x66" * 32 else await super().transaction(txid)


async def test_threat_23_a_bad_input_is_left_out(tmp_path: Path) -> None:
    """The other channels settle together without it."""
    clock = Clock()
    async with local(tmp_path, clock, chain=Thieving(clock), settings={"batch_seconds": WAIT}) as server:
        await drain(server, FIRST, SECOND, THIRD)
        server.clock.now += WAIT
        await server.watcher.scan()
        assert len(inputs(await settlement(server, FIRST))) == 2
        assert await settlement(server, FIRST) == await settlement(server, THIRD)
        assert inputs(await settlement(server, SECOND)) == [SECOND.outpoint.txid]


@pytest.mark.parametrize(
    ("part", "method", "failure", "times"),
    [
        ("signer", "sign_settlement", SignerRefused("policy-template", "claim 1 is bad"), 1),
        ("chain", "unspent", ChainFailed("no node"), 99),
    ],
)
async def test_threat_23_without_a_batch_each_settles_alone(
    tmp_path: Path, part: str, method: str, failure: Exception, times: int
) -> None:
    """A batch that can't be signed or checked delays its channels only until the next scan."""
    async with local(tmp_path, settings={"batch_seconds": WAIT}) as server:
        await drain(server, FIRST, SECOND)
        server.clock.now += WAIT
        getattr(server, part).fail(method, failure, times=times)
        await server.watcher.scan()
        await server.watcher.scan()
        for payer in (FIRST, SECOND):
            assert inputs(await settlement(server, payer)) == [payer.outpoint.txid]


async def test_a_batch_waits_for_the_signer_and_for_a_restart(tmp_path: Path) -> None:
    """Without signer the channels stay as they are; a new process knows since when they wait, and continues."""
    clock = Clock()
    async with local(tmp_path, clock, settings={"batch_seconds": WAIT}) as server:
        await drain(server, FIRST, SECOND)
        clock.now += WAIT
        server.signer.fail("sign_settlement", SignerAbsent("asleep"))
        await server.watcher.scan()
        assert (await server.stored(FIRST)).state is State.CLOSING

    async with local(tmp_path, clock, settings={"batch_seconds": WAIT}) as server:
        await server.watcher.scan()
        await server.watcher.scan()
        assert (await server.stored(FIRST)).state is (await server.stored(SECOND)).state is State.CLOSED


async def test_fault_03_a_settlement_that_was_signed_is_carried_out(tmp_path: Path) -> None:
    """A server that lost the channel with its store does not reopen it, and broadcasts the signed settlement."""
    async with local(tmp_path / "now", fee_sat_per_vb=20) as server:
        await server.open(FIRST)
        signer = server.signer.real
        accepted(await server.registry.ask(FIRST.outpoint, Close(CloseReason.OPERATOR)))
        before = await settlement(server, FIRST)

    async with local(tmp_path / "backup") as server:
        server.signer.real = signer
        assert isinstance(refused(await server.opener.open(FIRST.request())), OutpointUsed)
        assert before is not None
        assert await settlement(server, FIRST) == before


async def test_a_settlement_in_the_network_is_found(tmp_path: Path) -> None:
    """A server that lost the signed settlement takes over the one that spends the output, and signs nothing."""
    clock = Clock()
    chain = DebugChain(clock)
    async with local(tmp_path / "now", clock, chain=chain, settings={"batch_seconds": WAIT}) as server:
        await drain(server, FIRST, SECOND)
        clock.now += WAIT
        await server.watcher.scan()
        before = await settlement(server, FIRST)

    async with local(tmp_path / "backup", clock, chain=chain) as server:
        await server.fill([payer.channel() for payer in (FIRST, SECOND)])
        accepted(await server.registry.ask(FIRST.outpoint, Close(CloseReason.OPERATOR)))
        assert await settlement(server, FIRST) == before
        assert (await server.stored(FIRST)).state is State.CLOSED
        assert not server.signer.calls["sign_settlement"]


async def test_a_channel_moves_to_its_change_output(tmp_path: Path) -> None:
    """The old record names the new outpoint, the new channel accepts payments, and a restart finds both."""
    payer = DebugPayer("mover", movable=True)
    async with local(tmp_path) as server:
        opened = accepted(
            await server.registry.ask((await server.open(payer, 10_000)).outpoint, payer.pays(10_001))
        ).channel
        accepted(await server.registry.ask(payer.outpoint, Close(CloseReason.WITHDRAW)))
        old = await server.stored(payer)
        assert old.closing is not None
        moved = DebugPayer("mover", funding_sat=opened.payment.change_sat, movable=True, at=new_outpoint(old))
        assert (await server.stored(moved)).funding_sat == opened.payment.change_sat
        accepted(await server.registry.ask(moved.outpoint, moved.pays(700)))

    async with local(tmp_path) as server:
        await server.watcher.scan()
        went_on = await server.stored(moved)
        assert (went_on.state, went_on.received_sat, went_on.secret) == (State.OPEN, 700, opened.secret)
        assert (await server.stored(payer)).state is State.CLOSED


@pytest.mark.parametrize("is_offered", [False, True])
async def test_fault_08_a_withdrawal_is_not_signed_again_where_a_payment_is_offered(
    tmp_path: Path, is_offered: bool
) -> None:
    """The application may have delivered for it: with another txid its funding output would not exist."""
    payer = DebugPayer("mover with an offer", movable=True)
    async with local(tmp_path) as server:
        opened = accepted(
            await server.registry.ask((await server.open(payer, 100_000)).outpoint, payer.pays(100_001))
        ).channel
        accepted(await server.registry.ask(payer.outpoint, Close(CloseReason.WITHDRAW)))
        old = await server.stored(payer)
    moved = DebugPayer("mover with an offer", funding_sat=opened.payment.change_sat, movable=True, at=new_outpoint(old))
    async with local(tmp_path) as server:
        new = await server.stored(moved)
        if is_offered:
            offered = msgspec.structs.replace(new, offered=moved.pays(700).payment, seq=new.seq + 1)
            assert await server.store.real.commit([Change(new, offered)]) == [True]
        server.clock.now = payer.expiry - RULES.settlement_period_seconds // 2

        again = await server.settling.planner.fee_bump(step(old, Vanished()), None, refused=True)

        assert (again is None) == is_offered


def new_outpoint(old: Channel):
    assert old.closing is not None
    return old.outpoint.__class__(old.closing.spent_by, 0)


@pytest.mark.parametrize("received", [RULES.dust_sat + 100, 10_000])
async def test_threat_13_a_channel_not_worth_settling_stays_open(tmp_path: Path, received: int) -> None:
    """Neither operator nor expiry closes it: it may receive more, or the payer takes its coins back."""
    async with local(tmp_path) as server:
        await server.open(FIRST, received)
        server.clock.now = FIRST.expiry - RULES.settlement_period_seconds
        await server.watcher.scan()
        worth = received == 10_000
        assert (await server.stored(FIRST)).state is (State.CLOSED if worth else State.OPEN)


class Stubborn(DebugChain):
    """A chain that confirms and replaces nothing, although it claims to replace."""

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        spend = await super().spender(outpoint)
        return None if spend is None else Spend(spend.txid, 0)

    async def publish(self, transaction: bytes, child: bytes = b"") -> None:
        txid = bytes(CTransaction.deserialize(transaction).GetTxid())
        for outpoint in outpoints_of(transaction):
            spend = await self.spender(outpoint)
            if spend is not None and spend.txid != txid:
                msg = "txn-mempool-conflict"
                raise ChainFailed(msg)
        await super().publish(transaction, child)


async def test_fault_02_the_record_says_what_the_network_has(tmp_path: Path) -> None:
    """A refused replacement does not become the settlement; the record has the network's, and there is an alarm."""
    async with local(tmp_path, chain=Stubborn(), max_fee_sat_per_vb=200) as server:
        await server.open(FIRST, 900_000)
        accepted(await server.registry.ask(FIRST.outpoint, Close(CloseReason.OPERATOR)))
        first = await settlement(server, FIRST)
        server.clock.now = FIRST.expiry - RULES.settlement_period_seconds // 2
        for _ in range(3):
            await server.watcher.scan()
            assert (await server.stored(FIRST)).state is State.PUBLISHED
            assert await settlement(server, FIRST) == first
        assert "does not replace" in server.settling.planner.pinned[FIRST.outpoint]
        assert any(alarm.channel == str(FIRST.outpoint) for alarm in server.watcher.alarms)


async def test_fault_76_a_withdrawal_never_publishes_the_secret(tmp_path: Path) -> None:
    """The secret is the hash of the opening payment's signature, so a withdrawal never settles that payment."""
    payer = DebugPayer("mover", movable=True)
    async with local(tmp_path) as server:
        opened = await server.open(payer, 10_000)
        early = await server.registry.ask(payer.outpoint, Close(CloseReason.WITHDRAW))
        assert isinstance(refused(early), NotWithdrawable)

        accepted(await server.registry.ask(payer.outpoint, payer.pays(10_001)))
        accepted(await server.registry.ask(payer.outpoint, Close(CloseReason.WITHDRAW)))
        old = await server.stored(payer)
        assert old.closing is not None
        assert old.closing.settlement is not None
        published = CTransaction.deserialize(old.closing.settlement.transaction)
        pushed = [bytes(data or b"") for _, data, _ in CScript(published.vin[0].scriptSig).raw_iter()]
        assert opened.secret not in [sha256(each).digest() for each in pushed]
        went_on = await server.stored(DebugPayer("mover", movable=True, at=new_outpoint(old)))
        assert went_on.secret == opened.secret
        again = await server.registry.ask(went_on.outpoint, Close(CloseReason.WITHDRAW))
        assert not isinstance(refused(again), NotWithdrawable), "no value was received there, but the secret is safe"


def floor_of(server: Local, rate: int) -> None:
    """Let the chain relay no transaction below this rate from now on."""
    fees = ChainFees(floor_sat_per_vb=rate)
    server.context.chain_view.fees = fees

    async def asked() -> ChainFees:
        return fees

    server.chain.real.fees = asked


@pytest.mark.parametrize("reason", [CloseReason.OPERATOR, CloseReason.WITHDRAW, CloseReason.CLIENT])
async def test_fault_13_a_channel_below_the_relay_floor_stays_open(tmp_path: Path, reason: CloseReason) -> None:
    """The refusal has both numbers, and payments continue; it closes at expiry, and at a lower floor too."""
    payer = DebugPayer("floor", movable=True)
    async with local(tmp_path, max_fee_sat_per_vb=200, fee_share_percent=50) as server:
        opened = await server.open(payer, 20_000)
        accepted(await server.registry.ask(payer.outpoint, payer.pays(20_100)))
        floor_of(server, 50)

        def closing(paid_sat: int) -> Close | CloseByPayment:
            by_client = CloseByPayment(payer.payment(opened.funding_sat - paid_sat))
            return by_client if reason is CloseReason.CLIENT else Close(reason)

        error = refused(await server.registry.ask(payer.outpoint, closing(20_100)))
        assert isinstance(error, FeesTooHigh)
        assert "up to 10050 sat" in str(error)
        assert (await server.stored(payer)).state is State.OPEN
        accepted(await server.registry.ask(payer.outpoint, payer.pays(20_200)))
        if reason is CloseReason.CLIENT:
            accepted(await server.registry.ask(payer.outpoint, closing(40_400)))
        elif reason is CloseReason.OPERATOR:
            accepted(await server.registry.ask(payer.outpoint, Close(CloseReason.EXPIRY)))
            return
        else:
            floor_of(server, 1)
            accepted(await server.registry.ask(payer.outpoint, closing(20_200)))
        assert (await server.stored(payer)).state is State.CLOSED


async def test_fault_13_a_withdrawal_that_the_signer_refuses_is_cancelled(tmp_path: Path) -> None:
    """The channel is open again, because nothing is signed; it stays CLOSING while the signer is away."""
    payer = DebugPayer("taken back", movable=True)
    async with local(tmp_path) as server:
        await server.open(payer, 20_000)
        accepted(await server.registry.ask(payer.outpoint, payer.pays(20_100)))
        server.signer.fail("sign_settlement", SignerAbsent("asleep"), 1)
        refused(await server.registry.ask(payer.outpoint, Close(CloseReason.WITHDRAW)))
        assert (await server.stored(payer)).state is State.CLOSING
        server.signer.fail("sign_settlement", SignerRefused("policy-fee", "no"), 1)
        await server.watcher.scan()
        record = await server.stored(payer)
        assert (record.state, record.closing) == (State.OPEN, None)
        accepted(await server.registry.ask(payer.outpoint, payer.pays(30_000)))
        server.signer.fail("sign_settlement", SignerRefused("policy-fee", "no"), 1)
        error = refused(await server.registry.ask(payer.outpoint, Close(CloseReason.WITHDRAW)))
        assert "policy-fee" in str(error)
        accepted(await server.registry.ask(payer.outpoint, payer.pays(40_000)))
