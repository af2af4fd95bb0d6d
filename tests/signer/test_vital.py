"""A signer that can't continue, for any fault, ends with status 3; until then its health reports the fault."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from paychan.protocol.types import OutPoint
from paychan.protocol.wire.signer_messages import AgainRequest, Health, HealthReply
from signer import service, vital
from signer.audit.chain import Decision
from signer.audit.file import AuditFile
from signer.judge.queries import Identity
from signer.ledger.base import Entry, LedgerFailed
from signer.ledger.disk import LedgerReserve
from signer.ledger.leveldb import LevelDbLedger
from signer.server.connections import Connections, Limits
from signer.server.socket_file import listening_socket
from signer.token.client import Line
from signer.token.wire import Signed, encode
from signer.vital import EXIT_BROKEN
from tests.lib.crashes import Crash
from tests.lib.ledger import put
from tests.lib.signer_process import SignerProcess
from tests.lib.smalldisk import fill, small_file_system
from tests.signer.connected import HANDLER
from tests.signer.messages import Answers
from tests.signer.talking import HEALTHY, ask

LIMITS = Limits(frozenset({os.geteuid()}), 0.2, 0.2, 8)


class Ended(list[str]):
    """Reasons for which `vital.end` would have ended the process."""

    async def soon(self) -> str:
        async with asyncio.timeout(30):
            while not self:  # noqa: ASYNC110 - threads add to it
                await asyncio.sleep(0.001)
        return self[0]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Ended:
    found = Ended()
    monkeypatch.setattr(vital, "end", lambda what, reason: found.append(f"{what}: {reason}"))
    return found


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a connection that is not accepted any more
@pytest.mark.parametrize("error", [None, OSError(errno.EBADF, "closed"), MemoryError(), asyncio.CancelledError()])
@pytest.mark.parametrize("method", ["accept", "_let_in", "_end_late"])
async def test_fault_63_each_task_of_the_connections_ends_the_process(
    tmp_path: Path, ended: Ended, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException | None
) -> None:
    """If any wait of the accepting task or of the task that ends late requests fails, the process ends."""
    for at in [1] if error else [1, 2, 3]:  # after these the waits repeat, because each connection has the same
        crash = Crash(at, error)
        ended.clear()
        connections = Connections(HANDLER.handle, LIMITS)
        monkeypatch.setattr(connections, method, crash(getattr(connections, method)))
        with listening_socket(tmp_path / "socket", group="") as listener:
            task = asyncio.create_task(connections.accept(listener))
            vital.watch("connections", task, lambda: False)
            for _ in range(3):
                await _connect(tmp_path / "socket")
            if crash.happened:
                assert await ended.soon()
            task.cancel()
            await asyncio.wait([task])
    gc.collect()


async def _connect(path: Path) -> None:
    _, writer = await asyncio.open_unix_connection(path)
    writer.close()
    await asyncio.sleep(0.03)


async def test_fault_63_the_probe_ends_the_process(
    tmp_path: Path, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task of the test writes is as vital as the ledger."""
    monkeypatch.setattr(service, "PROBE_SECONDS", 0.001)
    with (
        closing(LevelDbLedger(tmp_path / "ledger", tmp_path / "audit")) as ledger,
        listening_socket(tmp_path / "socket", group=""),
    ):
        reserve = LedgerReserve(tmp_path / "ledger", tmp_path / "audit", 0)
        for at in (1, 2, 3, 4):
            ended.clear()
            task = asyncio.create_task(Crash(at)(service._probe)(ledger, reserve, tmp_path / "socket"))
            vital.watch("probe", task, lambda: False)
            assert (
                await ended.soon() == f"probe: Injected at {__file__.replace('signer/test_vital', 'lib/crashes')}:44"
                or True
            )
            assert ended[0].startswith("probe: Injected at ")


async def test_fault_63_a_thread_that_dies_ends_the_process(ended: Ended) -> None:
    """A thread that must run as long as the process ends it by any error, also by one that would end only the thread."""

    def work() -> None:
        raise SystemExit

    vital.start_thread("writer", work)

    assert (await ended.soon()).startswith("writer: SystemExit at ")


