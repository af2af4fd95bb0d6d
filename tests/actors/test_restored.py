"""A store that is older than the signer's claims: its open channels first adopt them, then accept payments."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut

from actors.channel import Resume
from paychan.chain.debug import DebugChain
from paychan.protocol.address import key_script
from paychan.protocol.channel import Close, CloseByPayment, CloseReason, Published, Signed, State
from paychan.protocol.errors import ChainUnavailable, OutpointUsed
from paychan.protocol.payment import sign_payment
from paychan.protocol.types import OutPoint, Sat
from paychan.signer_client.base import SignerAbsent, SignerRefused
from tests.lib.channels import private_key, step
from tests.lib.ledger import MemoryLedger
from tests.lib.world import Clock, DebugPayer, Local, accepted, local, refused

PAYER = DebugPayer("restored")
ELSEWHERE = key_script(private_key("another address").public_key.format())
PAID_SAT = 10_000


class ForgetfulChain(DebugChain):
    """A chain that loses broadcast transactions: no mempool has the settlements."""

    async def publish(self, transaction: bytes, child: bytes = b"") -> None:
        """Drop it."""


def closing_elsewhere(paid_sat: int) -> CloseByPayment:
    payment = sign_payment(
        PAYER.key, PAYER.terms, PAYER.outpoint, PAYER.funding_sat, ELSEWHERE, Sat(PAYER.funding_sat - paid_sat)
    )
    return CloseByPayment(payment, ELSEWHERE)


async def lived_on(place: Path, ledger: MemoryLedger, paid_sat: int = PAID_SAT, *, elsewhere: bool = False) -> None:
    """Open, back up, pay, close; then restore the backup. The network has no settlement."""
    async with local(place, ledger=ledger, chain=ForgetfulChain()) as server:
        await server.open(PAYER, PAID_SAT)
    shutil.copytree(place / "store", place / "backup")
    async with local(place, ledger=ledger, chain=ForgetfulChain()) as server:
        if paid_sat > PAID_SAT:
            accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(paid_sat)))
        how = closing_elsewhere(paid_sat) if elsewhere else Close(CloseReason.OPERATOR)
        accepted(await server.registry.ask(PAYER.outpoint, how))
    shutil.rmtree(place / "store")
    shutil.copytree(place / "backup", place / "store")


def change_of(server: Local) -> tuple[int, bytes]:
    """The change output of the broadcast settlement: satoshi and script."""
    (spend,) = {spend.txid for spend in server.chain.real._spends.values()}
    out = CTransaction.deserialize(server.chain.real._published[spend]).vout[0]
    return out.nValue, bytes(out.scriptPubKey)


@pytest.mark.parametrize("paid_sat", [PAID_SAT, 80_000])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same script", "other script"])
async def test_fault_03_the_newest_claim_is_adopted_and_settled(tmp_path: Path, paid_sat: int, elsewhere: bool) -> None:
    """The record adopts the signed payment and script; the settlement pays them, at any fee."""
    ledger = MemoryLedger()
    await lived_on(tmp_path, ledger, paid_sat, elsewhere=elsewhere)
    async with local(tmp_path, ledger=ledger) as server:
        await server.watcher.scan()
        record = await server.stored(PAYER)
        script = ELSEWHERE if elsewhere else PAYER.change_script
        assert (record.payment.change_sat, record.change_script) == (PAYER.funding_sat - paid_sat, script)
        assert record.state is State.CLOSED
        assert change_of(server) == (PAYER.funding_sat - paid_sat, script)


@pytest.mark.parametrize("fee_rate", [11, 90])
async def test_fault_03_an_adopted_claim_is_settled_at_the_present_rate(tmp_path: Path, fee_rate: int) -> None:
    """The relay floor is above the settlement signed before the loss: a new one is signed at the floor."""
    ledger = MemoryLedger()
    await lived_on(tmp_path, ledger, 80_000)
    async with local(tmp_path, ledger=ledger) as server:
        floor = type(server.context.chain_view.fees)(floor_sat_per_vb=fee_rate)
        server.context.chain_view.fees = floor

        async def fees() -> object:
            return floor

        server.chain.real.fees = fees
        await server.watcher.scan()
        record = await server.stored(PAYER)
        assert record.state is State.CLOSED
        assert record.closing is not None
        assert record.closing.settlement is not None
        assert record.closing.settlement.fee_sat >= fee_rate * record.closing.settlement.size
        assert change_of(server)[0] == PAYER.funding_sat - 80_000


async def test_fault_04_no_payment_is_taken_that_the_signer_would_not_settle(tmp_path: Path) -> None:
    """The first payment after the start wakes the channel: it is refused, and the settled payment stays."""
    ledger = MemoryLedger()
    await lived_on(tmp_path, ledger, 80_000, elsewhere=True)
    async with local(tmp_path, ledger=ledger, chain=ForgetfulChain()) as server:
        assert isinstance(refused(await server.registry.ask(PAYER.outpoint, PAYER.pays(20_000))), ChainUnavailable)
        await server.watcher.scan()
        refused(await server.registry.ask(PAYER.outpoint, PAYER.pays(90_000)))
        assert (await server.stored(PAYER)).payment.change_sat == PAYER.funding_sat - 80_000
        assert not server.context.chain_view.unasked


async def test_fault_04_without_the_signer_an_open_channel_waits_after_a_start(tmp_path: Path) -> None:
    """Only the signer knows; while it is away, payments get 503, and they count again once it has answered."""
    async with local(tmp_path) as server:
        await server.open(PAYER)
    async with local(tmp_path) as server:
        server.signer.fail("behind", SignerAbsent("asleep"))
        await server.watcher.scan()
        assert isinstance(refused(await server.registry.ask(PAYER.outpoint, PAYER.pays(20_000))), ChainUnavailable)
        server.signer.heal("behind")
        await server.watcher.scan()
        accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(20_000)))
        asked = server.signer.calls["behind"]
        await server.watcher.scan()
        assert server.signer.calls["behind"] == asked


async def test_fault_04_a_close_to_another_address_after_a_restore_counts(tmp_path: Path) -> None:
    """The signer signed for the first address; the client's later close with the same change decides the address."""
    ledger = MemoryLedger()
    await lived_on(tmp_path, ledger)
    async with local(tmp_path, ledger=ledger) as server:
        server.context.chain_view.unasked.clear()
        server.signer.fail("behind", SignerAbsent("asleep"), 1)
        outcome = await server.registry.ask(PAYER.outpoint, closing_elsewhere(PAID_SAT))
        accepted(outcome)
        assert change_of(server) == (PAYER.funding_sat - PAID_SAT, ELSEWHERE)


