"""`paychan channel` against the real server: its output for people, its JSON for programs, and its error messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from paychan.cli.payer.channel import app
from paychan.client import Payer
from paychan.protocol.debug_funding import debug_outpoint
from paychan.shared.wording import relative
from tests.client.liar import FUNDING_SAT, Liar, Lie
from tests.lib.system import System

COMMANDS = ["new", "open", "pay", "status", "close", "refund", "watch", "forget", "key", "list"]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


@pytest.fixture(autouse=True)
def wallet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own wallet, set through the environment; a terminal wide enough for whole lines."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "wallet"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "wallet"


def run_command(*words: object) -> Result:
    """Run a command that must not raise."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run_json(*words: object) -> Any:
    """Run a command that must succeed, and return its JSON."""
    result = run_command(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("version", [[], ["--v1"], ["--dialect", "api"]], ids=["v2-S", "v1", "v2-A"])
def test_a_whole_channel_with_json_output(system: System, version: list[str]) -> None:
    """Every command prints one JSON value with --json; together the commands run a whole channel."""
    made = run_json("new", system.url, "--hours", 100, "--debug", *version)
    name = made["name"]
    assert made["uri"] == f"bitcoin:{made['funding_address']}?amount=0.{made['min_funding_sat']:08d}"
    opened = run_json("open", name)
    assert opened["paid_sat"] == made["open_price_sat"]
    assert run_json("pay", name, 1000)["left_sat"] == opened["left_sat"] - 1000
    many = run_json("pay", name, 2, "--times", 5)
    assert (many["payments"], many["left_sat"]) == (5, opened["left_sat"] - 1010)
    assert run_json("pay", name, "--resume")["paid_sat"] == 0
    assert run_json("status", name)["standing"] == "open"
    assert run_json("refund", name, "--fee-rate", 3)["valid_after"] == made["expiry"]
    assert run_json("key", name)["address"] == made["change_address"]
    settled = run_json("close", name)
    assert settled["change_sat"] == many["left_sat"]
    (listed,) = run_json("list")
    assert (listed["left_sat"], listed["paid_sat"]) == (0, opened["paid_sat"] + 1010)
    assert (listed["standing"], listed["settlement_txid"]) == ("closed", settled["settlement_txid"])


def test_a_whole_channel_with_output_for_people(system: System) -> None:
    """Panels show amounts, expiry and the next command; each next command works."""
    shown = run_command("new", system.url, "--hours", 100, "--amount", 500_000, "--no-wait").stdout
    assert "500,000 sat in one output" in shown
    assert "amount=0.00500000" in shown
    assert re.search(r"in 4 d \d+ h", shown)
    assert "▀" in shown
    assert re.search(r"Next +\S*paychan channel open [0-9a-f]{8}\b", shown)

    shown = run_command("new", system.url, "--hours", 100, "--debug").stdout
    for amount in ("", "", " --times 3"):
        command = re.search(r"Next +\S*paychan channel ([a-z]+ [0-9a-f]{8}(?: \d+)?)", shown)
        assert command, shown
        result = run_command(*(command[1] + (amount if command[1].startswith("pay") else "")).split())
        assert result.exit_code == 0, result.output
        shown = run_command("status", command[1].split()[1]).stdout
    name = re.findall(r"[0-9a-f]{8}", shown)[0]
    assert "3 times" not in shown
    assert "comes back" in run_command("close", name).stdout.lower()
    assert "closed" in run_command("list").stdout


def test_drain_closes(system: System) -> None:
    """--drain pays everything and shows the settlement."""
    name = run_json("new", system.url, "--hours", 100, "--debug")["name"]
    run_command("open", name)

    assert "Settled by" in run_command("pay", name, "--drain", "--yes", "--limit", 10**14).stdout


def test_only_the_key_command_shows_secrets(system: System, wallet: Path) -> None:
    """No command but `key` prints the private key or the channel's secret."""
    name = run_json("new", system.url, "--hours", 100, "--debug")["name"]
    run_command("open", name)
    record = json.loads((wallet / f"{name}.json").read_text())
    shown = "".join(
        run_command(*words).output + run_command(*words, "--json").output
        for words in (["list"], ["status", name], ["status", name, "--offline"], ["pay", name, 1], ["refund", name])
    )

    assert record["private_key"] not in shown
    assert record["secret"] not in shown
    assert run_command("key", name).stdout.strip() == run_json("key", name)["wif"]


@pytest.mark.parametrize(
    ("words", "sentence", "next_step"),
    [
        (["new", "http://127.0.0.1:1"], "no answer from http://127.0.0.1:1", "Is the server running?"),
        (["new", "127.0.0.1:1"], "is not the URL of a server", "want http://127.0.0.1:1"),
        (["open", "abc"], "no channel abc", "paychan channel list"),
        (["pay", "abc", "1"], "no channel abc", "paychan channel list"),
    ],
)
def test_failures_are_one_sentence_with_the_next_step(words: list[str], sentence: str, next_step: str) -> None:
    """A failure exits with 1; stderr has the problem and the next step, with --json for programs."""
    result = run_command(*words)

    assert result.exit_code == 1
    assert sentence in result.stderr
    assert next_step in result.stderr
    assert result.stdout == ""
    shown_to_program = run_command(*words, "--json")
    assert shown_to_program.exit_code == 1
    assert json.loads(shown_to_program.stdout)["code"]


def test_failures_name_the_numbers_and_the_next_command(system: System) -> None:
    """Limits, amounts and states are refused with the numbers, and the advice fits the channel."""
    name = run_json("new", system.url, "--hours", 100, "--debug")["name"]
    for words, sentence in (
        (["pay", name, "5"], f"channel open {name}` opens it"),
        (["close", name], f"channel open {name}` opens it"),
        (["new", system.url, "--hours", "1"], "hours of paying is 1, want at least 12"),
        (["new", system.url, "--network", "live"], "network is test, want live"),
        (["new", system.url, "--max-open-price", "5"], "open price in satoshi is 100,000, want 0 to 5"),
    ):
        assert sentence in run_command(*words).stderr
    assert "limit of 1,000,000 sat. --limit raises it" in run_command("open", name, "--amount", 1_000_001).stderr
    assert run_command("open", name, "--amount", 1_000_001, "--limit", 1_000_001).exit_code == 0
    again = run_command("open", name).stderr
    assert "is open, need new. It needs no opening" in again
    assert f"channel pay {name} SAT` pays" in again
    assert "limit of 1,000,000 sat. --limit raises it" in run_command("pay", name, 1_000_001).stderr
    assert "want at least 1 sat" in run_command("pay", name, 0).stderr
    assert (
        json.loads(run_command("pay", name, 10**15, "--limit", 10**16, "--json").stdout)["code"] == "insufficient_funds"
    )


def test_commands_show_and_resume_a_lost_payment() -> None:
    """An unanswered payment shows in `list` and `status`, and `pay --resume` completes it once."""
    with Liar() as liar:
        made = run_json("new", liar.url, "--hours", 100)
        name = made["name"]
        with Payer() as payer, payer.channel(name) as channel:
            outpoint = debug_outpoint(channel.record.terms.client_key, channel.record.expiry)
        run_json("open", name, "--outpoint", outpoint, "--value", FUNDING_SAT)
        liar.lies.append(Lie(body=b"{}"))
        failed = run_command("pay", name, 100)
        assert "server misbehaved" in failed.stderr
        assert "open, last payment unanswered" in run_command("list").stdout
        assert f"paychan channel pay {name} --resume" in run_command("status", name, "--offline").stdout

        assert "the server already had it" in run_command("pay", name, "--resume").stdout


def test_fault_49_a_payment_that_had_no_answer_is_named_and_finished_first() -> None:
    """The next `pay` names the earlier payment; while that fails again, it says that nothing new was paid."""
    with Liar() as liar:
        name = run_json("new", liar.url, "--hours", 100)["name"]
        with Payer() as payer, payer.channel(name) as channel:
            outpoint = debug_outpoint(channel.record.terms.client_key, channel.record.expiry)
        run_json("open", name, "--outpoint", outpoint, "--value", FUNDING_SAT)
        silent = Lie(deaf=True, status=503, body=b'{"code":"payment_pending","error":"no answer yet"}')
        liar.lies.extend([silent] * 5)
        failed = run_command("pay", name, 10)
        assert failed.exit_code == 1
        assert "finishes it first" in failed.stderr
        before = liar.received_sat

        liar.lies.extend([silent] * 5)
        failed = run_command("pay", name, 20)
        assert "nothing new was paid, because the earlier payment of 10 sat" in failed.stderr

        shown = run_command("pay", name, 20).stdout
        assert re.search(r"Earlier +10 sat", shown)
        assert re.search(r"Paid +20 sat", shown)
        assert liar.received_sat == before + 30


def test_an_opening_without_an_answer_is_repeated() -> None:
    """If the server fails while a channel opens, the advice is to open again; that pays once."""
    with Liar() as liar:
        name = run_json("new", liar.url, "--hours", 100)["name"]
        with Payer() as payer, payer.channel(name) as channel:
            outpoint = debug_outpoint(channel.record.terms.client_key, channel.record.expiry)
        liar.lies.extend([Lie(drop=True)] * 5)
        failed = run_command("open", name, "--outpoint", outpoint, "--value", FUNDING_SAT)
        assert f"paychan channel open {name}` continues, and pays once" in failed.stderr
        assert run_json("open", name)["left_sat"] == FUNDING_SAT - liar.received_sat


def test_server_text_is_shown_without_markup() -> None:
    """Text from the server is interpreted neither as markup nor as control characters."""
    with Liar() as liar:
        liar.info_lie = Lie(status=400, body=b'{"code":"x","error":"[bold red]pay me[/bold red] \\u001b[2J"}')
        result = run_command("new", liar.url)

    assert "[bold red]pay me[/bold red]" in result.stderr
    assert "paychan channel" not in result.stderr  # no advice without a channel
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    """--help says what a command does and shows it in use."""
    shown = run_command(command, "--help").stdout

    assert "Examples" in shown
    assert f"paychan channel {command}" in shown
    assert "--json" in shown


def test_times_are_shown_in_their_two_largest_units() -> None:
    """Times are shown in days and hours, hours and minutes, or minutes; past times with "ago"."""
    assert relative(4 * 86400 + 3 * 3600 + 59) == "in 4 d 3 h"
    assert relative(3 * 3600 + 61) == "in 3 h 1 min"
    assert relative(30) == "in 30 s"
    assert relative(-7200) == "2 h ago"
