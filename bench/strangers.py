"""Measure what an anonymous client can cost: a row for each attack on a public interface, beside an honest payer.

    python bench/strangers.py [--json] [--against GIT_REV | --against RESULT.json] [--only NAME]

For each attack, its own server and signer run in debug mode with 1,024 files, on one core; attackers and the honest
payer are processes on another. First the attack runs alone: growth of the state directory until then counts as lasting
(without logs). Then it runs beside a payer that pays every 5 ms, and over a new connection every tenth time, with
latencies before, during and after. `--against` first runs the same on the tree of another commit, or takes its figures
from a stored result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import machine
import typer
from attacks import ATTACKS, Listeners
from funding import from_nothing
from honest import Honest
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from serve import Measured, cores, debug_server
from session import BenchError, generate

ROOT = Path(__file__).parents[1]
FILES = 1024

_ALONE_SECONDS = 1.0
_QUIET_SECONDS = 1.5
_BESIDE_SECONDS = 3.0
_RECOVERY_SECONDS = 10.0
_CALM = 3.0
"""The goal: under attack, an honest payer's p99 is at most this multiple of its quiet value.

Recovery means the same.
"""


class Row(Struct, kw_only=True):
    """Cost of one attack."""

    attack: str
    sent_per_second: int
    bytes_that_stay: int
    log_bytes: int
    signer_keys: int
    descriptors: int
    """Open connections during the attack, beyond those before."""
    descriptors_that_stay: int
    cpu_percent: int
    """Figure of the server while the attack ran alone."""
    quiet_p50_ms: float
    p50_ms: float
    quiet_p99_ms: float
    p99_ms: float
    honest_failures: int
    recovery_seconds: float | None
    """None: longer than ten seconds."""


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _files(measured: Measured) -> int:
    return measured.process.num_fds() if measured.process.is_running() else 0


def _audit_lines(directory: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in directory.rglob("*audit*") if path.is_file())


@contextmanager
def _attacking(listeners: Listeners, attack: Callable[[Listeners, Any], None]) -> Iterator[Any]:
    fork = multiprocessing.get_context("fork")
    count = fork.Value("l", 0)
    process = fork.Process(target=_attack, args=(listeners, attack, count), daemon=True)
    process.start()
    try:
        yield count
    finally:
        process.kill()
        process.join()


def _attack(listeners: Listeners, attack: Callable[[Listeners, Any], None], count: Any) -> None:
    os.sched_setaffinity(0, {cores()[1]})
    # the server is measured: on the clients' core the attacker runs only while the honest payer does not
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    attack(listeners, count)


def _p99(latencies: Sequence[float]) -> float:
    return quantiles(latencies, n=100)[98] if len(latencies) > 1 else float("inf")


def measure(name: str, tree: Path, log: Path) -> Row:
    """Run one attack against the programs of a tree."""
    with debug_server(log=log, files=FILES, tree=tree) as measured:
        state = measured.directory / "state"
        session = generate(measured.server, from_nothing(measured.server, None, 1, 2)[0], 1, 2)
        listeners = Listeners(measured.server, measured.management, session)
        with Honest(measured.server) as honest:
            honest.pay(0.5)  # warms up
            quiet = honest.pay(_QUIET_SECONDS)
        before, files, lines, logged = _size(state), _files(measured), _audit_lines(state), log.stat().st_size
        cpu = measured.cpu_seconds()
        with _attacking(listeners, ATTACKS[name]) as count:
            time.sleep(_ALONE_SECONDS)
            peak = _files(measured)
            cpu = measured.cpu_seconds() - cpu
            sent = count.value
        time.sleep(1.5)
        stays, keys = _size(state) - before, _audit_lines(state) - lines
        grown = log.stat().st_size - logged
        with Honest(measured.server) as honest:
            with _attacking(listeners, ATTACKS[name]):
                time.sleep(0.3)
                beside = honest.pay(_BESIDE_SECONDS)
            recovery = honest.recover(_RECOVERY_SECONDS, _CALM * _p99(quiet.latencies))
        return Row(
            attack=name,
            sent_per_second=round(sent / _ALONE_SECONDS),
            bytes_that_stay=stays,
            log_bytes=grown,
            signer_keys=keys,
            descriptors=peak - files,
            descriptors_that_stay=_files(measured) - files,
            cpu_percent=round(100 * cpu / _ALONE_SECONDS),
            quiet_p50_ms=round(1e3 * median(quiet.latencies), 2),
            p50_ms=round(1e3 * median(beside.latencies or [float("inf")]), 2),
            quiet_p99_ms=round(1e3 * _p99(quiet.latencies), 2),
            p99_ms=round(1e3 * _p99(beside.latencies), 2),
            honest_failures=beside.failures,
            recovery_seconds=recovery,
        )


@contextmanager
def tree_of(revision: str) -> Iterator[Path]:
    """Check out a commit beside this tree."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False)


def measure_all(names: Sequence[str], tree: Path) -> list[Row]:
    """Run all attacks, one after another."""
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as name:
        for number, attack in enumerate(names):
            print(f"{'now' if tree == ROOT else 'before'}: {attack}", file=sys.stderr)
            try:
                rows.append(measure(attack, tree, Path(name) / f"{number}.log"))
            except (BenchError, OSError, EOFError) as error:
                print(f"  failed: {error}", file=sys.stderr)
    return rows


COLUMNS = {
    "sent/s": "sent_per_second",
    "bytes stay": "bytes_that_stay",
    "log bytes": "log_bytes",
    "audit lines": "signer_keys",
    "files": "descriptors",
    "files stay": "descriptors_that_stay",
    "CPU %": "cpu_percent",
    "p50 quiet": "quiet_p50_ms",
    "p50": "p50_ms",
    "p99 quiet": "quiet_p99_ms",
    "p99": "p99_ms",
    "failed": "honest_failures",
    "recovery s": "recovery_seconds",
}


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Print rows."""
    shown = Table("attack", *COLUMNS, title=title)
    for row in rows:
        shown.add_row(row["attack"], *(str(row[column]) for column in COLUMNS.values()))
    return shown


def main(
    against: Annotated[str, typer.Option(help="A commit to measure first, or a stored result.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="Only these attacks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures for programs.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure what anonymous clients cost."""
    names, facts = only or list(ATTACKS), machine.facts()
    os.sched_setaffinity(0, {cores()[1]})
    figures: dict[str, Any] = {}
    if against.endswith(".json"):
        figures["before"] = json.loads(Path(against).read_text())["rows"]
    elif against:
        with tree_of(against) as tree:
            figures["before"] = [_plain(row) for row in measure_all(names, tree)]
    figures["rows"] = [_plain(row) for row in measure_all(names, ROOT)]
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        console = Console(width=200)
        if "before" in figures:
            console.print(table(figures["before"], f"before ({against})"))
        console.print(table(figures["rows"], "now"))
    if save:
        print(f"Saved as {machine.save('strangers', figures | {'against': against}, facts)}", file=sys.stderr)


def _plain(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Row.__struct_fields__}


if __name__ == "__main__":
    typer.run(main)