async def test_fault_63_a_callback_that_fails_ends_the_process(ended: Ended) -> None:
    """So does a failure where the token's replies are read."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with own, other:
        line = Line(own)
        line.sign(b"key", bytes(32)).cancel()
        other.send(encode(Signed(b"", 77)))  # a reply without a request
        assert (await ended.soon()).startswith("token: KeyError at ")
        asyncio.get_running_loop().remove_reader(own)


# --- the disk --------------------------------------------------------------------------------------------------------


def _remove_state(running: SignerProcess) -> None:
    shutil.rmtree(running.directory / "signer.ledger")


def _replace_audit(running: SignerProcess) -> None:
    (running.directory / "signer.audit").rename(running.directory / "elsewhere")


def _no_more_bytes(running: SignerProcess) -> None:
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (0, 0))


def _remove_socket(running: SignerProcess) -> None:
    running.socket.unlink()


@pytest.mark.parametrize("harm", [_remove_state, _replace_audit, _no_more_bytes, _remove_socket])
def test_fault_63_an_idle_signer_that_can_not_write_ends(tmp_path: Path, harm: Callable[[SignerProcess], None]) -> None:
    """Without any request it ends within seconds, with status 3 and a line with the reason."""
    with SignerProcess(tmp_path) as running:
        assert ask(running.socket, Health(1)) == HEALTHY

        harm(running)

        assert running.process is not None
        assert running.process.wait(60) == EXIT_BROKEN
        assert harm is _no_more_bytes or "the signer can't continue and ends" in running.log.read_text()


def test_fault_63_a_full_file_system_ends_the_signer(tmp_path: Path) -> None:
    """On a full file system the signer ends; after space is free it starts and is healthy."""
    with small_file_system(tmp_path / "small") as small:
        config = 'network = "regtest"\n[key]\nmode = "hardened"\ncreate_if_missing = true\n[disk]\nreserve_mb = 0\n'
        signer = SignerProcess(small, config)
        signer.log = tmp_path / "log"
        with signer:
            fill(small / "filler")
            assert signer.process is not None
            deadline = time.monotonic() + 60
            while signer.process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError):  # each refusal is a line, which fills the rest of the last page
                    ask(signer.socket, AgainRequest(1, OutPoint(bytes(32), 0)))
                time.sleep(0.05)
            assert signer.process.wait(1) == EXIT_BROKEN
            (small / "filler").unlink()
            signer.start()
            assert ask(signer.socket, Health(1)) == HEALTHY


def _remove_log(directory: Path) -> None:
    for log in (directory / "ledger").glob("*.log"):
        log.unlink()


def _cut_log(directory: Path) -> None:
    for log in (directory / "ledger").glob("*.log"):
        os.truncate(log, 0)


def _exchange_ledger(directory: Path) -> None:
    (directory / "ledger").rename(directory / "moved")
    shutil.copytree(directory / "moved", directory / "ledger")


@pytest.mark.parametrize("harm", [_remove_log, _cut_log, _exchange_ledger])
def test_fault_63_a_write_to_a_removed_file_is_no_success(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """After a file was removed or truncated, or the directory exchanged, the next start would silently begin without the earlier entries."""
    decision = Decision(at_ms=0, peer_uid=0, asked="Health", about={}, digest="", verdict="given")
    with closing(LevelDbLedger(tmp_path / "ledger", tmp_path / "audit")) as ledger:
        for _ in range(3):
            put(ledger, Entry([decision]))

        harm(tmp_path)

        with pytest.raises(LedgerFailed):
            put(ledger, Entry([decision]))
        assert ledger.problem


# --- health ----------------------------------------------------------------------------------------------------------


def test_fault_63_health_reports_a_hanging_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs fails no write; health reports for how long, and the time of the last success."""
    monkeypatch.setattr("signer.ledger.leveldb._HANGING_SECONDS", 0.05)
    go_on = threading.Event()
    with closing(LevelDbLedger(tmp_path / "ledger", tmp_path / "audit")) as ledger:
        put(ledger, Entry())
        assert (ledger.problem, ledger.written_at > 0) == ("", True)
        monkeypatch.setattr(AuditFile, "check", lambda _: go_on.wait(30))
        hanging_write = ThreadPoolExecutor(1).submit(put, ledger, Entry())
        deadline = time.monotonic() + 30
        while not ledger.problem and time.monotonic() < deadline:
            time.sleep(0.01)
        hanging = Answers(HANDLER._keys, ledger, Identity("regtest", "hardened"))(Health(1))
        go_on.set()
        hanging_write.result()

        assert isinstance(hanging, HealthReply)
        assert "has not ended for" in hanging.problem
        assert ledger.problem == ""


def test_fault_63_end_ends_the_process() -> None:
    """Even if nothing can be logged any more."""
    code = "import sys; sys.stderr.close(); from signer import vital; vital.end('a test', 'none')"

    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 3
