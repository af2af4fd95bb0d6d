"""Measure the CPU time of a payment: each part of the hot path alone, and all parts together without a network.

    python bench/costs.py

Figures are CPU time of one thread, the minimum of several rounds, so that other work on the machine hardly matters.
They are also given in signature verifications, a unit that is comparable between machines. The sum is less than the CPU
time of a server: system calls, the event loop and synced writes come on top, which `load.py` measures.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import machine
import typer
import uvloop
from coincurve import PrivateKey
from crowd import NOW, RULES, client
from rich.console import Console
from rich.table import Table
from session import Server, session_v1, session_v2

from actors.channel import ChannelActor, Payments
from actors.context import Context
from actors.group_commit import GroupCommit
from actors.registry import Registry
from paychan.api import v1, v2
from paychan.api.fast.payments import Payment as Asked
from paychan.api.fast.request_parser import RequestParser
from paychan.api.response_heads import laid_out
from paychan.chain.debug import DebugChain
from paychan.protocol.channel import Accepted, Pay
from paychan.protocol.payment import decode_v1, encode_v1
from paychan.protocol.record import encode_record
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Network
from paychan.protocol.wire.rbpcp import Dialect, read_v2_body
from paychan.signer_client.unix import UnixSigner
from paychan.store.base import Change
from paychan.store.leveldb.store import LevelDbStore

GROUP = 32
"""Payments per group commit: the number of connections in the published figures for whole servers."""


def microseconds(work: Callable[[], object], rounds: int = 7, seconds: float = 0.05) -> float:
    """Return the CPU time of one call in µs: the minimum of several rounds."""
    best, count = float("inf"), 50
    for _ in range(rounds):
        begun = time.thread_time()
        for _ in range(count):
            work()
        spent = time.thread_time() - begun
        best = min(best, spent / count)
        count = max(10, int(seconds / best))
    return best * 1e6


def parts() -> dict[str, Callable[[], object]]:
    """Return the parts of a payment by name, in the order in which they happen."""
    channel, following = client(1)
    server, reader = Server("127.0.0.1", 8000), RequestParser(8192, 4096)
    of_v1, of_v2 = (
        make(server, [channel.payment, following], channel.terms, channel.outpoint).payments[0]
        for make in (session_v1, session_v2)
    )
    text = encode_v1(following)
    body = of_v2.partition(b"\r\n\r\n")[2]
    key, kind = PrivateKey(b"\x01" * 32), channel.terms.kind
    hasher = kind.payment_preimage(channel.terms, channel.outpoint, channel.funding_sat, channel.change_script)
    digest = hasher.digest(following.change_sat)
    signature, public = key.sign(digest, hasher=None), key.public_key
    verifier = channel.verifier()
    context = Context(Network.TEST, RULES, 6, lambda: NOW, *[None] * 4)  # type: ignore[arg-type] # these members stay unused
    view, command = context.view(channel.outpoint), Pay(following)
    paid = apply(channel, command, view, verifier)
    assert isinstance(paid, Accepted)
    answer = v1.paid(paid)

    def read(raw: bytes) -> Asked:
        assert reader.read(raw) == len(raw)
        return Asked(reader, None)  # type: ignore[arg-type] # no answer is sent

    return {
        "v1: HTTP head, target, query": partial(read, of_v1),
        "v1: payment out of the query": lambda: Pay(decode_v1(text)),
        "v2: HTTP head, body, target, query": partial(read, of_v2),
        "v2: payment out of the JSON body": partial(read_v2_body, body),
        "sighash": partial(hasher.digest, following.change_sat),
        "verify": partial(public.verify, signature, digest, hasher=None),
        "machine, with sighash and verify": partial(apply, channel, command, view, verifier),
        "view of the world": partial(context.view, channel.outpoint),
        "record": partial(encode_record, paid.channel),
        "v1: result": partial(v1.paid, paid),
        "v2: result": partial(v2.paid, paid, Dialect.S),
        "HTTP head of the answer": partial(laid_out, answer, False),
    }


async def whole(directory: Path, groups: int = 60) -> dict[str, float]:
    """Actors, machine, group commit and LevelDB: CPU µs per payment of the loop's thread and of all threads."""
    store = LevelDbStore.open(directory, "bench")
    commits = GroupCommit(store, 0, print)
    signer = UnixSigner(directory / "no signer", 1.0)  # payments need no signer
    context = Context(Network.TEST, RULES, 6, lambda: NOW, store, commits, DebugChain(), signer)
    registry, made = Registry(context), [client(each) for each in range(groups * GROUP)]
    await store.commit([Change(None, channel) for channel, _ in made])
    for channel, _ in made:
        await registry.ask(channel.outpoint, Pay(channel.payment))
    asks = [(registry.find_awake(channel.outpoint), Pay(following)) for channel, following in made]
    thread, process = time.thread_time(), time.process_time()
    for begin in range(0, len(asks), GROUP):
        await _pay(asks[begin : begin + GROUP])
    numbers = {
        "actor, machine, commit: the loop": (time.thread_time() - thread) / len(asks) * 1e6,
        "actor, machine, commit: all threads": (time.process_time() - process) / len(asks) * 1e6,
    }
    await commits.close()
    await store.close()
    return numbers


async def _pay(asks: list[tuple[ChannelActor | None, Pay]]) -> None:
    left, done = len(asks), asyncio.get_running_loop().create_future()

    def answered(_answer: Payments) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set_result(None)

    for actor, command in asks:
        assert actor is not None
        actor.tell(Payments([command], answered))
    await done


def main(save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True) -> None:
    """Measure the parts of a payment."""
    facts, works = machine.facts(), parts()
    numbers = {name: microseconds(work) for name, work in works.items()}
    with tempfile.TemporaryDirectory(dir=".") as name:  # on a disk; /tmp may be memory
        numbers |= uvloop.run(whole(Path(name) / "store"))
    table = Table("part", "CPU µs", "in verifies")
    for name, each in numbers.items():
        table.add_row(name, f"{each:.2f}", f"{each / numbers['verify']:.3f}")
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)
    if save:
        print(f"Saved as {machine.save('costs', {'cpu_us': {k: round(v, 2) for k, v in numbers.items()}}, facts)}")


if __name__ == "__main__":
    typer.run(main)
