"""Output of the payer's commands: keys on one line, commands that work as printed, and JSON for each error."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from paychan.cli.payer.chain import OwnChain
from paychan.cli.payer.terminal import advice
from paychan.client import PaymentPending
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, Liar
from tests.client.test_cli_says import opened
from tests.lib.signer_process import COMMAND
from tests.lib.system import System

PAYCHAN = Path(COMMAND).with_name("paychan")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


@pytest.fixture
def wallet(tmp_path: Path) -> Path:
    return tmp_path / "wallet"


def run(*words: object, wallet: Path, program: Path = PAYCHAN, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own."""
    place = {**os.environ, "PAYCHAN_WALLET": str(wallet), "COLUMNS": str(columns)}
    command = [program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=place)


def new(system: System, wallet: Path) -> str:
    made = run("channel", "new", system.url, "--hours", 100, "--debug", "--json", wallet=wallet)
    return str(json.loads(made.stdout)["name"])


def test_a_private_key_is_never_broken(system: System, wallet: Path) -> None:
    """At 30 columns the key is one line."""
    shown = run("channel", "key", new(system, wallet), wallet=wallet, columns=30)

    assert [len(line) for line in shown.stdout.splitlines()] == [52]


@pytest.mark.parametrize(
    "words",
    [
        ["channel", "pay", "N", "abc", "--json"],
        ["channel", "pay", "--json"],
        ["channel", "pay", "N", "5", "--nonsense", "--json"],
        ["nonsense", "--json"],
        ["--nonsense", "--json"],
    ],
)
def test_usage_errors_are_json_for_programs(wallet: Path, words: list[str]) -> None:
    """Wrong type, missing argument, unknown option and unknown command: status 2, and nothing on standard error."""
    done = run(*words, wallet=wallet)

    assert done.returncode == 2
    assert json.loads(done.stdout)["code"] == "usage"
    assert done.stderr == ""
    words.remove("--json")
    assert run(*words, wallet=wallet).stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["status", "--json"],
        ["status", "--nonsense", "--json"],
        ["pubkey", "--nonsense", "--json"],
        ["--nonsense", "--json"],
    ],
)
def test_usage_errors_of_the_signer_are_json_for_programs(wallet: Path, words: list[str]) -> None:
    """The commands with and without keys."""
    done = run(*words, wallet=wallet, program=Path(COMMAND))

    assert done.returncode == 2
    assert json.loads(done.stdout)["code"] == "usage"
    assert done.stderr == ""


def test_an_error_in_json_names_its_channel(system: System, wallet: Path) -> None:
    """Errors about a channel have its name; an empty name is shown as such."""
    name = new(system, wallet)

    assert json.loads(run("channel", "pay", name, 5, "--json", wallet=wallet).stdout)["name"] == name
    assert json.loads(run("channel", "pay", name, "--json", wallet=wallet).stdout)["name"] == name
    assert 'no channel "" in' in run("channel", "pay", "", 5, wallet=wallet).stderr


def test_a_debug_server_is_named_before_its_address(system: System, wallet: Path) -> None:
    """Without --debug, a warning precedes the address; its commands are complete; programs get a field."""
    shown = run("channel", "new", system.url, "--hours", 100, wallet=wallet)
    made = json.loads(run("channel", "new", system.url, "--hours", 100, "--json", wallet=wallet).stdout)

    assert "in debug mode" in shown.stderr
    assert "Send no coins" in shown.stderr
    assert "of 0 confirmations" not in shown.stderr
    assert f"`{PAYCHAN} wallet backup DIR`" in shown.stdout
    assert made["debug"] is True


def test_printed_commands_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """A payment always has an amount, and a broadcast has a chain: the one that was given, or a placeholder."""
    monkeypatch.setenv("PAYCHAN_ELECTRUM", "ssl://own:1")
    error = PaymentPending(503, "pending", "later", {})

    assert "pay 4593d97a`" not in advice(error, "4593d97a")
    assert OwnChain("", None, "", None).words == ("--node", "URL", "--credentials", "COOKIE")
    assert OwnChain("", None, "ssl://own:1", None).words == ()
    given = OwnChain("http://own:2", Path("my cookie"), "", None)
    assert given.words == ("--node", "http://own:2", "--credentials", "my cookie")


@pytest.mark.parametrize("left_sat", [1_500, 1_700])
def test_the_next_payment_is_one_that_the_rest_allows(wallet: Path, left_sat: int) -> None:
    """With less left than the example and the smallest change, the next step closes the channel."""
    with Liar() as liar, pytest.MonkeyPatch.context() as place:
        place.setenv("PAYCHAN_WALLET", str(wallet))
        name = opened(liar.url)
        run("channel", "pay", name, FUNDING_SAT - OPEN_PRICE_SAT - left_sat, wallet=wallet)
        shown = run("channel", "status", name, "--offline", wallet=wallet).stdout
        words = shown.rpartition("channel ")[2].split()

        assert words == (["pay", name, "1000"] if left_sat == 1_700 else ["close", name])
        assert run("channel", *words, wallet=wallet).returncode == 0
