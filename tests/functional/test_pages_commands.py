"""The commands of the pages work: each is run here or by a named test, or an entry has the reason why not.

A command is a line of a fenced `sh` block. A new command without an entry fails the test.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from paychan.cli.node import find_bitcoind
from paychan.client.record import ChannelRecord
from paychan.running import read_running
from tests.lib.customer import wait_for
from tests.lib.ports import free_port
from tests.lib.readme import PAGES, ROOT
from tests.lib.settings import with_settings

_PATIENCE_SECONDS = 120


def commands_of(page: str) -> list[str]:
    """Return the commands of a page's `sh` blocks, without their comments."""
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```", page)
    lines = (re.sub(r"(^|\s)#\s.*", "", line).strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


class Clone:
    """A directory like a clone of the repository; commands run as printed in the pages, except for ports and names."""

    def __init__(self, directory: Path, network: str) -> None:
        self.directory = directory
        self.network = network
        self.rpc_port, self.zmq_port = free_port(), free_port()
        self._running: list[subprocess.Popen[bytes]] = []
        self._channels: list[Path] = []
        (directory / ".venv").symlink_to(Path(sys.executable).parents[1])
        for place in (f"config/{network}", "config/live", network):
            (directory / place).mkdir(parents=True, exist_ok=True)
            for name in ("server.toml", "signer.toml"):
                text = (ROOT / "config" / network / name).read_text()
                text = text.replace(":18443", f":{self.rpc_port}").replace(":28332", f":{self.zmq_port}")
                ports = {"http.port": 0, "management.port": 0} if name == "server.toml" else {}
                (directory / place / name).write_text(with_settings(text, ports))
        home = {"HOME": str(directory), "PAYCHAN_WALLET": "", "XDG_DATA_HOME": "", "PORT": "", "COLUMNS": "200"}
        node = {"PAYCHAN_NODE": "", "PAYCHAN_CREDENTIALS": "", "PAYCHAN_ELECTRUM": ""}
        bitcoind = {"PAYCHAN_BITCOIND": str(find_bitcoind() or "")}
        self._environment = {key: value for key, value in {**os.environ, **home, **node, **bitcoind}.items() if value}

    @property
    def state(self) -> Path:
        """The state directory of signer and server."""
        return self.directory / ".paychan" / self.network

    def run(self, command: str) -> str:
        """Run a command to its end, and return its output; wait for its mark only if it is one of `GOES_ON`."""
        line = self._filled(command)
        if (mark := GOES_ON.get(command)) is not None:
            return self._start(line, mark)
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.directory,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    def end_newest(self) -> None:
        """Send Ctrl-C to the running command that was started last."""
        process = self._running.pop()
        process.send_signal(signal.SIGINT)
        process.wait(_PATIENCE_SECONDS)

    def wait_newest(self) -> None:
        """Wait until the command that was started last ends by itself."""
        assert self._running.pop().wait(_PATIENCE_SECONDS) == 0

    def leave(self) -> None:
        while self._running:
            self.end_newest()

    def _start(self, line: str, mark: str) -> str:
        log = self.directory / f"command-{len(list(self.directory.glob('command-*')))}.out"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"],
                cwd=self.directory,
                env=self._environment,
                stdout=file,
                stderr=file,
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
            )
        self._running.append(process)
        wait_for(
            lambda: mark in log.read_text(errors="replace") or process.poll() is not None,
            line,
            seconds=_PATIENCE_SECONDS,
        )
        assert mark in log.read_text(errors="replace"), log.read_text(errors="replace")
        return log.read_text(errors="replace")

    def _filled(self, command: str) -> str:
        """Return a command with this clone's ports, and with the names that earlier commands printed."""
        running = read_running(self.state)
        line = command.replace("http://localhost:8000", running.url if running else "http://localhost:8000")
        line = line.replace(":18443", f":{self.rpc_port}").replace("/etc/paychan", f"{self.directory}/etc/paychan")
        if line.endswith("node start"):
            line += f" --rpc-port {self.rpc_port} --zmq-port {self.zmq_port}"
        files = self.directory.glob(".local/share/paychan/wallet/[!.]*.json")
        self._channels += [path for path in files if path not in self._channels]
        if self._channels:
            record = msgspec.json.decode(self._channels[-1].read_bytes(), type=ChannelRecord)
            line = re.sub(r"\bNAME\b", record.name, line)
            line = line.replace("TXID:VOUT", record.funding_outpoint).replace("ADDRESS", record.funding_address)
            line = line.replace("CLIENT_KEY", record.key.public_key.format().hex()).replace(
                "EXPIRY", str(record.expiry)
            )
        backups = sorted(self.state.glob("backups/*.backup"))
        return line.replace("NEWEST.backup", str(backups[-1])) if backups else line


def lose_the_store(clone: Clone) -> None:
    (clone.state / "store").rename(clone.state / "store.lost")


Step = str | Callable[[Clone], object]

GOES_ON = {
    ".venv/bin/paychan up debug": "Ctrl-C stops",
    ".venv/bin/paychan up config/regtest": "Ctrl-C stops",
    ".venv/bin/paychan node start": "Mine",
    ".venv/bin/paychan channel new http://localhost:8000 --network regtest --amount 1000000": "Ctrl-C stops waiting",
    ".venv/bin/paychan-signer config/debug/signer.toml": "signer started",
}
"""Commands that run until Ctrl-C or until an event, with a text that they print when they are ready."""

DEBUG: tuple[Step, ...] = (
    ".venv/bin/paychan init live",
    ".venv/bin/paychan init live /etc/paychan",
    ".venv/bin/paychan up debug",
    ".venv/bin/paychan channel new http://localhost:8000 --debug",
    ".venv/bin/paychan channel open NAME",
    ".venv/bin/paychan channel pay NAME 1 --times 1000",
    ".venv/bin/paychan channel status NAME",
    ".venv/bin/paychan channel list",
    ".venv/bin/paychan status config/live/server.toml",
    ".venv/bin/paychan channels show config/live/server.toml TXID:VOUT",
    ".venv/bin/paychan channels deposits config/live/server.toml",
    ".venv/bin/paychan withdraw config/live/server.toml --above 1000000",
    ".venv/bin/paychan backup create config/live/server.toml",
    ".venv/bin/paychan backup list config/live/server.toml",
    ".venv/bin/paychan backup prune config/live/server.toml --keep 30",
    ".venv/bin/paychan status config/live/server.toml --backup-hours 26 --json",
    ".venv/bin/paychan backup verify NEWEST.backup",
    ".venv/bin/paychan channel close NAME",
    ".venv/bin/paychan channels list config/live/server.toml --state closing",
    ".venv/bin/paychan channel new http://localhost:8000 --debug",
    ".venv/bin/paychan channel open NAME",
    ".venv/bin/paychan channels close config/live/server.toml TXID:VOUT",
    ".venv/bin/paychan-signer status config/live/signer.toml",
    ".venv/bin/paychan-signer heartbeat config/live/signer.toml",
    ".venv/bin/paychan-signer audit show config/live/signer.toml --last 20",
    ".venv/bin/paychan-signer audit verify config/live/signer.toml",
    Clone.end_newest,
    ".venv/bin/paychan backup salvage config/live/server.toml",
    lose_the_store,
    ".venv/bin/paychan backup restore config/live/server.toml NEWEST.backup",
    ".venv/bin/paychan-signer config/debug/signer.toml",
    ".venv/bin/paychan settle --offline NEWEST.backup --config config/live/server.toml",
    ".venv/bin/paychan settle --offline NEWEST.backup --config config/live/server.toml --publish",
    Clone.end_newest,
    ".venv/bin/paychan-signer audit archive config/live/signer.toml",
)

WATCH = (
    ".venv/bin/paychan channel watch --once --node http://127.0.0.1:18443 --credentials .paychan/node/regtest/.cookie"
)
NEW = ".venv/bin/paychan channel new http://localhost:8000 --network regtest --amount 1000000"

REGTEST: tuple[Step, ...] = (
    ".venv/bin/paychan node start",
    ".venv/bin/paychan up config/regtest",
    NEW,
    ".venv/bin/paychan node fund ADDRESS 1000000",
    ".venv/bin/paychan node mine 1",
    Clone.wait_newest,
    ".venv/bin/paychan channel pay NAME 1 --times 200",
    ".venv/bin/paychan channel close NAME",
    ".venv/bin/paychan node mine 1",
    ".venv/bin/paychan channels list config/regtest/server.toml --state closed",
    ".venv/bin/paychan-signer earnings config/live/signer.toml",
    ".venv/bin/paychan-signer earnings config/live/signer.toml --addresses > addresses.txt",
    ".venv/bin/paychan coins config/live/server.toml addresses.txt --out coins.txt",
    WATCH,
    NEW,
    ".venv/bin/paychan node fund ADDRESS 1000000",
    ".venv/bin/paychan node mine 1",
    Clone.wait_newest,
    ".venv/bin/paychan channel pay NAME 1 --times 200",
    Clone.end_newest,
    ".venv/bin/paychan-signer pubkey config/live/signer.toml CLIENT_KEY EXPIRY",
    ".venv/bin/paychan-signer export-xpub config/live/signer.toml",
    ".venv/bin/paychan-signer rotate destination config/live/signer.toml ADDRESS",
    ".venv/bin/paychan node pass 180",
    ".venv/bin/paychan channel refund NAME --publish --node http://127.0.0.1:18443 --credentials .paychan/node/regtest/.cookie",
    ".venv/bin/paychan node mine 3",
    WATCH,
)

TERMINAL = "tests/signer/test_commands_terminal.py::test_init_and_recover_on_a_terminal"

SWEEP = "tests/functional/test_regtest_earnings.py::test_fault_47_earnings_on_derived_addresses_are_listed_and_swept"

RUN_BY_ANOTHER_TEST = {
    "paychan wallet restore --words --server URL --expires UNIX --index 0": (
        "tests/client/test_old_copy.py::test_a_channel_comes_back_by_command"
    ),
    "paychan channel open NAME": "tests/client/test_old_copy.py::test_a_channel_comes_back_by_command",
    "paychan pay https://api.example/tile --max 50": "tests/client/paying/test_cli_pay.py::test_an_answer_goes_to_standard_output",
    "paychan wallet": "tests/client/paying/test_cli_pay.py::test_a_lost_answer_and_the_wallet",
    "paychan receipt verify receipt.json --identity HEX": (
        "tests/cli/test_receipt.py::test_a_genuine_receipt_is_shown"
    ),
    ".venv/bin/paychan-signer sweep config/live/signer.toml ADDRESS --fee-rate 5 --coins coins.txt --out sweep.txt": SWEEP,
    ".venv/bin/paychan coins config/live/server.toml --publish sweep.txt": SWEEP,
    ".venv/bin/paychan-signer init live/signer.toml": TERMINAL,
    ".venv/bin/paychan-signer init config/live/signer.toml": TERMINAL,
    ".venv/bin/paychan-signer recover config/live/signer.toml": TERMINAL,
    ".venv/bin/paychan-signer verify config/live/signer.toml": (
        "tests/signer/test_commands.py::test_verify_of_another_backup_is_a_failure"
    ),
    ".venv/bin/paychan-signer encrypt config/live/signer.toml": (
        "tests/signer/test_commands.py::test_encrypt_keeps_the_keys_of_a_plain_seed"
    ),
    ".venv/bin/paychan-signer passphrase config/live/signer.toml": (
        "tests/signer/test_commands.py::test_passphrase_is_changed_for_all_generations"
    ),
    ".venv/bin/paychan-signer rotate seed config/live/signer.toml": (
        "tests/signer/test_commands.py::test_rotated_seed_is_added_before_the_old"
    ),
    ".venv/bin/paychan-signer forget config/live/signer.toml FINGERPRINT": (
        "tests/signer/test_commands.py::test_rotated_seed_is_added_before_the_old"
    ),
    ".venv/bin/python bench/payments.py 1000 10 localhost:8000 0225b3aaf58992a8cc909522c2ec859ef218fd29fda0a6723cfb4e0529f80cc8f3": (
        "tests/functional/test_up.py::test_the_originals_benchmark_runs_through"
    ),
    ".venv/bin/paychan gateway http://127.0.0.1:5000 --price 25": (
        "tests/gateway/test_command.py::test_a_service_is_sold_by_one_command_and_paid_by_another"
    ),
    ".venv/bin/paychan pay http://127.0.0.1:8080/ --max 25 --open": (
        "tests/gateway/test_command.py::test_a_service_is_sold_by_one_command_and_paid_by_another"
    ),
    ".venv/bin/python bench/journeys.py": "tests/functional/test_journeys.py::test_the_command_counts_a_journey",
    ".venv/bin/python bench/plot.py": "tests/functional/test_plots.py::test_the_same_results_give_the_same_pictures",
    ".venv/bin/python -m tests.lib.readme": "tests/config/test_config.py::test_readme_tables_are_those_of_the_code",
}
"""The test names the subcommand, or imports the module."""

_CI = ".ci/run runs this line, or one that does the same, in an empty clone"
_SUITE = "is the suite, to which this test belongs, or a part of it"
_MEASURES = "measures for minutes; its figures are of value on an idle machine only"
_SERVES = "the same command on the scratch configuration is run above"

NOT_EXECUTABLE_HERE = {
    "$(command -v sudo) sh -c 'apt-get update -qq; apt-get install -y -qq python3-venv python3-dev g++ libleveldb-dev' && python3 -m venv .venv && .venv/bin/pip install -q '.[server]' && .venv/bin/paychan up debug": (
        "installs packages of the system; test_installs.py does the rest on each Python that is here"
    ),
    "tests/system-packages && python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/pytest -n 6 --dist loadfile": _CI,
    "tests/system-packages && python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]'": _CI,
    ".venv/bin/ruff format . && .venv/bin/ruff check .": _CI,
    ".venv/bin/mypy": _CI,
    ".venv/bin/lint-imports": _CI,
    ".venv/bin/pytest -n 6 --dist loadfile": _SUITE,
    ".venv/bin/pytest -q -m quick": _SUITE,
    ".venv/bin/pytest -q tests/protocol": _SUITE,
    ".venv/bin/pytest -s tests/functional/test_fee_spike.py": _SUITE,
    ".venv/bin/pytest -s tests/crash/test_settling_kills.py": _SUITE,
    "tests/fetch-bitcoind": "downloads packages; tests/system-packages runs it, and .ci/run that",
    ".venv/bin/python -m tests.lib.faults": "writes tests/FAULTS.md; tests/protocol/test_faults.py compares its output",
    ".venv/bin/python -m tests.lib.paidvectors": "writes vectors; tests/protocol/test_x402_wire.py compares its output",
    ".venv/bin/pip install --require-hashes -r config/deploy/requirements.lock && .venv/bin/pip install --no-deps .": (
        "installs into the environment of this test; test_installs.py does it in another one"
    ),
    ".venv/bin/pip install -q '.[bench]'": "installs into the environment of this test",
    ".venv/bin/paychan up live": "needs a node of the live network",
    ".venv/bin/paychan status live/server.toml": _SERVES,
    "apt install softhsm2": "installs a package of the system",
    "softhsm2-util --init-token --free --label paychan": "asks for PINs; tests/lib/softhsm.py gives them as options",
    "pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --login --delete-object --type privkey --label LABEL": (
        "deletes keys that only earlier releases made"
    ),
    "pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --login --delete-object --type pubkey --label LABEL": (
        "deletes keys that only earlier releases made"
    ),
    ".venv/bin/python bench/payments.py 1000 10 localhost:8000 --node http://127.0.0.1:18443": _MEASURES,
    ".venv/bin/python bench/load.py --version 2 --connections 32": _MEASURES,
    ".venv/bin/python bench/floor.py": _MEASURES,
    ".venv/bin/python bench/fees.py": "draws into bench/plots; test_plots.py draws elsewhere",
    **{
        f".venv/bin/python bench/{name}.py": _MEASURES
        for name in (
            "load",
            "gateway",
            "proxies",
            "stream",
            "costs",
            "verify",
            "store",
            "channels",
            "soak",
            "flood",
            "strangers",
            "signing",
            "tokens",
        )
    },
}

RUN_HERE = {step for step in (*DEBUG, *REGTEST) if isinstance(step, str)}


def test_every_command_of_the_pages_has_an_entry() -> None:
    """Each command of a page is run here, by a named test, or has a reason; and each entry's command is in a page."""
    written = {command for page in PAGES for command in commands_of(page.read_text())}
    helpers = {".venv/bin/paychan-signer config/debug/signer.toml"}

    assert written - RUN_HERE - RUN_BY_ANOTHER_TEST.keys() - NOT_EXECUTABLE_HERE.keys() == set()
    assert (RUN_HERE | RUN_BY_ANOTHER_TEST.keys() | NOT_EXECUTABLE_HERE.keys()) - written - helpers == set()
    assert not (RUN_BY_ANOTHER_TEST.keys() & NOT_EXECUTABLE_HERE.keys())
    assert RUN_HERE.issuperset(GOES_ON)


@pytest.mark.parametrize("command", RUN_BY_ANOTHER_TEST)
def test_the_named_test_runs_the_command(command: str) -> None:
    """The test exists, and its file has the words of the command: subcommands, the script, or the module."""
    name, _, function = RUN_BY_ANOTHER_TEST[command].partition("::")
    source = (ROOT / name).read_text()
    found = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", None) == function]
    words = re.findall(r"^\S+((?: [a-z]+)+)(?= |$)", command)
    scripts = re.findall(r"(?:bench/|tests\.lib\.)(\w+)", command)

    assert found, function
    for word in scripts or words[0].split():
        assert re.search(rf"\b{word}\b", source), word


@pytest.fixture
def clone(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Clone]:
    clone = Clone(tmp_path, request.param)
    yield clone
    clone.leave()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("clone", ["debug"], indirect=True)
def test_the_commands_of_debug_mode(clone: Clone) -> None:
    """A payer's and an operator's commands, in the order of a day that ends with a lost store."""
    for step in DEBUG:
        clone.run(step) if isinstance(step, str) else step(clone)


@pytest.mark.skipif(find_bitcoind() is None, reason="no bitcoind: run tests/fetch-bitcoind, or set PAYCHAN_BITCOIND")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("clone", ["regtest"], indirect=True)
def test_the_commands_of_a_regtest_chain(clone: Clone) -> None:
    """The payer's guide on a private chain: a channel that the server settles, and one that the payer refunds."""
    for step in REGTEST:
        clone.run(step) if isinstance(step, str) else step(clone)
