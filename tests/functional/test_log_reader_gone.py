"""A log that cannot be written: lines are lost and counted, and server, signer and `up` continue."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from paychan.running import read_running
from paychan.shared.logsink import LogSink
from tests.lib.system import SERVER, SIGNER, System

BIN = Path(sys.executable).parent


def closed_pipe() -> int:
    """A pipe whose reader has closed it."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_pipe() -> int:
    """A full pipe that no process reads; the test process keeps the reading end open."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        pass
    os.set_blocking(writer, True)
    os.set_inheritable(reader, False)
    return writer


def full_socket() -> int:
    """A socket like that of systemd's journal when it hangs."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    try:
        while True:
            theirs.send(b"x" * 4096)
    except BlockingIOError:
        pass
    theirs.setblocking(True)
    ours.detach()
    return theirs.detach()


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


KINDS = {"closed pipe": closed_pipe, "full pipe": full_pipe, "full socket": full_socket, "full disk": full_disk}


@contextmanager
def process(
    output: int | None, command: str, *arguments: str, errors: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PORT": ""}
    hook = (lambda: os.close(2)) if output is None else None
    run = subprocess.Popen(
        [BIN / command, *arguments],
        stdout=output,
        stderr=errors or output,
        env=environment,
        preexec_fn=hook,  # noqa: PLW1509
    )
    try:
        yield run
    finally:
        run.send_signal(signal.SIGTERM)
        try:
            run.wait(30)
        finally:
            run.kill()
            if output is not None:
                os.close(output)


def serving(state: Path) -> dict[str, object]:
    """Return the server's health as the operator sees it, once it listens."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        running = read_running(state)
        if running is not None:
            try:
                token = (state / "management.token").read_text()
                headers = {"Authorization": f"Bearer {token}"}
                answer = httpx.get(
                    f"{running.management_url}/health", headers=headers, timeout=5, trust_env=False, verify=False
                )
            except (httpx.HTTPError, OSError):
                pass
            else:
                return dict(answer.json())
        time.sleep(0.05)
    msg = "does not serve"
    raise AssertionError(msg)


@pytest.mark.parametrize("kind", [*KINDS, "no descriptor"])
def test_fault_27_a_log_that_can_not_be_written_delays_no_scan(tmp_path: Path, kind: str) -> None:
    """Whatever kind of log server and signer cannot write to, scans continue and due channels are settled."""
    state = tmp_path / "state"
    (tmp_path / "signer.toml").write_text(SIGNER.format(state=state))
    text = SERVER.format(state=state) + '[watcher]\ninterval_seconds = 0.2\n[log]\nlevel = "debug"\n'
    (tmp_path / "server.toml").write_text(text)
    make = KINDS.get(kind, lambda: None)
    with (
        process(make(), "paychan-signer", str(tmp_path / "signer.toml")),
        process(make(), "paychan", "serve", str(tmp_path / "server.toml")) as server,
    ):
        before = serving(state)
        os.kill(server.pid, signal.SIGHUP)  # each signal writes a line to the log
        os.kill(server.pid, signal.SIGHUP)
        deadline = time.monotonic() + 30
        while True:
            after = serving(state)
            watcher = next(task for task in after["tasks"] if task["name"] == "watcher")  # type: ignore[attr-defined]
            if after["watcher_last_look"] > before["watcher_last_look"]:  # type: ignore[operator]
                break
            assert time.monotonic() < deadline, after
            time.sleep(0.1)
        assert watcher["restarts"] == 0
        assert server.poll() is None
        assert after["signer"] == "debug"
        if kind in ("closed pipe", "full disk"):
            assert after["log_lines_lost"] > 0  # type: ignore[operator]
            assert "log" in [alarm["kind"] for alarm in after["alarms"]]  # type: ignore[attr-defined]


def test_fault_27_lost_lines_are_reported_when_the_log_works_again(tmp_path: Path) -> None:
    """A slow reader gets the lines that fit the buffer, and then the number of lost lines."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    sink = LogSink(writer)
    line = "event=" + "x" * 993 + "\n"
    for _ in range(1200):
        sink.write(line)
    assert 150 < sink.lost < 250
    assert sink.failing

    got = b""
    while sink.failing or b"log lines lost" not in got:
        got += os.read(reader, 65536)
        sink.flush()
    lines = got.decode().splitlines()
    assert lines.count(line[:-1]) + sink.lost == 1200
    assert f'event="log lines lost" lines={sink.lost}' in lines[-1]
    os.set_blocking(reader, False)
    assert os.get_blocking(writer), "other processes share this file description"


def test_fault_27_up_continues_without_a_reader(tmp_path: Path) -> None:
    """With `paychan up | head -1`, and stderr to a stopped reader, signer and server continue."""
    state = tmp_path / "state"
    (tmp_path / "signer.toml").write_text(SIGNER.format(state=state))
    (tmp_path / "server.toml").write_text(SERVER.format(state=state))
    with process(closed_pipe(), "paychan", "up", str(tmp_path), errors=full_pipe()) as up:
        assert serving(state)["signer"] == "debug"
        time.sleep(0.5)
        assert up.poll() is None


def test_fault_30_other_signals_do_not_end_the_processes(tmp_path: Path) -> None:
    """Server and signer survive SIGHUP, sent by log rotation or a closed terminal, and similar signals."""
    with System(tmp_path) as system:
        for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
            for daemon in (system.server, system.signer):
                assert daemon is not None
                daemon.process.send_signal(getattr(signal, name))
                deadline = time.monotonic() + 30
                while f"signal={name}" not in daemon.text():
                    assert daemon.process.poll() is None, daemon.text()
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
        assert system.manage("GET", "/health").status_code == 200
