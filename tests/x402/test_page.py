"""The examples of `paychan/x402/README.md`, as written: a seller of ten lines, and a payer of ten lines."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from paychan.client import Payer
from tests.lib.readme import ROOT
from tests.x402.market import open_server

PAGE = (ROOT / "paychan/x402/README.md").read_text()
MOST_LINES = 10


def example(heading: str) -> str:
    """Return the program below a heading of the page."""
    return re.findall(r"(?ms)^```python\n(.*?)^```", PAGE.partition(f"## {heading}\n")[2])[0]


def test_the_examples_are_short_and_pay_each_other(tmp_path: Path) -> None:
    """Both have at most ten lines that are not blank; the payer prints what the seller answers."""
    for heading in ("Paying", "Selling"):
        assert len([line for line in example(heading).splitlines() if line.strip()]) <= MOST_LINES
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        shop_port = place.getsockname()[1]
    with open_server(tmp_path / "server") as (system, port):
        (tmp_path / "merchant.token").write_bytes((system.state / "merchant.token").read_bytes())
        (tmp_path / "shop.py").write_text(example("Selling").replace("8402", str(port)))
        (tmp_path / "payer.py").write_text(example("Paying").replace("5000", str(shop_port)))
        with Payer(system.url, wallet=tmp_path / "wallet") as payer:
            payer.channel_for(room_sat=1_000).release()
        command = [sys.executable, "-m", "uvicorn", "shop:app", "--port", str(shop_port)]
        with (tmp_path / "log").open("wb") as log:
            shop = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            with socket.socket() as client:
                while client.connect_ex(("127.0.0.1", shop_port)):
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            environment = {"PAYCHAN_WALLET": str(tmp_path / "wallet"), "PATH": ""}
            paid = subprocess.run(
                [sys.executable, "payer.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
        finally:
            shop.terminate()
            shop.wait()
    assert (paid.returncode, paid.stdout) == (0, '{"tile":5}\n'), paid.stderr
