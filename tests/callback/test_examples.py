"""The receivers of the page run as printed there, in Flask and FastAPI, behind the real server."""

from __future__ import annotations

import base64
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from paychan.callback.signing import signature_headers
from paychan.protocol.types import UnixTime
from tests.lib.looped import looped
from tests.lib.rbpcp import V2, Payer, refusal
from tests.lib.readme import ROOT
from tests.lib.system import System

MOST_LINES = 15
PAGE = (ROOT / "paychan/callback/README.md").read_text()
COMMANDS = {
    "Flask": lambda port: ("flask", "--app", "receiver", "run", "--port", port),
    "FastAPI": lambda port: ("uvicorn", "receiver:app", "--port", port),
}


def example(name: str) -> str:
    """Return the program below a heading of the page."""
    return re.findall(r"(?ms)^```python\n(.*?)^```", PAGE.partition(f"### {name}\n")[2])[0]


class Receiver:
    """The program in a directory of its own, on a port that stays the same."""

    def __init__(self, directory: Path, name: str, key_file: Path) -> None:
        directory.mkdir()
        self.directory, self.key_file = directory, key_file
        (directory / "receiver.py").write_text(example(name))
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            self.port = place.getsockname()[1]
        self._command = [sys.executable, "-m", *COMMANDS[name](str(self.port))]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with (self.directory / "log").open("ab") as log:
            environment = {"CALLBACK_KEY_FILE": str(self.key_file), "PATH": ""}
            self._process = subprocess.Popen(self._command, cwd=self.directory, env=environment, stdout=log, stderr=log)
        until(self._listens)

    def _listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    @property
    def credit(self) -> dict[str, int]:
        """The sums that it has credited."""
        with sqlite3.connect(self.directory / "credit.db") as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'credit'").fetchone():
                return {}
            return dict(database.execute("SELECT channel, sat FROM credit"))


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(params=COMMANDS)
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Receiver, System]]:
    """The receiver, and a server that asks it."""
    key_file = tmp_path / "key"
    key_file.write_text(f"whsec_{base64.b64encode(bytes(range(32))).decode()}\n")
    key_file.chmod(0o600)
    receiver = Receiver(tmp_path / "receiver", request.param, key_file)
    receiver.start()
    settings = {"callback": f'url = "{receiver.url}"\ntimeout_seconds = 3\nkey_file = "{key_file}"'}
    try:
        with System(tmp_path / "system", sections=settings) as system:
            yield receiver, system
    finally:
        receiver.kill()


@looped("name", COMMANDS)
def test_an_example_is_short(name: str) -> None:
    """It has at most fifteen lines that are not blank."""
    assert len([line for line in example(name).splitlines() if line.strip()]) <= MOST_LINES


def test_fault_48_the_example_credits_the_total_and_refuses_a_forged_request(shop: tuple[Receiver, System]) -> None:
    """Each satoshi is credited once, also when receiver and server are killed; without a signature nothing is."""
    receiver, system = shop
    with httpx.Client(timeout=30) as http:
        v2 = V2(system.url, Payer(), http)
        name = str(v2.payer.outpoint)
        assert v2.open(v2.payer.payment(100_000)).status_code == 201
        until(lambda: receiver.credit == {name: 100_000})
        paid = v2.pay(v2.payer.payment(150_000))
        assert (paid.status_code, paid.json()["application_data"]) == (200, "thank you")
        assert receiver.credit == {name: 150_000}

        forged = {"channel_id": name, "received_sat": 10**12}
        for path in ("/value_received", "/channel_event"):
            assert http.post(receiver.url + path, json=forged).status_code == 401
        assert receiver.credit == {name: 150_000}

        receiver.kill()
        assert refusal(v2.pay(v2.payer.payment(170_000))) == (503, "payment_pending")
        system.restart_server()
        v2.url = system.url
        receiver.start()
        assert v2.pay(v2.payer.payment(170_000)).json()["value_received"] == 20_000
        assert receiver.credit == {name: 170_000}
        assert v2.close(v2.payer.payment(170_000)).status_code == 200
        until(lambda: not system.manage("GET", "/health").json()["alarms"])
        assert receiver.credit == {name: 170_000}
        log = (receiver.directory / "log").read_text()
        until(lambda: (receiver.directory / "log").read_text().count("POST /channel_event") >= 3)
        assert "Traceback" not in log


def test_the_page_s_verification_without_a_library_works() -> None:
    """It accepts either signature of a rotation, and refuses another body, an old time and another key."""
    program: dict[str, Callable[..., bool]] = {}
    exec(re.findall(r"(?ms)^```python\n(.*?)^```", PAGE.partition("\n## The signature\n")[2])[0], program)
    is_from_server = program["is_from_server"]
    old, new, other = (f"whsec_{base64.b64encode(bytes([n]) * 32).decode()}" for n in range(3))
    keys = [base64.b64decode(key.removeprefix("whsec_")) for key in (old, new)]
    now = UnixTime(int(time.time()))
    headers = signature_headers(keys, "name", now, b"{}")
    assert is_from_server(old, headers, b"{}")
    assert is_from_server(new, headers, b"{}")
    assert not is_from_server(other, headers, b"{}")
    assert not is_from_server(new, headers, b"[]")
    assert not is_from_server(new, headers | {"webhook-id": "another"}, b"{}")
    for wrong in (now - 301, now + 301):
        assert not is_from_server(new, signature_headers(keys, "name", UnixTime(wrong), b"{}"), b"{}")