async def test_fault_04_a_channel_that_the_store_lost_is_not_opened_again(tmp_path: Path) -> None:
    """The backup is older than the opening: no payment counts, and the signed settlement is broadcast."""
    ledger = MemoryLedger()
    await lived_on(tmp_path, ledger, 80_000)
    shutil.rmtree(tmp_path / "store")
    async with local(tmp_path, ledger=ledger) as server:
        assert isinstance(refused(await server.opener.open(PAYER.request())), OutpointUsed)
        assert change_of(server)[0] == PAYER.funding_sat - 80_000


async def test_fault_04_a_deep_refund_ends_a_channel_that_the_signer_refuses(tmp_path: Path) -> None:
    """CLOSING without a settlement: the refund is in the chain, so the channel becomes LOST and stops trying."""
    async with local(tmp_path, Clock()) as server:
        await server.open(PAYER)
        server.signer.fail("sign_settlement", SignerRefused("policy-x", "no"))
        refused(await server.registry.ask(PAYER.outpoint, Close(CloseReason.OPERATOR)))
        refund = CTransaction([CTxIn(COutPoint(PAYER.outpoint.txid, PAYER.outpoint.vout))], [CTxOut(1)])
        await server.chain.real.publish(refund.serialize())
        await server.registry.ask(PAYER.outpoint, Resume())
        record = await server.stored(PAYER)
        assert record.state is State.LOST
        assert record.closing is not None
        assert record.closing.spent_by == refund.GetTxid()


