"""Under an address-space limit the server refuses new work before memory ends; it keeps its records, and settles."""

from __future__ import annotations

import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from paychan.memory import LEAST_BYTES, RESERVE_BYTES, START_BYTES, Memory, group_limit, is_memory_error
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.streams import open_stream, pay_frame
from tests.lib.customer import wait_for
from tests.lib.rbpcp import V1, V2, Payer
from tests.lib.system import System

MEGABYTE = 1 << 20


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A server only for one test, which limits its memory while it runs."""
    with System(tmp_path) as running:
        yield running


def _process(system: System) -> int:
    assert system.server is not None
    return system.server.process.pid


def _limit(system: System, above_bytes: int | None) -> None:
    """Let the server's address space grow by `above_bytes` from now on; None: without limit."""
    process = _process(system)
    used = int(Path(f"/proc/{process}/statm").read_text().split()[0]) * resource.getpagesize()
    most = resource.RLIM_INFINITY if above_bytes is None else used + above_bytes
    resource.prlimit(process, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


class Clients:
    """Threads that open channels and pay, with a new connection for each channel, and count the answers."""

    def __init__(self, url: str, number: int = 12) -> None:
        self.answers: Counter[int] = Counter()
        self.codes = set[str]()
        self.broken = 0
        self.paid: dict[str, int] = {}
        self.without_time = 0
        self._url = url
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(number)]

    def run(self, seconds: float, most_seconds: float = 0) -> None:
        """Run for `seconds`, and then until a request was refused, at most for `most_seconds`."""
        ends = time.monotonic() + most_seconds
        for thread in self._threads:
            thread.start()
        time.sleep(seconds)
        while not self.answers[503] and time.monotonic() < ends:
            time.sleep(0.1)
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self) -> None:
        while not self._stopped.is_set():
            with httpx.Client(trust_env=False, timeout=30, verify=False) as http:
                v1 = V1(self._url, Payer(), http)
                try:
                    if not self._noted(v1.open(v1.payer.payment(100_000))):
                        time.sleep(0.01)
                        continue
                    self.paid[str(v1.payer.outpoint)] = 100_000
                    for paid in range(100_001, 100_011):
                        if self._noted(v1.pay(v1.payer.payment(paid))):
                            self.paid[str(v1.payer.outpoint)] = paid
                except httpx.TransportError:
                    self.broken += 1

    def _noted(self, answer: httpx.Response) -> bool:
        self.answers[answer.status_code] += 1
        if answer.status_code == 503:
            self.codes.add(answer.json()["code"])
        self.without_time += answer.status_code == 503 and "Retry-After" not in answer.headers
        return answer.is_success


def _is_quiet(system: System) -> None:
    assert system.server is not None
    assert system.server.process.poll() is None, system.server.text()[-3000:]
    assert "Traceback" not in system.server.text()
    assert system.server.text().count("\n") < 200


