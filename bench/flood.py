"""Measure the latency of honest payers, without and with a flood of payments with bad signatures.

    python bench/flood.py [--attackers N] [--reconnect]

Each attacker has a channel of its own and pays with signatures of another key, one at a time, until the server closes
its connection; then it opens the next one. With `--reconnect` it does so after each answer, which avoids the longer
delays. Attackers are one process beside the clients, on the core that the server does not use.
"""

from __future__ import annotations

import multiprocessing
import os
import selectors
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Annotated, Any

import load
import machine
import typer
from coincurve import PrivateKey
from funding import from_nothing
from rest import opened
from rich.console import Console
from rich.table import Table
from serve import Measured, cores, debug_server
from session import BenchError, Server, generate, request

from paychan.protocol.payment import Payment, encode_v1


def attack(server: Server, bad: list[bytes], reconnect: bool, core: int, count: Any) -> None:
    """Send bad payments without end, one at a time per attacker; the body of a process."""
    os.sched_setaffinity(0, {core})
    chosen = selectors.DefaultSelector()

    def begin(each: bytes) -> None:
        connection = socket.create_connection((server.host, server.port))
        chosen.register(connection, selectors.EVENT_READ, each)
        connection.sendall(each)

    for each in bad:
        begin(each)
    while True:
        for key, _ in chosen.select():
            connection: Any = key.fileobj
            try:
                if connection.recv(65536):
                    count.value += 1
                    if not reconnect:
                        connection.sendall(key.data)
                        continue
            except OSError:
                pass  # the connection counts as closed
            chosen.unregister(connection)
            connection.close()
            begin(key.data)


@contextmanager
def flood(measured: Measured, attackers: int, reconnect: bool) -> Iterator[Any]:
    """Run attackers against the server during the block; yields the number of answers they got."""
    bad = []
    for funded in from_nothing(measured.server, None, attackers, 1):
        session = opened(measured.server, generate(measured.server, funded, 1, 1))
        target = session.payments[0].split(b" ", 2)[1].decode().partition("?")[0]
        wrong = Payment(1_000, PrivateKey().sign(b"\x07" * 32, hasher=None), 0x83)  # type: ignore[arg-type]
        bad.append(request("PUT", f"{target}?payment={encode_v1(wrong)}", measured.server))
    fork = multiprocessing.get_context("fork")
    count = fork.Value("l", 0)
    process = fork.Process(target=attack, args=(measured.server, bad, reconnect, cores()[1], count), daemon=True)
    process.start()
    try:
        yield count
    finally:
        process.kill()
        process.join()


def main(
    attackers: Annotated[int, typer.Option(min=1, help="Connections that send bad signatures.")] = 32,
    reconnect: Annotated[bool, typer.Option("--reconnect", help="A new connection for each bad payment.")] = False,
    connections: Annotated[int, typer.Option(min=1, help="Good clients.")] = 32,
    payments: Annotated[int, typer.Option(min=1, help="Payments of each honest client.")] = 500,
    runs: Annotated[int, typer.Option(min=1, help="Runs of both kinds in turn; medians count.")] = 5,
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure the latency of honest payers without and with a flood of bad signatures."""
    facts, calm, flooded, bad = machine.facts(), [], [], []
    os.sched_setaffinity(0, {cores()[1]})
    try:
        with debug_server() as measured:
            load.run(measured, connections, max(1, payments // 10), 1, "keep-alive")  # warms up
            for _ in range(runs):
                calm.append(load.run(measured, connections, payments, 1, "keep-alive"))
                with flood(measured, attackers, reconnect) as count:
                    flooded.append(load.run(measured, connections, payments, 1, "keep-alive"))
                bad.append(count.value)
    except BenchError as error:
        Console(stderr=True, highlight=False).print(f"flood: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    table = Table("", "payments/s", "p50, ms", "p99, ms")
    names = ("payments_per_second", "latency_ms_p50", "latency_ms_p99")
    numbers = {}
    for kind, done in (("calm", calm), ("flooded", flooded)):
        numbers[kind] = {name: median(each[name] for each in done) for name in names}
        table.add_row(kind, *(f"{value:,}" for value in numbers[kind].values()))
    Console().print(table)
    ratio = median(b["latency_ms_p99"] / a["latency_ms_p99"] for a, b in zip(calm, flooded, strict=True))
    print(
        f"p99 under the flood: {ratio:.2f} times its value (median of {runs} pairs); {sum(bad):,} bad payments answered"
    )
    if save:
        kept = {
            "attackers": attackers,
            "reconnect": reconnect,
            "p99_ratio_median": round(ratio, 3),
            "bad_answered": bad,
            **numbers,
        }
        kept |= {"calm_runs": calm, "flooded_runs": flooded}
        print(f"Saved as {machine.save('flood' + ('-reconnect' if reconnect else ''), kept, facts)}")


if __name__ == "__main__":
    typer.run(main)
