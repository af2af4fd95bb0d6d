"""An operator moves the store, or restores a backup, while the server runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System

PAYCHAN = Path(sys.executable).with_name("paychan")
OPENING_SAT = 100_000


def restored(system: System, backup: Path) -> tuple[int, str]:
    """Run `paychan backup restore`; return its exit status and what it says."""
    command = [PAYCHAN, "backup", "restore", system.server_file, backup]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={"COLUMNS": "400"})
    return done.returncode, done.stdout + done.stderr


def test_a_restore_beside_a_running_server_is_refused(tmp_path: Path) -> None:
    """The refusal names the process, with the store in its place and with the store moved away."""
    with System(tmp_path) as system:
        backup = Path(system.manage("POST", "/backups").json()["path"])
        assert system.server is not None
        in_use = f"is in use by process {system.server.process.pid} ("
        store, moved = system.state / "store", system.state / "store.old"

        assert in_use in restored(system, backup)[1]
        store.rename(moved)
        status, said = restored(system, backup)
        assert (status, in_use in said, store.exists()) == (1, True, False)

        system.kill_server()
        assert (system.state / "running.json").exists()
        status, said = restored(system, backup)
        assert (status, store.exists()) == (0, True), said


def test_a_restore_refuses_a_store_in_use_without_running_json(tmp_path: Path) -> None:
    """A server that does not listen yet has no running.json: the lock of its store is enough."""
    with System(tmp_path) as system:
        backup = Path(system.manage("POST", "/backups").json()["path"])
        (system.state / "running.json").unlink()
        status, said = restored(system, backup)
        assert (status, "is in use by process" in said) == (1, True), said


def test_a_server_whose_store_was_moved_acknowledges_no_payment(tmp_path: Path) -> None:
    """Another store takes the place of the open one: a payment would be written where no start finds it."""
    with System(tmp_path) as system, httpx.Client(verify=False) as http:
        payer = Payer()
        channel = V1(system.url, payer, http)
        assert channel.open(payer.payment(OPENING_SAT)).status_code == 201
        assert channel.pay(payer.payment(OPENING_SAT + 1)).status_code == 200

        store = system.state / "store"
        store.rename(system.state / "store.old")
        shutil.copytree(system.state / "store.old", store)
        with pytest.raises(httpx.TransportError):  # the server ends at once
            channel.pay(payer.payment(OPENING_SAT + 2))

        assert system.server is not None
        assert system.server.process.wait(30) == 3
        assert "moved away from its path" in system.server.text()
