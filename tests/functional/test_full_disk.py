"""A full disk, on a small file system: payments stop in time, closing continues, and with room everything continues."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.functional.test_unsigned import System, wait_for
from tests.lib.ports import free_ports
from tests.lib.rbpcp import V1, Payer
from tests.lib.smalldisk import fill, small_file_system
from tests.lib.system import Daemon

RESERVE_MB = 8
FULL = (503, "storage_full")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", mib=32) as disk:
        yield disk


@pytest.fixture
def system(tmp_path: Path, disk: Path) -> Iterator[System]:
    """Put only the store on the small disk."""
    system = System(tmp_path / "system", sections={"store": f'path = "{disk}/store"\nreserve_mb = {RESERVE_MB}'})
    yield system
    system.__exit__(None, None, None)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("code", "")


def opened(system: System, http: httpx.Client) -> V1:
    client = V1(system.url, Payer(), http)
    answer = client.open(client.payer.payment(100_000))
    assert answer.status_code == 201, answer.text
    return client


def closes(client: V1) -> bool:
    answer = client.close(client.payer.payment(100_000))
    assert answer.status_code in (200, 202), answer.text
    return True


def test_fault_62_a_full_disk_has_space_for_settlements(system: System, disk: Path) -> None:
    """Below half of the reserve payments get 503; closing works without a free byte, also after a restart; room ends it."""
    filler = disk / "filler"
    with httpx.Client(timeout=30, trust_env=False, verify=False) as http, system:
        first, second, third, fourth = (opened(system, http) for _ in range(4))
        wait_for(lambda: (disk / "store.reserve").stat().st_blocks > 0, "reserve")
        assert (disk / "store.reserve").stat().st_blocks * 512 >= RESERVE_MB * 1_000_000 // 4

        fill(filler, leave_bytes=RESERVE_MB * 1_000_000 * 3 // 8)
        wait_for(lambda: system.manage("GET", "/health").status_code == 503, "full")
        assert code(first.pay(first.payer.payment(100_001))) == FULL
        health = system.manage("GET", "/health")
        assert "disk" in [alarm["kind"] for alarm in health.json()["alarms"]]
        newcomer = V1(system.url, Payer(), http)
        assert code(newcomer.open(newcomer.payer.payment(100_000))) == FULL
        assert closes(first)

        fill(disk / "more")
        assert closes(second)

        fill(disk / "most")
        assert free_bytes(disk) == 0
        system.restart_server()
        third.url = fourth.url = system.url
        assert code(third.pay(third.payer.payment(100_001))) == FULL
        assert closes(third)

        for file in (filler, disk / "more", disk / "most"):
            file.unlink()
        wait_for(lambda: fourth.pay(fourth.payer.payment(100_002)).status_code == 200, "payments resume")
        wait_for((disk / "store.reserve").exists, "reserve is made again")
        assert system.manage("GET", "/health").status_code == 200


@contextmanager
def filling(disk: Path) -> Iterator[None]:
    """Another program that takes every free byte at once, again and again."""
    ended = threading.Event()

    def take() -> None:
        with (disk / "eater").open("ab", buffering=0) as eater:
            while not ended.is_set():
                try:
                    eater.write(bytes(4096))
                except OSError:
                    time.sleep(0.0005)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_fault_62_every_channel_closes_while_another_program_takes_each_free_byte(system: System, disk: Path) -> None:
    """The reserve keeps its size while nothing needs it, gives little to each closing, and is filled up again."""
    with httpx.Client(timeout=30, trust_env=False, verify=False) as http, system:
        clients = [opened(system, http) for _ in range(12)]
        by_operator = clients.pop()
        reserve = disk / "store.reserve"
        wait_for(lambda: reserve.stat().st_size == RESERVE_MB * 1_000_000 // 4, "reserve")
        with filling(disk):
            wait_for(lambda: free_bytes(disk) == 0, "full")
            wait_for(lambda: system.manage("GET", "/health").status_code == 503, "the server sees it")
            assert reserve.stat().st_size == RESERVE_MB * 1_000_000 // 4
            for client in clients:
                assert closes(client)
            outpoint = by_operator.payer.outpoint
            closed = system.manage("POST", f"/channels/{outpoint.txid_hex}/{outpoint.vout}/close")
            assert closed.status_code in (200, 202), closed.text
            assert free_bytes(disk) == 0
            left = reserve.stat().st_size
            assert RESERVE_MB * 1_000_000 // 8 < left < RESERVE_MB * 1_000_000 // 4
        (disk / "eater").unlink()
        wait_for(lambda: reserve.stat().st_size == RESERVE_MB * 1_000_000 // 4, "reserve is filled up")
        wait_for(lambda: system.manage("GET", "/health").status_code == 200, "healthy")


def free_bytes(disk: Path) -> int:
    return os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize


def test_fault_26_a_start_without_disk_space_waits(system: System, disk: Path) -> None:
    """On a disk without a free byte the start waits: both ports answer 503 with the reason, and it continues with room."""
    with httpx.Client(timeout=30, trust_env=False, verify=False) as http:
        with system:
            client = opened(system, http)
        (disk / "store.reserve").unlink()
        fill(disk / "filler")
        text = system.server_file.read_text()
        ports = free_ports(2)
        for port in ports:
            text = text.replace("port = 0", f"port = {port}", 1)
        system.server_file.write_text(text)
        system.start_signer()
        system.server = Daemon(system.directory / "server.log", "paychan", "serve", str(system.server_file))
        url = f"http://127.0.0.1:{ports[0]}"
        wait_for(lambda: answers(http, url) == 503, "a waiting room")
        assert code(http.get(f"{url}/v1/fundingInfo")) == FULL
        assert http.get(f"{url}/x").headers["Retry-After"] == "5"
        assert http.get(f"http://127.0.0.1:{ports[1]}/health").status_code == 503
        (disk / "filler").unlink()
        client.url = url
        wait_for(lambda: answers(http, url) == 404, "served")
        wait_for(lambda: client.pay(client.payer.payment(100_001)).status_code == 200, "payments resume")
        assert "Traceback" not in system.server.text()


def answers(http: httpx.Client, url: str) -> int:
    try:
        return http.get(f"{url}/x").status_code
    except httpx.HTTPError:
        time.sleep(0.05)
        return 0
