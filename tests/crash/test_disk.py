"""A disk that fails under the real server (threat 11): no request is answered for data that was not written."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest

from paychan.running import read_running
from tests.crash.customers import Crowd
from tests.lib.system import Daemon, System

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (tests/system-packages)")


def start_on_a_failing_disk(system: System, nth: int) -> Daemon:
    """Start the server so that the nth fdatasync of each of its threads fails; wait until it listens or has ended."""
    paychan = Path(sys.executable).with_name("paychan")
    trace = ("-f", "--seccomp-bpf", "-qq", "-o", str(system.directory / "trace"), "-e", "trace=fdatasync")
    inject = ("-e", f"inject=fdatasync:error=EIO:when={nth}")
    strace = str(shutil.which("strace"))
    system.server = Daemon(
        system.directory / "server.log", strace, *trace, *inject, str(paychan), "serve", str(system.server_file)
    )
    deadline = time.monotonic() + 30
    while (running := read_running(system.state)) is None and system.server.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    system.running = running
    return system.server


@pytest.mark.parametrize("nth", [9, 17, 60])
def test_threat_11_a_disk_error_ends_the_server_and_loses_nothing_answered(tmp_path: Path, nth: int):
    """If a sync fails, the server stops at once with status 3; the next one has every payment that was answered."""
    with System(tmp_path) as system:
        assert system.server is not None
        assert system.server.stop() == 0
        server = start_on_a_failing_disk(system, nth)
        crowd = Crowd(system)
        crowd.start(3)
        assert server.process.wait(60) == 3
        assert "store failed" in server.text()
        assert "EIO" in (tmp_path / "trace").read_text()

        crowd.pause()
        assert crowd.answers > 0
        system.start_server()
        crowd.check(all_histories=True)
        crowd.stop()


def test_a_disk_error_at_the_start_is_reported(tmp_path: Path):
    """If the store can't be created, the server reports it in one line and ends with status 2, before it listens."""
    system = System(tmp_path)
    system.start_signer()
    server = start_on_a_failing_disk(system, nth=1)
    status = server.process.wait(30)
    system.__exit__(None, None, None)

    assert status == 2
    assert system.running is None
    assert "can't be opened" in server.text()
    assert "Traceback" not in server.text()
