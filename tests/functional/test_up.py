"""`paychan up`: one command from a directory to a running server, and its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.functional.upprocess import SHIPPED, Up
from tests.lib.customer import wait_for
from tests.lib.ports import free_port
from tests.lib.system import DEBUG_SERVER_KEY, Daemon


@pytest.fixture
def up(tmp_path: Path):
    with Up(tmp_path) as up:
        yield up


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_up_shows_its_urls_and_ends_both_processes(up: Up, number: int):
    """The panel has URL, key and next step; a signal to the command ends signer and server, with status 0."""
    up.start()
    running = up.wait_until_serving()
    children = up.children()

    assert sorted(children) == ["paychan", "paychan-signer"]
    for fact in (running.url, running.management_url, DEBUG_SERVER_KEY, str(up.state), "paychan channel new"):
        assert fact in up.text()
    query = {"client_pubkey": DEBUG_SERVER_KEY.replace("0225", "0325", 1), "exp_time": "1500000000"}
    assert (
        httpx.get(f"{running.url}/v1/fundingInfo", params=query, verify=False).json()["server_pubkey"]
        == DEBUG_SERVER_KEY
    )
    assert up.end(number) == 0
    assert not any(child.is_running() for child in children.values())


@pytest.mark.parametrize(
    ("network", "hint"), [("debug", "{url} --debug "), ("regtest", "{url} --network regtest "), ("test", "{url} ")]
)
def test_up_prints_the_option_that_a_payer_needs(tmp_path: Path, network: str, hint: str):
    """Addresses of regtest look like those of test, so the payer's command must name regtest."""
    with Up(tmp_path, SHIPPED.with_name(network)) as up:
        up.start()
        hint = hint.format(url=up.wait_until_serving().url)
        (line,) = [line for line in up.text().splitlines() if "paychan channel new" in line]
        assert line.split("paychan channel new ")[1].rstrip(" │") == hint.rstrip()


def test_up_ends_all_processes_after_an_early_signal(up: Up):
    """A signal during the start of the processes ends all that were started."""
    started: list[psutil.Process] = []
    for moment in (0.0, 0.1, 0.2, 0.4):
        up.start()
        command = psutil.Process(up.command.process.pid)
        wait_for(lambda command=command: command.children() != [], "first child")
        time.sleep(moment)
        started += command.children(recursive=True)
        up.end()

    assert len(started) >= 4
    assert not any(process.is_running() for process in started)
    up.start()
    up.wait_until_serving()


def test_signer_and_server_end_with_an_up_that_is_killed(up: Up):
    """After `kill -9` of the command both end by themselves, in order, and it can be started again."""
    up.start()
    up.wait_until_serving()
    children = up.children()
    assert up.end(signal.SIGKILL) == -signal.SIGKILL

    psutil.wait_procs(children.values(), timeout=20)
    assert not any(child.is_running() for child in children.values())
    assert "signer stopped" in up.text()
    up.start()
    up.wait_until_serving()


@pytest.mark.parametrize("victim", ["paychan", "paychan-signer"])
def test_up_ends_with_either_of_its_processes(up: Up, victim: str):
    """If signer or server is killed, the other is ended too, the status is not 0, and the text names the killed process."""
    up.start()
    up.wait_until_serving()
    children = up.children()
    children[victim].kill()

    assert up.wait() == 1
    assert f"{'paychan serve' if victim == 'paychan' else victim} ended with status -9" in up.text()
    assert not any(child.is_running() for child in children.values())


def test_port_of_the_environment_wins(up: Up):
    """PORT overrides http.port, as with the original."""
    port = free_port()
    up.start(PORT=str(port))

    assert up.wait_until_serving().url == f"http://127.0.0.1:{port}"


def fails(up: Up, *output: str, **environment: str) -> None:
    """Start with an error: the status is not 0, and the reason is shown without a traceback."""
    up.start(**environment)
    assert up.wait() != 0
    for text in output:
        assert text in up.text()
    assert "Traceback" not in up.text()