@pytest.mark.parametrize("above_bytes", [3 * MEGABYTE, RESERVE_BYTES + MEGABYTE // 2])
def test_fault_84_new_work_is_refused_before_memory_ends(system: System, above_bytes: int) -> None:
    """12 threads get answers or 503 with Retry-After; the log stays short; answered payments are stored."""
    with httpx.Client(trust_env=False, timeout=30, verify=False) as http:
        before = V1(system.url, Payer(), http)
        assert before.open(before.payer.payment(100_000)).status_code == 201
        _limit(system, above_bytes)
        if above_bytes < RESERVE_BYTES:  # the server reads how much is left once a second
            wait_for(lambda: system.manage("GET", "/health").json()["frozen"] != [], "frozen")
        clients = Clients(system.url)
        clients.run(2, 60)

        assert set(clients.answers) <= {200, 201, 503}
        assert clients.answers[503] > 0
        assert clients.without_time == 0
        assert clients.broken == 0
        if above_bytes < RESERVE_BYTES:
            assert set(clients.answers) == {503}
        _is_quiet(system)
        health = httpx.get(f"{system.management_url}/health", trust_env=False, verify=False)
        if above_bytes < RESERVE_BYTES:
            assert clients.codes == {"memory_low"}
            assert (health.status_code, health.json()["alarms"]) == (
                503,
                [{"kind": "memory", "critical": above_bytes < LEAST_BYTES}],
            )
            assert health.json()["frozen"] == (["memory_low"] if above_bytes < LEAST_BYTES else [])
        where = str(before.payer.outpoint).replace(":", "/")
        assert system.manage("POST", f"/channels/{where}/close").json()["status"] != "open"
        assert system.manage("POST", "/backups").status_code in (201, 500, 503)
        for outpoint, paid in clients.paid.items():
            assert system.channel(outpoint)["value_received"] == paid
        _is_quiet(system)

    _limit(system, None)
    time.sleep(0.1)
    with httpx.Client(trust_env=False, timeout=30, verify=False) as http:
        after = V1(system.url, Payer(), http)
        assert after.open(after.payer.payment(100_000)).status_code == 201


def test_fault_84_streams_and_payments_go_on_where_only_new_work_is_refused(system: System) -> None:
    """Between the two bounds, channels that are awake accept payments by PUT and by stream; new work is refused."""
    with httpx.Client(trust_env=False, timeout=30, verify=False) as http:
        v2 = V2(system.url, Payer(), http, Dialect.S)
        assert v2.open(v2.payer.payment(100_000)).status_code == 201
        with open_stream(v2) as stream:
            _limit(system, (LEAST_BYTES + RESERVE_BYTES) // 2)
            time.sleep(0.1)
            assert len(pay_frame(stream, [v2.payer.payment(100_001)])) == 1
            assert v2.pay(v2.payer.payment(100_002)).status_code == 200
            fresh = V1(system.url, Payer(), http)
            refused = fresh.open(fresh.payer.payment(100_000))
            assert (refused.status_code, refused.json()["code"]) == (503, "memory_low")
            assert "bytes" not in refused.text
        assert v2.close(v2.payer.payment(100_003)).status_code == 200
    _is_quiet(system)


@pytest.mark.parametrize(("kind", "megabytes"), [(resource.RLIMIT_AS, 150), (resource.RLIMIT_DATA, 120)])
def test_fault_84_no_start_with_too_little_memory(tmp_path: Path, kind: int, megabytes: int) -> None:
    """A limit below which no request could be served ends the start with status 2 and both numbers."""
    system = System(tmp_path, limits={kind: megabytes * MEGABYTE})
    with (
        pytest.raises(AssertionError, match=f"MB are left below the limit, want {START_BYTES // MEGABYTE} MB or more"),
        system,
    ):
        pass
    assert system.server is not None
    assert system.server.process.wait(30) == 2
    assert "serving" not in system.server.text()


@pytest.mark.parametrize(("kind", "megabytes"), [(resource.RLIMIT_AS, 300), (resource.RLIMIT_DATA, 250)])
def test_fault_84_a_server_that_starts_under_a_limit_serves(tmp_path: Path, kind: int, megabytes: int) -> None:
    """Stacks and arenas of threads don't use up the address space: payments are taken, and nothing is alarmed about."""
    with (
        System(tmp_path, limits={kind: megabytes * MEGABYTE}) as system,
        httpx.Client(trust_env=False, verify=False) as http,
    ):
        client = V1(system.url, Payer(), http)
        assert client.open(client.payer.payment(100_000)).status_code == 201
        assert client.pay(client.payer.payment(100_001)).status_code == 200
        health = system.manage("GET", "/health")
        assert (health.status_code, health.json()["alarms"]) == (200, [])


def test_fault_84_when_memory_ends_the_process_ends(tmp_path: Path) -> None:
    """Without free memory the server either continues to refuse, or it ends with a status that is not 0."""
    with System(tmp_path) as system:
        _limit(system, 0)
        clients = Clients(system.url, 4)
        clients.run(2)
        assert system.server is not None
        status = system.server.process.poll()
        assert set(clients.answers) <= {503}
        assert status is None or status != 0
        assert system.server.text().count("Traceback") <= 1


def test_fault_84_an_end_of_memory_is_seen_behind_other_errors() -> None:
    """A MemoryError is found as the cause of other exceptions; a thread that can't start counts as one."""
    first, then = MemoryError(), ValueError("wrapped")
    then.__cause__ = first
    assert is_memory_error(then)
    assert is_memory_error(RuntimeError("can't start new thread"))
    assert not is_memory_error(ValueError("other"))


def test_memory_that_was_freed_counts_half() -> None:
    """Half of the memory that disconnected clients used counts as free, because the process keeps it for reuse."""
    memory = Memory(lambda: taken[0])
    taken = [100 * MEGABYTE]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 1000 * MEGABYTE, hard))
    try:
        crowded = memory.left()
        taken[0] = 0
        time.sleep(0.03)
        alone = memory.left()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        memory.close()
    assert 40 * MEGABYTE < alone - crowded < 60 * MEGABYTE


def test_the_least_limit_of_the_groups_holds(tmp_path: Path) -> None:
    """The memory limit is the smaller of the control group's limit and its parent's."""
    group = tmp_path / "fs" / "a" / "b"
    group.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    assert group_limit(tmp_path / "fs", own) is None
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("5000\n")
    assert group_limit(tmp_path / "fs", own) == 5000
    (group / "memory.max").write_text("400\n")
    assert group_limit(tmp_path / "fs", own) == 400
