"""`paychan channel`: each command says what is so, does nothing with options that it would ignore, and asks in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from paychan.client import Channel, Payer, State
from paychan.client.wallet import FORGOTTEN
from paychan.protocol.debug_funding import debug_outpoint
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, TXID, Liar, Lie
from tests.client.test_cli import run_command, run_json
from tests.lib.pseudoterminal import PseudoTerminal
from tests.lib.system import System

MODULES = [
    "paychan.cli.main",
    "paychan.cli.node",
    "paychan.cli.payer.channel",
    "paychan.cli.payer.chain",
    "paychan.cli.payer.terminal",
    "paychan.client",
    "paychan.client.transport.http",
    "paychan.client.transport.proxy",
    "encodings.idna",
    "importlib.readers",
    "rich.markup",
    "zoneinfo",
]
"""Modules that a process imports before it becomes a user who may not read the interpreter's directory."""

COMMAND = Path(sys.executable).with_name("paychan")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


@pytest.fixture(autouse=True)
def wallet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own wallet."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "wallet"))
    return tmp_path / "wallet"


def opened(url: str) -> str:
    """A channel of the liar's, which is opened; its name."""
    made = run_json("new", url, "--hours", 100)
    with Payer() as payer, payer.channel(made["name"]) as channel:
        outpoint = debug_outpoint(channel.record.terms.client_key, channel.record.expiry)
    run_json("open", made["name"], "--outpoint", outpoint, "--value", FUNDING_SAT)
    return str(made["name"])


def rows(shown: str) -> dict[str, str]:
    """The named values of an output, by name."""
    found = {}
    for line in shown.splitlines():
        name, _, value = line.strip().partition("  ")
        found[name] = value.strip()
    return found


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["10", "--drain", "--yes"], "got 10 sat and --drain"),
        (["10", "--resume"], "got 10 sat and --resume"),
        (["--drain", "--resume", "--yes"], "got --drain and --resume"),
        ([], "got no amount"),
        (["--times", "3"], "got no amount"),
        (["--drain", "--times", "3", "--yes"], "want SAT, got --drain"),
        (["--drain", "--every", "1", "--yes"], "want SAT, got --drain"),
        (["--resume", "--times", "3"], "want SAT, got --resume"),
        (["--resume", "--data", "x"], "leave --data out"),
        (["0"], "want at least 1 sat"),
        (["0", "--drain", "--yes"], "got 0 sat and --drain"),
    ],
)
def test_fault_45_arguments_of_which_one_would_be_ignored_are_refused(words: list[str], sentence: str) -> None:
    """Nothing is paid, the sentence names both, and programs get JSON."""
    with Liar() as liar:
        name = opened(liar.url)
        refused = run_command("pay", name, *words)
        for_programs = run_command("pay", name, *words, "--json")

        assert liar.received_sat == OPEN_PRICE_SAT
    assert (refused.exit_code, for_programs.exit_code) == (1, 1)
    assert sentence in refused.stderr
    assert sentence in json.loads(for_programs.stdout)["error"]


def test_fault_45_a_drain_keeps_the_limit_and_needs_a_yes() -> None:
    """Without a terminal --yes is needed; the limit holds all the same."""
    with Liar() as liar:
        name = opened(liar.url)
        left = FUNDING_SAT - OPEN_PRICE_SAT
        for words in (["--drain"], ["--drain", "--json"]):
            refused = run_command("pay", name, *words)
            assert refused.exit_code == 1
            assert "--yes" in refused.output
        refused = run_command("pay", name, "--drain", "--yes", "--limit", left - 1)
        assert refused.exit_code == 1
        assert f"{left:,} sat is above your own limit" in refused.stderr
        assert liar.received_sat == OPEN_PRICE_SAT

        assert run_json("pay", name, "--drain", "--yes", "--limit", left)["left_sat"] == 0
        assert liar.received_sat == FUNDING_SAT


def test_fault_45_a_drain_asks_on_a_terminal() -> None:
    """The question names amount and server; no is no, and yes is yes."""
    with Liar() as liar:
        name = opened(liar.url)
        with PseudoTerminal([COMMAND, "channel", "pay", name, "--drain"]) as terminal:
            terminal.read_until(r"990,000\s+sat.*\[y/N\]")
            terminal.enter("n")
            terminal.read_until("Aborted")
        assert liar.received_sat == OPEN_PRICE_SAT
        with PseudoTerminal([COMMAND, "channel", "pay", name, "--drain"]) as terminal:
            terminal.read_until(r"\[y/N\]")
            terminal.enter("y")
            terminal.read_until("Settled by")
        assert liar.received_sat == FUNDING_SAT