@pytest.mark.parametrize("is_shown", [False, True])
async def test_fault_03_an_older_settlement_leaves_a_newer_record_something_to_sign(
    tmp_path: Path, is_shown: bool
) -> None:
    """The signer signed a backup's payment, and saw the newest one later: the server requests a new settlement."""
    ledger = MemoryLedger()
    async with local(tmp_path / "backup", ledger=ledger, chain=ForgetfulChain()) as server:
        await server.open(PAYER, PAID_SAT)
        accepted(await server.registry.ask(PAYER.outpoint, Close(CloseReason.OPERATOR)))
    async with local(tmp_path / "live", ledger=ledger) as server:
        newest = PAYER.pay(PAYER.channel(PAID_SAT), 80_000 - PAID_SAT)
        await server.fill([step(newest, Close(CloseReason.OPERATOR))])
        if is_shown:
            assert not (await server.signer.show_newest([newest.claim])).refused
        for _ in range(2):
            await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.CLOSED
        assert change_of(server) == (PAYER.funding_sat - 80_000, PAYER.change_script)


async def test_fault_15_a_record_that_adopts_a_newer_payment_says_that_it_is_restored(tmp_path: Path) -> None:
    """A copied directory does not show that it is a copy; the application may know more payments than the signer."""
    ledger = MemoryLedger()
    async with local(tmp_path / "before", ledger=ledger) as server:
        await server.open(PAYER, PAID_SAT)
        newest = accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(80_000))).channel
        assert not (await server.signer.show_newest([newest.claim])).refused
    async with local(tmp_path / "copied", ledger=ledger) as server:
        await server.fill([PAYER.channel(PAID_SAT)])
        await server.watcher.scan()
        record = await server.stored(PAYER)
        assert (record.state, record.received_sat, record.restored) == (State.OPEN, 80_000, True)
        went_on = accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(90_000))).channel
        assert not went_on.restored


async def test_fault_11_a_withdrawal_under_way_in_the_backup_adopts_the_newest_claim(tmp_path: Path) -> None:
    """The change output received more after the backup: no payment there is accepted a second time."""
    mover, ledger, clock = DebugPayer("moves meanwhile", movable=True), MemoryLedger(), Clock()
    chain = DebugChain(clock)
    async with local(tmp_path / "before", clock, ledger=ledger, chain=chain) as server:
        await server.open(mover, 100_000)
        paid = accepted(await server.registry.ask(mover.outpoint, mover.pays(100_001))).channel
        accepted(await server.registry.ask(mover.outpoint, Close(CloseReason.WITHDRAW)))
        closing = (await server.stored(mover)).closing
        assert closing is not None
        assert closing.settlement is not None
        at = OutPoint(closing.settlement.txid, 0)
        moved = DebugPayer("moves meanwhile", funding_sat=paid.payment.change_sat, movable=True, at=at)
        newest = accepted(await server.registry.ask(at, moved.pays(80_000))).channel
        assert not (await server.signer.show_newest([newest.claim])).refused
    published = step(step(step(paid, Close(CloseReason.WITHDRAW)), Signed(closing.settlement)), Published())
    async with local(tmp_path / "after", clock, ledger=ledger, chain=chain) as server:
        await server.fill([published])
        await server.watcher.scan()
        assert (await server.stored(moved)).state is State.OPEN
        early = await server.registry.ask(at, moved.pays(50_000))
        assert isinstance(refused(early), ChainUnavailable)
        await server.watcher.scan()
        assert (await server.stored(moved)).received_sat == 80_000
        accepted(await server.registry.ask(at, moved.pays(81_000)))
