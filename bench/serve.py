"""A server and its signer in debug mode for a benchmark: with their own store on a real disk, each on its own core."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import psutil  # type: ignore[import-untyped]  # has no stubs
from session import Server, stop

from paychan.running import read_running

_PATIENCE_SECONDS = 30.0

_SIGNER = """
network = "test"
debug = true
state_dir = "{state}"
[key]
mode = "debug"
[settlement]
destination_address = "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY"
"""

_SERVER = """
network = "test"
debug = true
state_dir = "{state}"
[chain]
backend = "debug"
[management]
port = 0
[http]
port = 0
{http}
"""


@dataclass(frozen=True)
class Measured:
    """A running server, its process, and the directory with its store."""

    server: Server
    process: psutil.Process
    directory: Path
    management: Server

    def cpu_seconds(self) -> float:
        """Return the server's CPU seconds so far, user and system, finer than the kernel's hundredths."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


_CORES = sorted(os.sched_getaffinity(0))
"""Cores of this process. They are read only once, since the process narrows its own share later."""


def cores() -> tuple[int, int]:
    """Return the server's core, and the cores of all other processes."""
    return _CORES[0], _CORES[-1]


@contextmanager
def debug_server(
    http: str = "", store: Path | None = None, log: Path | None = None, files: int = 0, tree: Path | None = None
) -> Iterator[Measured]:
    """Run a server alone on its core until the block ends; `http` are lines of TOML for that table.

    A `store` is moved to the server's state directory. `log` receives the output of server and signer. `files` is the
    server's limit of open files; 0 keeps the default. The programs come from `tree`; None means this one.
    """
    ours, others = cores()
    with tempfile.TemporaryDirectory(dir=".") as name:  # on a disk; /tmp may be memory
        directory = Path(name).resolve()
        state = directory / "state"
        if store is not None:
            state.mkdir(mode=0o700)
            store.rename(state / "store")
        (directory / "signer.toml").write_text(_SIGNER.format(state=state))
        (directory / "server.toml").write_text(_SERVER.format(state=state, http=http))
        signer = _start(others, log, 0, tree, "paychan-signer", str(directory / "signer.toml"))
        server = _start(ours, log, files, tree, "paychan", "serve", str(directory / "server.toml"))
        try:
            yield _wait_for(state, server, directory)
        finally:
            for process in (server, signer):
                process.terminate()
                process.wait()


def _start(
    core: int, log: Path | None, files: int, tree: Path | None, command: str, *arguments: str
) -> subprocess.Popen[bytes]:
    program: list[str | Path] = [Path(sys.executable).parent / command]
    if tree is not None:  # the entry point of that tree, which may have another name
        scripts = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]
        module, _, function = scripts[command].partition(":")
        program = [sys.executable, "-P", "-c", f"import sys; from {module} import {function}; sys.exit({function}())"]
    environment = os.environ if tree is None else {**os.environ, "PYTHONPATH": str(tree)}
    with log.open("ab") if log else nullcontext() as out:
        return subprocess.Popen(
            [*program, *arguments],
            stderr=out,
            env=environment,
            preexec_fn=partial(_confine, core, files),  # noqa: PLW1509
        )


def _confine(core: int, files: int) -> None:
    os.sched_setaffinity(0, {core})
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


def _wait_for(state: Path, process: subprocess.Popen[bytes], directory: Path) -> Measured:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        running = read_running(state)
        if running is not None and running.pid == process.pid:
            server, management = (_where(url) for url in (running.url, running.management_url))
            return Measured(server, psutil.Process(process.pid), directory, management)
        time.sleep(0.02)
    return stop("the server did not start")


def _where(url: str) -> Server:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return Server(host, int(port))


def sync_ms(directory: Path, times: int = 200) -> float:
    """Return the median time in ms that the disk takes to sync 4 kB at the end of a file."""
    taken = []
    with (directory / "sync").open("wb", buffering=0) as file:
        for _ in range(times):
            file.write(b"x" * 4096)
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - begun)
    return median(taken) * 1e3