@pytest.mark.parametrize("amount", [1, 100, OPEN_PRICE_SAT])
def test_fault_59_an_amount_that_does_not_suffice_is_refused(amount: int) -> None:
    """It is not raised without a word; no channel is made."""
    with Liar() as liar:
        refused = run_command("new", liar.url, "--hours", 100, "--amount", amount)

    assert refused.exit_code == 1
    assert f"amount to fund in satoshi is {amount:,}, want at least {OPEN_PRICE_SAT + 700:,}" in refused.stderr
    assert run_json("list") == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--debug", "--amount", "500000"], "leave one out"),
        (["--no-wait", "--pay", "20000"], "channel open NAME --amount 20000"),
        (["--debug", "--pay", "20000"], "channel open NAME --amount 20000"),
    ],
)
def test_fault_59_options_that_a_new_channel_would_ignore_are_refused(words: list[str], sentence: str) -> None:
    """No channel is made."""
    with Liar() as liar:
        refused = run_command("new", liar.url, "--hours", 100, *words)

    assert refused.exit_code == 1
    assert sentence in refused.stderr
    assert run_json("list") == []


# --- prices ---------------------------------------------------------------------------------------------------------


def test_fault_53_the_price_is_said_before_it_is_paid(system: System) -> None:
    """`new` shows price and terms, also in debug mode; `open` names the price and the server before it pays."""
    for words in (["--debug"], ["--no-wait"]):
        shown = run_command("new", system.url, "--hours", 100, *words).stdout
        assert "100,000 sat" in shown
        assert "Payments end" in shown
        assert "Expires" in shown
    name = run_json("new", system.url, "--hours", 100, "--debug")["name"]
    assert rows(run_command("status", name, "--offline").stdout)["Opening"].startswith("pays 100,000 sat of")

    result = run_command("open", name)

    assert "Opening pays 100,000 sat of" in result.stderr
    assert system.url in result.stderr


# --- facts ----------------------------------------------------------------------------------------------------------


def test_fault_59_what_was_paid_and_what_is_pending_are_two_things() -> None:
    """A refused payment is not among the paid ones."""
    with Liar() as liar:
        name = opened(liar.url)
        liar.lies.append(Lie(deaf=True, status=400, body=b'{"code":"application_error","error":"no"}'))
        run_command("pay", name, 5)
        shown = rows(run_command("status", name, "--offline").stdout)
        (listed,) = run_json("list")

    assert shown["Paid"] == "10,000 sat"
    assert shown["Pending"].startswith("5 sat signed, but refused")
    assert (listed["paid_sat"], listed["pending_sat"]) == (OPEN_PRICE_SAT, 5)


@pytest.mark.parametrize("ending", [State.CLOSED, State.REFUNDED])
def test_fault_59_nothing_is_left_in_a_channel_that_ended(ending: State) -> None:
    """Panel, list and JSON agree."""
    with Liar() as liar:
        name = opened(liar.url)
    with Payer() as payer, payer.channel(name) as channel:
        channel._keep(structs.replace(channel.record, state=ending))

    assert rows(run_command("status", name, "--offline").stdout)["Left"] == "0 sat"
    assert run_json("list")[0]["left_sat"] == 0
    assert "990,000" not in run_command("list").stdout


@pytest.mark.parametrize("command", ["status", "close"])
def test_fault_59_a_channel_that_the_server_closed_is_told_and_no_error(command: str) -> None:
    """The exit status is 0, and the output says how the channel ended."""
    with Liar() as liar:
        name = opened(liar.url)
        gone = f'{{"code":"channel_closed","error":"settled","txid":"{TXID}"}}'.encode()
        liar.lies.append(Lie(deaf=True, status=410, body=gone))
        result = run_command(command, name)

    assert result.exit_code == 0, result.output
    assert TXID in result.stdout
    assert "had ended before" in result.stdout or "closed" in result.stdout
    assert run_json("close", name)["before"] is True


# --- forgetting -----------------------------------------------------------------------------------------------------


