"""A backup is taken from a running server; later the store is lost, and the backup is restored."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.lib.system import System

_PAYCHAN = Path(sys.executable).with_name("paychan")


def back_up(system: System) -> Path:
    """Take a backup of the running server."""
    answer = system.manage("POST", "/backups")
    assert answer.status_code in (200, 201), answer.text
    return Path(answer.json()["path"])


def lose_and_restore(system: System, backup: Path) -> None:
    """Kill the server, delete its store, restore the backup, and start the server on the same port."""
    port = system.url.rsplit(":", 1)[1]
    text = system.server_file.read_text()
    system.server_file.write_text(text.replace("[http]\nport = 0", f"[http]\nport = {port}"))
    system.kill_server()
    shutil.rmtree(system.state / "store")
    command = [_PAYCHAN, "backup", "restore", system.server_file, backup]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    system.start_server()
