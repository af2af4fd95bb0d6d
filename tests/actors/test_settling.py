"""Settling: every step is durable before the next begins, and is repeated if a crash interrupts it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut

from actors.channel import Message, Resume
from paychan.chain.base import ChainFailed
from paychan.chain.debug import DebugChain
from paychan.protocol.channel import Channel, Close, CloseByProof, CloseReason, Outcome, State
from paychan.protocol.errors import ChannelLost, PublishFailed, SignerUnavailable, SigningFailed
from paychan.signer_client.base import SignerAbsent, SignerRefused
from tests.lib.world import Clock, DebugPayer, Local, accepted, local, refused, settled_down, until

PAYER = DebugPayer("settling")


def close(server: Local, reason: CloseReason = CloseReason.OPERATOR) -> asyncio.Future[Outcome]:
    return asyncio.ensure_future(server.registry.ask(PAYER.outpoint, Close(reason)))


def transaction(channel: Channel) -> CTransaction:
    """The signed settlement of a record."""
    assert channel.closing is not None
    assert channel.closing.settlement is not None
    return CTransaction.deserialize(channel.closing.settlement.transaction)


@pytest.mark.parametrize(
    ("part", "method", "failure", "error"),
    [
        ("signer", "public_key", SignerAbsent("asleep"), SignerUnavailable(reason="asleep")),
        ("signer", "sign_settlement", SignerAbsent("asleep"), SignerUnavailable(reason="asleep")),
        ("signer", "sign_settlement", SignerRefused("policy-x", "no"), SigningFailed(reason="policy-x: no")),
        ("chain", "publish", ChainFailed("no node"), PublishFailed(reason="no node")),
        ("chain", "spender", ChainFailed("no node"), PublishFailed(reason="no node")),
    ],
)
async def test_a_settlement_that_has_to_wait_is_resumed(
    tmp_path: Path, part: str, method: str, failure: Exception, error: Exception
):
    """Without signer or chain the client gets the reason, payments end, and the watcher finishes later."""
    async with local(tmp_path) as server:
        opened = await server.open(PAYER)
        faulty = getattr(server, part)
        faulty.fail(method, failure)
        assert refused(await server.registry.ask(PAYER.outpoint, CloseByProof(opened.payment))) == error
        assert (await server.stored(PAYER)).state in (State.CLOSING, State.PUBLISHED)
        refused(await server.registry.ask(PAYER.outpoint, PAYER.pays(10_001)))

        faulty.heal(method)
        await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.CLOSED
        assert transaction(await server.stored(PAYER)).vout[0].nValue == opened.payment.change_sat


async def test_a_draining_payment_counts_although_its_settlement_waits(tmp_path: Path):
    """A client that has paid everything gets the answer to its payment, although the settlement waits."""
    async with local(tmp_path) as server:
        await server.open(PAYER)
        server.signer.fail("sign_settlement", SignerAbsent("asleep"))
        outcome = accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(PAYER.funding_sat)))

        assert (outcome.value_sat, outcome.channel.state) == (PAYER.funding_sat - 10_000, State.CLOSING)
        assert (await server.stored(PAYER)).state is State.CLOSING


CUTS = {
    "closing stored": ("chain", "spender", 0, State.CLOSING, False),
    "looked for one": ("signer", "sign_settlement", 0, State.CLOSING, False),
    "signed stored": ("chain", "publish", 0, State.CLOSING, True),
    "published stored": ("chain", "spender", 1, State.PUBLISHED, True),
}


@pytest.mark.parametrize("keeps_chain", [True, False], ids=["chain remembers", "chain forgets"])
@pytest.mark.parametrize("cut", CUTS)
async def test_after_a_crash_at_any_step_the_watcher_finishes(tmp_path: Path, cut: str, keeps_chain: bool):
    """A process that dies between two steps leaves a record from which the next one continues the same settlement."""
    part, method, passed, state, signed = CUTS[cut]
    chain = DebugChain(Clock())
    async with local(tmp_path, chain=chain) as server:
        opened = await server.open(PAYER)
        getattr(server, part).hold(method, after=passed)
        close(server)
        await until(lambda: getattr(server, part).calls[method] == passed + 1)
        before = await server.stored(PAYER)
    assert before.state is state
    assert before.closing is not None
    assert (before.closing.settlement is not None) is signed

    async with local(tmp_path, chain=chain if keeps_chain else DebugChain(Clock())) as server:
        await server.watcher.scan()
        after = await server.stored(PAYER)
    assert after.state is State.CLOSED
    assert transaction(after).vout[0].nValue == opened.payment.change_sat
    if signed:
        assert transaction(after) == transaction(before)


@pytest.mark.parametrize("written", [0, 1, 2, 3])
async def test_a_step_whose_write_is_cut_off_is_taken_again(tmp_path: Path, written: int):
    """After a crash in the write of a step, the next process repeats the step with the same transaction."""
    chain = DebugChain(Clock())
    async with local(tmp_path, chain=chain) as server:
        await server.open(PAYER)
        server.store.hold("commit", after=written)
        close(server)
        await until(lambda: server.store.calls["commit"] == 1 + written + 1)
    async with local(tmp_path, chain=chain) as server:
        accepted(await server.registry.ask(PAYER.outpoint, Close(CloseReason.OPERATOR)))
        await server.watcher.scan()
        stored = await server.stored(PAYER)
        spent = await chain.spender(PAYER.outpoint)
    assert stored.state is State.CLOSED
    assert spent is not None
    assert spent.txid == transaction(stored).GetTxid()


async def test_threat_35_nothing_is_signed_before_closing_is_durable(tmp_path: Path):
    """While the step to CLOSING is being written, the signer is not asked (threat 35)."""
    async with local(tmp_path) as server:
        await server.open(PAYER)
        server.store.hold("commit")
        closing = close(server)
        await until(lambda: server.store.calls["commit"] == 2)
        await settled_down()

        assert server.signer.calls["sign_settlement"] == 0
        server.store.release("commit")
        accepted(await closing)


async def test_nothing_is_published_before_the_signature_is_durable(tmp_path: Path):
    """While the signed settlement is being written, it is not broadcast."""
    async with local(tmp_path) as server:
        await server.open(PAYER)
        server.signer.hold("sign_settlement")
        closing = close(server)
        await until(lambda: server.signer.calls["sign_settlement"])
        server.store.hold("commit")
        server.signer.release("sign_settlement")
        await until(lambda: server.store.calls["commit"] == 3)
        await settled_down()

        assert server.chain.calls["publish"] == 0
        server.store.release("commit")
        accepted(await closing)


async def test_concurrent_callers_share_one_settlement(tmp_path: Path):
    """Operator and watcher, twice each at once, cause one signature and one broadcast."""
    async with local(tmp_path) as server:
        await server.open(PAYER)
        server.signer.hold("sign_settlement")
        closing = close(server)
        await until(lambda: server.signer.calls["sign_settlement"])
        others = [asyncio.ensure_future(server.registry.ask(PAYER.outpoint, Resume())) for _ in range(2)]
        await settled_down()
        server.signer.release("sign_settlement")
        outcomes = await asyncio.gather(closing, *others)

        assert [accepted(outcome).channel for outcome in outcomes] == [await server.stored(PAYER)] * 3
        assert server.signer.calls["sign_settlement"] == 1
        assert server.chain.calls["publish"] == 1


async def test_a_funding_output_that_a_refund_spent_is_lost(tmp_path: Path):
    """If the refund was faster, the channel becomes LOST and names the transaction that took the coins."""
    chain = DebugChain(Clock())
    refund = CTransaction(
        [CTxIn(COutPoint(PAYER.outpoint.txid, PAYER.outpoint.vout))], [CTxOut(1_000, PAYER.change_script)]
    )
    await chain.publish(refund.serialize())
    async with local(tmp_path, chain=chain) as server:
        await server.open(PAYER)
        lost = accepted(await close(server)).channel

        assert lost.state is State.LOST
        assert lost.closing is not None
        assert lost.closing.spent_by == refund.GetTxid()
        assert isinstance(refused(await server.registry.ask(PAYER.outpoint, PAYER.pays(10_001))), ChannelLost)


async def test_a_settlement_that_a_peer_changed_closes_the_channel(tmp_path: Path):
    """The node refuses the settlement because a changed one is deep: the channel is CLOSED, without a loop."""
    chain = DebugChain(Clock())
    async with local(tmp_path, chain=chain) as server:
        await server.open(PAYER)
        server.chain.fail("publish", ChainFailed("inputs are spent"))
        refused(await close(server))
        stored = await server.stored(PAYER)
        assert stored.state is State.CLOSING
        ours = transaction(stored)
        changed = CTransaction(ours.vin, ours.vout, nLockTime=1)
        await chain.publish(changed.serialize())

        await server.watcher.scan()

        closed = await server.stored(PAYER)
        assert closed.state is State.CLOSED
        assert closed.closing is not None
        assert closed.closing.spent_by == changed.GetTxid()


@pytest.mark.parametrize("again", [Close(CloseReason.OPERATOR), Resume()], ids=["close", "resume"])
async def test_threat_11_no_settlement_is_signed_before_the_closing_is_durable(tmp_path: Path, again: Message):
    """A second command finds the channel closing in memory; it waits for the disk as the first one does."""
    async with local(tmp_path) as server:
        await server.open(PAYER)
        server.store.hold("commit")
        both = [close(server)]
        await until(lambda: server.store.calls["commit"] == 2)
        both.append(asyncio.ensure_future(server.registry.ask(PAYER.outpoint, again)))
        await settled_down()

        assert server.signer.calls["sign_settlement"] == 0
        server.store.release("commit")
        assert {accepted(outcome).channel.state for outcome in await asyncio.gather(*both)} == {State.CLOSED}
        assert server.signer.calls["sign_settlement"] == 1