def test_fault_52_a_taken_port_is_named_with_its_holder(up: Up):
    """Another program on a port is an error that names port, process, and the setting to change."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, held = taken.getsockname()[1], f"the port is held by process {os.getpid()} ("
        fails(up, f"can't listen on 127.0.0.1:{port}: {held}", "change http.port", PORT=str(port))
        up.set("server.toml", "management.port", port)
        fails(up, f"can't listen on 127.0.0.1:{port}: {held}", "change management.port")
        fails(up, "change http.port (or PORT)", "change management.port", PORT=str(port))  # both at once


@pytest.mark.parametrize("typed", ["README.md", "notes"])
def test_up_names_what_was_typed(tmp_path: Path, typed: str):
    """A file that is no settings file, or nothing at all."""
    (tmp_path / "README.md").write_text("# Notes")
    done = subprocess.run(
        [Path(sys.executable).with_name("paychan"), "up", typed],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert done.stderr.startswith(f"paychan: {typed}")


@pytest.mark.parametrize(
    ("name", "old", "new", "output"),
    [
        ("server.toml", "[chain]", "[htttp]\n[chain]", "server.toml: htttp: unknown key"),
        ("server.toml", 'network = "test"', 'network = "live"', "server.toml: debug:"),
        ("signer.toml", 'mode = "debug"', 'mode = "bebug"', "signer.toml: key.mode:"),
        ("signer.toml", "[key]", "[socket]\nidle_seconds = 0\n[key]", "signer.toml: socket.idle_seconds:"),
    ],
)
def test_up_names_the_wrong_setting(up: Up, name: str, old: str, new: str, output: str):
    """A mistake in either file ends the command, with file and key in the text."""
    up.edit(name, old, new)

    fails(up, output)


def test_up_says_that_signer_and_server_differ(up: Up):
    """A signer of another network is refused."""
    up.edit("signer.toml", 'network = "test"', 'network = "regtest"')
    up.edit("signer.toml", "debug = true", "debug = false")
    up.edit("signer.toml", 'mode = "debug"', 'mode = "hardened"')
    up.set("signer.toml", "key.create_if_missing", True)

    fails(up, "the signer serves regtest (debug: False), the server test (debug: True)")


def test_up_says_that_a_directory_lacks_a_file(up: Up):
    """A directory without both files is no configuration."""
    (up.directory / "signer.toml").unlink()

    fails(up, "signer.toml: no such file")


def test_threat_39_two_servers_do_not_share_a_store(up: Up, tmp_path: Path):
    """A second server on the same directory names the process that uses the store, and the first continues."""
    up.start()
    running = up.wait_until_serving()
    second = Daemon(tmp_path / "second.log", "paychan", "serve", str(up.directory / "server.toml"))

    assert second.process.wait(30) == 2
    assert f"in use by process {running.pid}" in second.text()
    assert httpx.get(f"{running.management_url}/health", verify=False).status_code == 200


def test_a_second_up_is_refused(up: Up, tmp_path: Path):
    """Starting the same configuration twice fails with a reason, and the first continues."""
    up.start()
    running = up.wait_until_serving()
    second = Daemon(tmp_path / "second.log", "paychan", "up", str(up.directory))

    assert second.process.wait(30) == 1
    signer = up.children()["paychan-signer"].pid
    assert re.search(rf"signer.ledger is in use by process {signer} \(.*paychan-signer .*\)", second.text())
    assert httpx.get(f"{running.management_url}/health", verify=False).status_code == 200


def test_a_server_without_signer_can_be_stopped(up: Up, tmp_path: Path):
    """While the server waits for its signer, a signal ends it, with status 0."""
    server = Daemon(tmp_path / "server.log", "paychan", "serve", str(up.directory / "server.toml"))
    while not up.state.exists():
        assert server.process.poll() is None
        time.sleep(0.02)

    assert server.stop() == 0


def test_a_state_directory_that_can_not_be_made_is_named(up: Up, tmp_path: Path):
    """A path through a file is no state directory."""
    (tmp_path / "file").write_text("")
    up.edit("server.toml", f'state_dir = "{up.state}"', f'state_dir = "{tmp_path}/file/state"')
    server = Daemon(tmp_path / "server.log", "paychan", "serve", str(up.directory / "server.toml"))

    assert server.process.wait(30) == 2
    assert "can't make" in server.text()
    assert "Traceback" not in server.text()


def test_the_originals_benchmark_runs_through(up: Up):
    """bench/payments.py with the arguments of the original's script: 2 clients open, pay 50 times each, and close."""
    up.start()
    running = up.wait_until_serving()
    bench = Path(__file__).parents[2] / "bench" / "payments.py"
    command = [sys.executable, bench, "50", "2", running.url.removeprefix("http://"), DEBUG_SERVER_KEY, "--no-save"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=os.environ)
    token = (up.state / "management.token").read_text()
    totals = httpx.get(
        f"{running.management_url}/totals", headers={"Authorization": f"Bearer {token}"}, verify=False
    ).json()

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Done. Executed 100 payments." in done.stdout
    assert totals["channels"]["closed"] == 2
    assert totals["received_sat"]["closed"] == 2 * (100_000 + 50)


def test_fault_26_up_names_missing_parts_and_continues(up: Up, tmp_path: Path):
    """The server's panel names a signer that does not answer as missing; once the signer answers, everything continues."""
    up.start()
    up.wait_until_serving()
    signer = up.children()["paychan-signer"]
    signer.suspend()
    deadline = time.monotonic() + 60
    while "missing  signer" not in up.text():
        assert time.monotonic() < deadline, up.text()
        time.sleep(0.1)
    signer.resume()
    while "no part is missing any more" not in up.text():
        assert time.monotonic() < deadline, up.text()
        time.sleep(0.1)
    assert up.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("listen", ["::1", "::"])
def test_fault_37_up_listens_on_ipv6(up: Up, listen: str):
    """With IPv6 addresses the panel has URLs with brackets, which `status` and a payer can use."""
    up.set("server.toml", "http.listen", listen)
    up.set("server.toml", "management.listen", listen)
    up.start()
    running = up.wait_until_serving()

    for url in (running.url, running.management_url):
        assert url.startswith("http://[::1]:")
        assert url in up.text()
        assert httpx.get(f"{url}/health", verify=False).status_code == 200
    status = subprocess.run(
        [Path(sys.executable).parent / "paychan", "status", up.directory / "server.toml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in status.stderr + up.text()
    assert "http://[::1]:" in status.stdout or status.returncode == 0
