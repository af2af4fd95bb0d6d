"""A task shows the newest payments to the signer; no work waits for it, and no failure ends it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from actors.settling import showing
from actors.settling.showing import Showing
from paychan.protocol.types import OutPoint
from paychan.signer_client.base import SignerAbsent, SignerRefused
from paychan.supervisor import Supervisor
from tests.lib.channels import Payer
from tests.lib.crashes import each_wait
from tests.lib.ledger import MemoryLedger
from tests.lib.world import DebugPayer, Local, local


def ledger_of(server: Local) -> MemoryLedger:
    ledger = server.signer.real._handler._ledger
    assert isinstance(ledger, MemoryLedger)
    return ledger


def known(server: Local) -> dict[OutPoint, int]:
    """The signer's knowledge of channels: the most change that it allows for each."""
    return {outpoint: claim.payment.change_sat for outpoint, claim in ledger_of(server).payments.items()}


async def test_fault_73_only_grown_payments_are_shown(tmp_path: Path):
    """A round shows the newest payment of each open channel; without new payments it sends no request."""
    async with local(tmp_path) as server:
        shows = Showing(server.context, 1, pause_seconds=0)
        first, second = DebugPayer("first"), DebugPayer("second")
        for payer in (first, second):
            await server.open(payer, 10_000)
        await shows.round()
        assert known(server) == {each.outpoint: each.funding_sat - 10_000 for each in (first, second)}
        assert server.signer.calls["show_newest"] == 1

        await shows.round()
        assert server.signer.calls["show_newest"] == 1
        await server.registry.ask(first.outpoint, first.pays(25_000))
        await shows.round()
        assert known(server)[first.outpoint] == first.funding_sat - 25_000
        assert server.signer.calls["show_newest"] == 2


async def test_fault_73_many_channels_are_shown_in_batches(tmp_path: Path):
    """No message has more than one batch, and other tasks run between two messages."""
    async with local(tmp_path) as server:
        payers = [DebugPayer(f"payer {number}") for number in range(showing.BATCH + 3)]
        await server.fill([payer.channel(paid_sat=10_000) for payer in payers])

        await Showing(server.context, 1, pause_seconds=0).round()

        assert server.signer.calls["show_newest"] == 2
        assert len(known(server)) == len(payers)


async def test_fault_73_a_signer_that_is_away_gets_it_later(tmp_path: Path):
    """Neither absence nor a refusal ends the task; the next round shows the payments that are still missing."""
    async with local(tmp_path) as server:
        payer = DebugPayer("a")
        await server.open(payer)
        supervisor = Supervisor()
        server.signer.fail("show_newest", SignerAbsent("away"), times=2)
        task = supervisor.run("payments shown", Showing(server.context, 0.001).run)
        await until_known(server, payer)
        server.signer.fail("show_newest", SignerRefused("protocol-message", "another version"), times=2)
        await server.registry.ask(payer.outpoint, payer.pays(25_000))
        async with asyncio.timeout(20):
            while known(server)[payer.outpoint] != payer.funding_sat - 25_000:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert task.restarts == 0
        await supervisor.close()


async def until_known(server: Local, payer: Payer) -> None:
    async with asyncio.timeout(20):
        while payer.outpoint not in known(server):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_fault_73_killed_at_any_await_the_task_restarts(tmp_path: Path):
    """For a failure at any await, the payment is shown in the end."""
    for crash in each_wait():
        async with local(tmp_path / str(crash.at)) as server:
            payer = DebugPayer("a")
            await server.open(payer)
            supervisor = Supervisor()
            supervisor.run("payments shown", crash(Showing(server.context, 0.001, pause_seconds=0).run))
            await until_known(server, payer)
            await supervisor.close()
        if crash.at >= 6:  # the rounds repeat
            break
