"""Measure the settlements per second of a whole `paychan-signer`: checked, put in the ledger, synced, logged, signed.

    python bench/signing.py [--settlements 4000] [--connections 64] [--token]

Every run is compared with units that are measured before, between and after its ten parts: R, and with `--token` the
raw rate of one thread that only calls the token's library. A machine's speed changes by a third within seconds, so only
figures of one run belong together, and the run that counts is shown whole.

Every settlement belongs to a channel of its own. The benchmark opens the channels beforehand like a server: it asks for
the key and shows the funding transaction. Each connection sends its next request after the answer to the one before.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from hashlib import sha256
from pathlib import Path
from statistics import mean, quantiles
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine
import psutil  # type: ignore[import-untyped]  # has no stubs
import tokens
import typer
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from coincurve import PrivateKey
from rest import PARTS, share
from rich.console import Console
from rich.progress import track
from rich.table import Table

from paychan.protocol.address import key_script
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import sign_payment
from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    FundingReply,
    FundingRequest,
    KeyReply,
    KeyRequest,
    Reply,
    Request,
    SettlementReply,
    SettlementRequest,
    decode_reply,
    encode_frame,
    frame_size,
)
from tests.lib.softhsm import SoftHsm

COMMAND = Path(sys.executable).with_name("paychan-signer")
EXPIRY = UnixTime(1_900_000_000)
FUNDING_SAT = 1_000_000
CHANGE_SAT = 400_000
FEE_SAT = 5_000
START_SECONDS = 30.0
SLICE_SECONDS = 0.2

Keys = Callable[[Path], tuple[str, dict[str, str]]]
"""Prepares keys in a directory; returns the signer's configuration and environment."""


def software(_: Path) -> tuple[str, dict[str, str]]:
    """Make a seed, as in a default installation."""
    return 'network = "regtest"\n[key]\nmode = "hardened"\ncreate_if_missing = true\n', {}


def token(directory: Path) -> tuple[str, dict[str, str]]:
    """Make keys in a new SoftHSM token: one for all channels, since making a key takes longer than 100 signatures."""
    made = SoftHsm(directory / "token")
    return made.signer_config + 'keys = "one"\n', made.environment


class Connection:
    """One connection of a client that waits for each answer."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._arrived = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, number: int, frame: bytes) -> None:
        self.number, self.begun = number, time.perf_counter()
        self._socket.sendall(frame)

    def answer(self) -> bytes | None:
        """Return the answer once it is complete."""
        self._arrived += self._socket.recv(1 << 16) or sys.exit("the signer has ended")
        if len(self._arrived) < 4 or len(self._arrived) < 4 + frame_size(self._arrived[:4]):
            return None
        whole, self._arrived = self._arrived[4:], b""
        return whole

    def close(self) -> None:
        self._socket.close()


class Clients:
    """Several connections that send requests in turn; on epoll, since they share the machine with the signer."""

    def __init__(self, path: Path, count: int) -> None:
        self._poll = select.epoll()
        self._connections = {each.fileno(): each for each in (Connection(path) for _ in range(count))}
        for number in self._connections:
            self._poll.register(number, select.EPOLLIN)

    def ask_all(self, frames: Sequence[bytes]) -> tuple[list[bytes], list[float], float]:
        """Send all requests; return answers, their latencies and the whole time, in seconds."""
        answers, latencies = [b""] * len(frames), [0.0] * len(frames)
        waiting, left, begun = iter(enumerate(frames)), len(frames), time.perf_counter()
        for connection, (number, frame) in zip(self._connections.values(), waiting, strict=False):
            connection.ask(number, frame)
        while left:
            for descriptor, _ in self._poll.poll():
                connection = self._connections[descriptor]
                answer = connection.answer()
                if answer is None:
                    continue
                left -= 1
                answers[connection.number] = answer
                latencies[connection.number] = time.perf_counter() - connection.begun
                following = next(waiting, None)
                if following is not None:
                    connection.ask(*following)
        return answers, latencies, time.perf_counter() - begun

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._poll.close()


def answered(path: Path, requests: Sequence[Request], kind: type[Reply]) -> list[Any]:
    """Send requests before the clock starts, and check every answer."""
    with closing(Clients(path, 16)) as clients:
        answers, _, _ = clients.ask_all([encode_frame(request) for request in requests])
    replies = [decode_reply(answer) for answer in answers]
    wrong = [reply for reply in replies if not isinstance(reply, kind)]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(replies)} were refused: {wrong[0]}")
    return replies


def open_channels(path: Path, count: int) -> list[SettlementRequest]:
    """Open channels like a server; return the settlement requests to measure."""
    clients = [PrivateKey(sha256(b"client %d" % number).digest()) for number in range(count)]
    asked = [KeyRequest(1, client.public_key.format(), EXPIRY) for client in clients]
    keys = answered(path, asked, KeyReply)
    requests, shown = [], []
    for number, client in enumerate(track(clients, "signing payments", transient=True)):
        reply = keys[number]
        terms = make_terms(reply.server_key, client.public_key.format(), EXPIRY)
        funding = CTransaction(
            [CTxIn(COutPoint(bytes(32), number))], [CTxOut(FUNDING_SAT, CScript(terms.funding_script))]
        )
        shown.append(FundingRequest(1, funding.serialize(), (0,)))
        outpoint, script = OutPoint(bytes(funding.GetTxid()), 0), key_script(client.public_key.format())
        payment = sign_payment(client, terms, outpoint, Sat(FUNDING_SAT), script, Sat(CHANGE_SAT))
        claim = Claim(terms, outpoint, Sat(FUNDING_SAT), script, payment)
        requests.append(SettlementRequest(1, (claim,), reply.destination_script, Sat(FEE_SAT)))
    answered(path, shown, FundingReply)
    return requests


def start(directory: Path, keys: Keys) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a signer and wait until its socket answers."""
    file, path = directory / "signer.toml", directory / "signer.sock"
    text, environment = keys(directory)
    file.write_text(
        f'state_dir = "{directory}"\n{text}[policy]\nrequests_per_second = 1000000\nkeys_per_second = 1000000\n'
    )
    with (directory / "signer.log").open("wb") as log:
        process = subprocess.Popen([COMMAND, file], stdout=log, stderr=log, env=os.environ | environment)
    deadline = time.monotonic() + START_SECONDS
    with socket.socket(socket.AF_UNIX) as probe:
        while probe.connect_ex(str(path)):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                sys.exit((directory / "signer.log").read_text())
            time.sleep(0.02)
    return process, path


