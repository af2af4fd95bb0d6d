"""`paychan gateway` and `paychan pay`, as a newcomer types them: from a service without a price to a paid request."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.lib.system import Daemon

PAYCHAN = Path(sys.executable).parent / "paychan"


def test_a_service_is_sold_by_one_command_and_paid_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command prints the gateway's URL and the command that pays it; that command gets the service's answer."""
    from tests.gateway.upstream import Upstream

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    upstream = Upstream()
    configured = subprocess.run([PAYCHAN, "init", "debug", "shop"], capture_output=True, text=True, check=False)
    assert configured.returncode == 0, configured.stderr
    server = tmp_path / "shop" / "server.toml"
    server.write_text(server.read_text() + "\n[http]\nport = 0\n[management]\nport = 0\n")
    selling = Daemon(
        tmp_path / "log", "paychan", "gateway", upstream.url, "--price", "25", "--config", "shop", "--port", "0"
    )
    try:
        ends = time.monotonic() + 90
        while not (found := re.search(r"Next +.*paychan (pay \S+) --open", selling.text())):
            assert selling.process.poll() is None, selling.text()
            assert time.monotonic() < ends
            time.sleep(0.05)
        for left in ("975", "950"):
            paid = subprocess.run(
                [PAYCHAN, *found[1].split(), "--open", "--max", "25"], capture_output=True, text=True, check=False
            )
            assert paid.returncode == 0, paid.stderr
            assert '"path": "/"' in paid.stdout
            assert re.search(rf"Paid 25 sat to \S+; \S+,{left} sat are left", paid.stderr)
        subprocess.run(
            [PAYCHAN, *found[1].split(), "--max", "25", "--receipt", "receipt.json"], check=True, capture_output=True
        )
        identity = re.search(r"identity=(\w{66})", selling.text())
        assert identity is not None
        verified = subprocess.run(
            [PAYCHAN, "receipt", "verify", "receipt.json", "--identity", identity[1]],
            capture_output=True,
            text=True,
            check=False,
        )
        assert verified.returncode == 0, verified.stderr
        assert "25 sat" in verified.stdout
        gateway = found[1].removeprefix("pay ").rstrip("/")
        assert httpx.get(f"{gateway}/openapi.json").status_code == 200  # though the one price is for every path
        too_dear = subprocess.run(
            [PAYCHAN, *found[1].split(), "--max", "24"], capture_output=True, text=True, check=False
        )
        assert too_dear.returncode == 1
        assert "25" in too_dear.stderr
        assert "24" in too_dear.stderr
    finally:
        selling.stop()
        upstream.stop()
    assert len(upstream.calls) == 3


def test_options_that_belong_together_are_missed(tmp_path: Path) -> None:
    """A service without a price, or a price without a service, is an error that shows both."""
    for options in (["--gateway", "http://127.0.0.1:1"], ["--price", "3"]):
        ended = subprocess.run(
            [PAYCHAN, "up", "debug", *options], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert ended.returncode == 2
        assert "--gateway http://127.0.0.1:5000 --price 25" in ended.stderr
