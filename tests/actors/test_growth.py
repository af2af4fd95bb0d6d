"""Memory does not grow with payments."""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path

import pytest

from paychan.protocol.channel import Pay
from paychan.protocol.payment import PaymentSigner
from paychan.protocol.types import Sat
from tests.lib.world import DebugPayer, Local, accepted, local

CHANNELS = 256
WARM = 20
PAYMENTS = 120
"""Payments per channel after the warm-up: 30,720 in total."""

MOST_BLOCKS = 1_500
"""Most additional memory blocks after them; if one in ten payments left one, there would be twice as many."""


class Client:
    """Pays one satoshi at a time."""

    def __init__(self, payer: DebugPayer) -> None:
        self.outpoint, self.change_sat = payer.outpoint, payer.funding_sat - 10_000
        self.signer = PaymentSigner(payer.key, payer.terms, payer.outpoint, payer.funding_sat, payer.change_script)

    async def pay(self, server: Local, number: int) -> None:
        for _ in range(number):
            self.change_sat -= 1
            payment = self.signer.payment(Sat(self.change_sat))
            assert accepted(await server.registry.ask(self.outpoint, Pay(payment))).value_sat == 1


async def blocks_after(server: Local, clients: list[Client], number: int) -> int:
    """Pay over all channels concurrently; return the number of memory blocks that Python has in use then."""
    await asyncio.gather(*(client.pay(server, number) for client in clients))
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.timeout(300)
async def test_thirty_thousand_payments_leave_nothing_in_memory(tmp_path: Path):
    """After 30,000 verified and synced payments Python has no more blocks in use than before."""
    payers = [DebugPayer(f"growth {n}") for n in range(CHANNELS)]
    async with local(tmp_path) as server:
        await asyncio.gather(*map(server.open, payers))
        clients = [Client(payer) for payer in payers]
        before = await blocks_after(server, clients, WARM)
        after = await blocks_after(server, clients, PAYMENTS)

        assert (await server.stored(payers[0])).payments == WARM + PAYMENTS
        assert after - before < MOST_BLOCKS
