"""Threat 35: payments during a close. No payment counts after CLOSING, and the settlement has all that count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from bitcoin.core import CTransaction

from paychan.protocol.channel import (
    Accepted,
    Close,
    CloseByPayment,
    CloseByProof,
    CloseReason,
    Command,
    Outcome,
    State,
)
from paychan.protocol.errors import Gone
from tests.lib.world import DebugPayer, Local, accepted, local, refused, settled_down

PAYMENTS = 4
FEE_SAT = 1_000

CLOSINGS: dict[str, Callable[[DebugPayer, int], Command]] = {
    "client shows the newest payment": lambda payer, paid: CloseByProof(payer.pays(paid).payment),
    "client pays a fee": lambda payer, paid: CloseByPayment(payer.pays(paid + FEE_SAT).payment),
    "operator": lambda *_: Close(CloseReason.OPERATOR),
    "expiry": lambda *_: Close(CloseReason.EXPIRY),
}

HELD = {
    "nothing": None,
    "the disk": ("store", "commit"),
    "the signer": ("signer", "sign_settlement"),
    "the network": ("chain", "publish"),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("closing", CLOSINGS)
async def test_threat_35_every_interleaving_of_payments_and_closing(tmp_path: Path, closing: str, held: str):
    """For each position of the close among the payments: those before it are settled, those after it do not count."""
    async with local(tmp_path) as server:
        for before in range(PAYMENTS + 1):
            payer = DebugPayer(f"{closing} after {before}, {held} waits")
            await server.open(payer, 10_000)
            paid, closed = await run(server, payer, CLOSINGS[closing], before, HELD[held])

            assert [accepted(outcome).value_sat for outcome in paid[:before]] == [10] * before
            assert all(isinstance(refused(outcome), Gone) for outcome in paid[before:])
            received = 10_000 + 10 * before + (FEE_SAT if closing == "client pays a fee" else 0)
            assert accepted(closed).channel.received_sat == received
            await check_settlement(server, payer, received)


async def run(
    server: Local,
    payer: DebugPayer,
    closing: Callable[[DebugPayer, int], Command],
    before: int,
    held: tuple[str, str] | None,
) -> tuple[list[Outcome], Outcome]:
    """Send payments with a close among them while one part of the server is blocked, then unblock it."""
    commands: list[Command] = [payer.pays(10_000 + 10 * n) for n in range(1, PAYMENTS + 1)]
    commands.insert(before, closing(payer, 10_000 + 10 * before))
    if held:
        getattr(server, held[0]).hold(held[1])
    outcomes = []
    for command in commands:
        outcomes.append(asyncio.ensure_future(server.registry.ask(payer.outpoint, command)))
        await settled_down()
    if held:
        getattr(server, held[0]).release(held[1])
    answers = await asyncio.gather(*outcomes)
    closed = answers.pop(before)
    return answers, closed


async def check_settlement(server: Local, payer: DebugPayer, received_sat: int) -> None:
    """The channel is closed, and the transaction in its record and on the chain pays the rest to the client."""
    stored = await server.stored(payer)
    assert stored.state is State.CLOSED
    assert stored.closing is not None
    assert stored.closing.settlement is not None
    transaction = CTransaction.deserialize(stored.closing.settlement.transaction)
    assert transaction.vout[0].nValue == payer.funding_sat - received_sat
    spend = await server.chain.spender(payer.outpoint)
    assert spend.txid == transaction.GetTxid()


@pytest.mark.parametrize("hops", range(0, 24, 2))
async def test_threat_35_a_payment_at_any_moment_of_closing(tmp_path: Path, hops: int):
    """A payment that arrives at any step of closing is either refused or part of the settlement."""
    payer = DebugPayer("any moment")
    async with local(tmp_path) as server:
        await server.open(payer, 10_000)
        closing = asyncio.ensure_future(server.registry.ask(payer.outpoint, Close(CloseReason.OPERATOR)))
        for _ in range(hops):
            await asyncio.sleep(0)
        outcome = await server.registry.ask(payer.outpoint, payer.pays(10_010))
        accepted(await closing)

        await check_settlement(server, payer, 10_010 if isinstance(outcome, Accepted) else 10_000)