def measure(
    keys: Keys, directory: Path, settlements: int, connections: int, units: dict[str, Callable[[], float]]
) -> dict[str, Any]:
    """Measure one run with its own signer, in parts; the units are measured before, between and after them."""
    process, path = start(directory, keys)
    try:
        frames = [encode_frame(request) for request in open_channels(path, settlements)]
        signer = psutil.Process(process.pid)
        watched = [signer, *signer.children()]
        answers, latencies, seconds, cpu = list[bytes](), list[float](), 0.0, 0.0
        measured = {name: [unit()] for name, unit in units.items()}
        with closing(Clients(path, connections)) as clients:
            for part in range(PARTS):
                before = cpu_seconds(watched)
                got, took, passed = clients.ask_all(share(frames, part))
                cpu += cpu_seconds(watched) - before
                answers, latencies, seconds = answers + got, latencies + took, seconds + passed
                for name, unit in units.items():
                    measured[name].append(unit())
    finally:
        process.terminate()
        process.wait()
    signed = sum(isinstance(decode_reply(answer), SettlementReply) for answer in answers)
    if signed != settlements:
        sys.exit(f"{settlements - signed} of {settlements} were refused")
    marks, rate = quantiles(latencies, n=100), settlements / seconds
    compared = {name: mean(slices) for name, slices in measured.items()}
    return {
        "per_second": rate,
        "cpu_us": 1e6 * cpu / settlements,
        "p50_ms": 1e3 * marks[49],
        "p99_ms": 1e3 * marks[98],
        **compared,
        **{f"share_of_{name}": rate / value for name, value in compared.items()},
    }


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """Return the CPU time of the signer and of its token's process together."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


@contextmanager
def raw_rates() -> Iterator[Callable[[], float]]:
    """Return the signatures per second of a SoftHSM token in this process: C_SignInit and C_Sign, one thread."""
    with tokens.soft_token() as config:
        keys = tokens.opened(config)
        yield lambda: tokens.raw_rate(keys, threads=1, seconds=SLICE_SECONDS)


def median_run(results: Sequence[dict[str, Any]], share: str) -> dict[str, Any]:
    """Return the run with the median share; of two, the lower one."""
    return sorted(results, key=lambda result: result[share])[(len(results) - 1) // 2]


def bench(
    settlements: Annotated[int, typer.Option(help="settlements in a run")] = 4000,
    connections: Annotated[int, typer.Option(help="connections to the signer")] = 64,
    runs: Annotated[int, typer.Option(help="runs, of which the one with the median share counts")] = 3,
    in_token: Annotated[bool, typer.Option("--token", help="keys in a SoftHSM token")] = False,
) -> None:
    """Measure the settlements per second of a signer."""
    facts, console = machine.facts(), Console()
    units: dict[str, Callable[[], float]] = {"R": lambda: machine.mean_verifies(SLICE_SECONDS)[0]}
    results = []
    with ExitStack() as cleanup:
        if in_token:
            units["raw"] = cleanup.enter_context(raw_rates())
        for _ in range(runs):
            directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
            keys = token if in_token else software
            results.append(measure(keys, directory, settlements, connections, units))
    counted = median_run(results, f"share_of_{[*units][-1]}")
    figures = {name: round(value, 3) for name, value in counted.items()}
    name = "SoftHSM" if in_token else "software"
    table = Table("keys", "settlements/s", *(f"share of {unit}" for unit in units), "CPU µs", "p50 ms", "p99 ms")
    table.title = ", ".join(f"{unit} = {figures[unit]:,.0f}/s" for unit in units)
    table.add_row(
        name,
        f"{figures['per_second']:,.0f}",
        *(f"{figures[f'share_of_{unit}']:.3f}" for unit in units),
        *(f"{figures[each]:.1f}" for each in ("cpu_us", "p50_ms", "p99_ms")),
    )
    console.print(table)
    kept = {"keys": name, "connections": connections, "settlements": settlements, "runs": results, **figures}
    durability = "every watermark and log line synced before its signature leaves"
    path = machine.save("signing", {**kept, "durability": durability}, facts)
    console.print(f"[dim]{path}[/]")


if __name__ == "__main__":
    typer.run(bench)