def test_fault_59_a_channel_that_was_never_funded_is_forgotten(system: System, wallet: Path) -> None:
    """It leaves the list, and its file stays beside the wallet's; moved back it is a channel again."""
    with Liar() as liar:
        names = [run_json("new", liar.url, "--hours", 100)["name"] for _ in range(2)]
        kept = run_json("forget", *names)

    assert [each["name"] for each in kept] == names
    assert run_json("list") == []
    file = wallet / FORGOTTEN / f"{names[0]}.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    file.rename(wallet / file.name)
    assert run_json("list")[0]["name"] == names[0]


def test_fault_59_a_channel_of_debug_mode_is_forgotten_at_any_time(system: System) -> None:
    """Its coins are in no chain."""
    name = run_json("new", system.url, "--hours", 100, "--debug")["name"]
    run_json("open", name)

    assert "Forgot" in run_command("forget", name).stdout
    assert run_json("list") == []


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda channel: structs.replace(channel.record), "the server does not say whether coins came"),
        (
            lambda channel: structs.replace(channel.record, funding_outpoint="ab" * 32 + ":0", funding_sat=50_000),
            "50,000 sat in",
        ),
        (lambda channel: structs.replace(channel.record, state=State.CLOSED), "server's claim"),
        (lambda channel: structs.replace(channel.record, state=State.REFUNDED, end_seen=True), "own key"),
    ],
)
def test_fault_59_a_channel_that_may_hold_coins_stays(prepare: Any, sentence: str) -> None:
    """Coins that are known, an answer that fails, and an end that no chain showed stand against it."""
    with Liar() as liar:
        name = run_json("new", liar.url, "--hours", 100)["name"]
    with Payer() as payer, payer.channel(name) as channel:
        change_record(channel, prepare)

    refused = run_command("forget", name)

    assert refused.exit_code == 1
    assert sentence in refused.stderr
    assert len(run_json("list")) == 1


def change_record(channel: Channel, prepare: Any) -> None:
    channel._keep(prepare(channel))


# --- the terminal ---------------------------------------------------------------------------------------------------


def test_fault_40_json_is_plain_whatever_the_environment_asks_for(system: System, wallet: Path) -> None:
    """`FORCE_COLOR` and its relatives colour no JSON, in successes and failures."""
    forced = os.environ | {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TERM": "xterm-256color", "TTY_COMPATIBLE": "1"}

    def output(*words: str) -> str:
        done = subprocess.run(
            [COMMAND, "channel", *words, "--json"], env=forced, capture_output=True, text=True, check=False
        )
        assert "\x1b" not in done.stdout
        json.loads(done.stdout)
        return done.stdout

    name = json.loads(output("new", system.url, "--hours", "100", "--debug"))["name"]
    for words in (["open", name], ["pay", name, "1"], ["list"], ["status", name], ["key", name], ["close", name]):
        output(*words)
    output("pay", "no-channel", "1")


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_fault_40_an_ascii_terminal_gets_the_address(system: System, locale: dict[str, str]) -> None:
    """The invitation is complete without characters beyond ASCII."""
    words = [COMMAND, "channel", "new", system.url, "--hours", "100", "--no-wait"]
    done = subprocess.run(words, env=os.environ | locale, capture_output=True, check=False)

    assert done.returncode == 0, done.stderr
    address = run_json("list")[0]["funding_address"]
    assert address.encode() in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a process as a user without an entry")
def test_fault_40_a_user_without_an_entry_gets_sentences(system: System, tmp_path: Path) -> None:
    """With a wallet that is named the commands work; without one a sentence names the missing directory."""
    place = Path(f"/tmp/paychan-{os.getpid()}-wallet")
    place.mkdir(mode=0o700)
    os.chown(place, 54_321, 54_321)
    plain = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        program = (
            "import os, importlib\n"
            f"for name in {MODULES}: importlib.import_module(name)\n"
            "import pkgutil, typer._click as parts\n"
            "names = [each.name for each in pkgutil.iter_modules(parts.__path__, parts.__name__ + '.')]\n"
            "for name in names: '_win' in name or importlib.import_module(name)\n"
            "os.setgid(54321); os.setuid(54321)\n"
            "from paychan.cli.main import main; main()"
        )
        command = [sys.executable, "-c", program, *words]
        return subprocess.run(command, env=plain | more, cwd="/", capture_output=True, text=True, check=False)

    for words in (["channel", "list"], ["channel", "new", system.url, "--debug"], ["node", "start"]):
        done = run(*words)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode in (1, 2)
        assert done.stderr.startswith("paychan:")
    done = run("channel", "new", system.url, "--debug", "--hours", "100", PAYCHAN_WALLET=str(place))
    assert done.returncode == 0, done.stderr
