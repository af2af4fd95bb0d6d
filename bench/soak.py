"""Make a million payments, and watch memory.

    python bench/soak.py [PAYMENTS]

One process without HTTP runs the real actors, group commit and LevelDB, over some channels that stay awake. Each
payment is really signed and verified, each group synced. Memory is read a hundred times. The result is its growth from
the thirtieth reading to the last: the first 200,000 of a million payments fill LevelDB's two memory tables.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import machine
import typer
import uvloop
from coincurve import PrivateKey
from crowd import FAR, client, private_bytes, server
from rich.console import Console
from rich.progress import Progress
from serve import sync_ms

from actors.registry import Registry
from paychan.protocol.channel import Accepted, Channel, Pay
from paychan.protocol.payment import PaymentSigner
from paychan.protocol.types import Sat
from paychan.store.base import Change

READINGS, WARM = 100, 30


class Payer:
    """Pays one satoshi at a time over one channel."""

    def __init__(self, number: int) -> None:
        self.channel: Channel = client(number, FAR)[0]
        key, channel = PrivateKey(sha256(number.to_bytes(8, "big")).digest()), self.channel
        self._signer = PaymentSigner(key, channel.terms, channel.outpoint, channel.funding_sat, channel.change_script)
        self._change_sat = channel.payment.change_sat

    async def pay(self, registry: Registry, number: int) -> None:
        for _ in range(number):
            self._change_sat = Sat(self._change_sat - 1)
            outcome = await registry.ask(self.channel.outpoint, Pay(self._signer.payment(self._change_sat)))
            if not isinstance(outcome, Accepted) or outcome.value_sat != 1:
                raise RuntimeError(outcome)


async def run(directory: Path, payments: int, channels: int) -> dict[str, Any]:
    """Pay, and read the memory after each hundredth of the payments."""
    payers, each = [Payer(number) for number in range(channels)], -(-payments // (READINGS * channels))
    readings, begun = list[dict[str, int]](), time.perf_counter()
    async with server(directory) as (store, registry, _):
        await store.commit([Change(None, payer.channel) for payer in payers])
        with Progress(console=Console(stderr=True)) as progress:
            for done in progress.track(range(1, READINGS + 1)):
                await asyncio.gather(*(payer.pay(registry, each) for payer in payers))
                gc.collect()
                blocks = sys.getallocatedblocks()
                readings.append({"payments": done * each * channels, "blocks": blocks, "bytes": private_bytes()})
    warm, last = readings[WARM - 1], readings[-1]
    more = last["payments"] - warm["payments"]
    return {
        "channels": channels,
        "payments": last["payments"],
        "payments_per_second": round(last["payments"] / (time.perf_counter() - begun)),
        "grown_bytes": last["bytes"] - warm["bytes"],
        "grown_bytes_per_payment": round((last["bytes"] - warm["bytes"]) / more, 3),
        "grown_blocks": last["blocks"] - warm["blocks"],
        "grown_blocks_per_payment": round((last["blocks"] - warm["blocks"]) / more, 5),
        "readings": readings,
    }


def main(
    payments: Annotated[int, typer.Argument(min=10_000, help="Payments in all, rounded up.")] = 1_000_000,
    channels: Annotated[int, typer.Option(min=1, max=1_000, help="Channels, all awake.")] = 256,
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Make many payments, and report whether memory grows."""
    facts, before = machine.facts(), machine.verifies_per_second()
    with tempfile.TemporaryDirectory(dir=".") as name:  # on a disk; /tmp may be memory
        numbers = uvloop.run(run(Path(name) / "store", payments, channels))
        numbers["sync_ms_median"] = round(sync_ms(Path(name)), 3)
    rate = (before + machine.verifies_per_second()) / 2
    numbers |= {"R_verifies_per_second": round(rate), "share_of_R": round(numbers["payments_per_second"] / rate, 4)}
    warm = numbers["readings"][WARM - 1]
    print(f"{numbers['payments']:,} payments, {numbers['payments_per_second']:,}/s (clients in the same process)")
    print(
        f"from payment {warm['payments']:,} on: {numbers['grown_bytes']:+,} bytes of {warm['bytes']:,}, "
        f"{numbers['grown_blocks']:+,} blocks of Python's {warm['blocks']:,}"
    )
    if save:
        numbers["durability"] = "fdatasync before every answer, one for each group"
        print(f"Saved as {machine.save('soak', numbers, facts)}")


if __name__ == "__main__":
    typer.run(main)
