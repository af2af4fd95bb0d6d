"""`paychan channel pay`: a series stays within its sum, says how far it is, and counts as the wallet does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from paychan.cli import terminal
from paychan.cli.payer import pay_command
from paychan.cli.payer.options import amount_of
from paychan.client import Payer
from tests.client.liar import Liar, Lie
from tests.client.test_cli import run_command, run_json
from tests.client.test_cli_says import opened
from tests.lib.system import System


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


@pytest.fixture(autouse=True)
def wallet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own wallet."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "wallet"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "wallet"


@pytest.fixture
def name(system: System) -> str:
    """An open channel."""
    made = str(run_json("new", system.url, "--hours", 100, "--debug")["name"])
    run_json("open", made)
    return made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([2, "--times", "600,000"], "600,000 times 2 sat are 1,200,000 sat in all, and --total is 1,000,000 sat"),
        ([2, "--times", 6, "--limit", 10], "6 times 2 sat are 12 sat in all, and --total is 10 sat"),
        ([2, "--times", 6, "--total", 11], "6 times 2 sat are 12 sat in all, and --total is 11 sat: --total 12 allows"),
        ([1, "--times", 10**17, "--yes"], f"want to pay {10**17:,} sat"),
        ([0, "--times", 6], "want at least 1 sat"),
    ],
)
def test_a_series_beyond_its_sum_pays_nothing(name: str, words: list[Any], said: str) -> None:
    """The limit of a single payment does not bound a series, so the series has a limit of its own."""
    before = run_json("status", name, "--offline")["left_sat"]
    refused = run_command("pay", name, *words)

    assert refused.exit_code == 1
    assert said in refused.stderr
    assert run_json("status", name)["left_sat"] == before


def test_a_series_beyond_its_sum_is_confirmed(name: str) -> None:
    """--yes and a larger --total are the payer's word."""
    left = run_json("status", name, "--offline")["left_sat"]

    assert run_json("pay", name, 2, "--times", 3, "--limit", 2, "--yes")["left_sat"] == left - 6
    assert run_json("pay", name, 2, "--times", 3, "--limit", 2, "--total", 6)["left_sat"] == left - 12


def test_a_series_without_a_number_ends_at_its_sum(name: str) -> None:
    """--every goes on until Ctrl-C, and at the latest until --total is paid."""
    left = run_json("status", name, "--offline")["left_sat"]

    assert run_json("pay", name, 2, "--every", 0.001, "--total", 7)["left_sat"] == left - 6


def test_a_series_in_a_pipe_says_how_far_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines on standard error take the place of the bar."""
    monkeypatch.setattr(pay_command, "_TELL_SECONDS", 0.0)

    shown = run_command("pay", name, 1, "--times", 1000)
    assert re.search(r"Paying: [0-9]+ of 1,000 payments, [0-9]+ sat, [0-9,]+ payments/s", shown.stderr)
    assert "1,000 times 1 sat" in shown.stdout


def test_an_interrupted_series_counts_as_the_wallet_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C, what is said as acknowledged and as pending are the sums of `status`, and none counts twice."""
    before = run_json("status", name, "--offline")["paid_sat"]

    def interrupt(self: Progress, task: Any, *, completed: int, **_: Any) -> None:
        if completed >= 256:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupt)
    stopped = run_command("pay", name, 3, "--times", 1000)

    assert stopped.exit_code == 130
    record = run_json("status", name, "--offline")
    paid, pending = record["paid_sat"] - before, record["pending_sat"]
    assert pending
    assert f"stopped after {paid // 3} acknowledged payments, {paid:,} sat." in stopped.stderr
    assert f" {pending // 3} payments more, {pending:,} sat, may be paid already" in stopped.stderr
    assert f"In all, the server acknowledged {record['paid_sat']:,} sat" in stopped.stderr
    assert run_json("pay", name, "--resume")["total_paid_sat"] == record["paid_sat"] + pending


def test_a_payment_that_counted_has_a_status_of_its_own() -> None:
    """A script that repeats what failed must not repeat a payment that counted."""
    with Liar() as liar:
        name = opened(liar.url)
        liar.lies.append(Lie({"value_received": 5}))
        shown = run_command("pay", name, 35, "--json")

    assert shown.exit_code == 3
    assert json.loads(shown.stdout)["payment_counted"] is True


@pytest.mark.parametrize("text", ["1000", "1,000", "1_000", " 1000 "])
def test_amounts_are_read_as_they_are_printed(text: str) -> None:
    assert amount_of(text) == 1000


@pytest.mark.parametrize("text", ["1,00", "1.000", "10,00,000", "1e3", "", "\u0661\u0660"])
def test_other_amounts_are_refused(text: str) -> None:
    """A group that is not one may be a slip, and a point is a fraction elsewhere."""
    refused = run_command("pay", "4593d97a", text)

    assert refused.exit_code == 2
    assert "is not a whole number of satoshi" in refused.stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1", "http://127.0.0.1"),
        ("shop.example/pay", "https://shop.example/pay"),
        ("https://", "http:// or https://, host, port and path only"),
    ],
)
def test_a_text_that_is_no_url_is_named_with_the_url_that_was_meant(typed: str, meant: str) -> None:
    """It is not a matter of terms, and no option changes it."""
    refused = run_command("new", typed)

    assert refused.exit_code == 1
    assert f"{typed!r} is not the URL of a server: want {meant}." in refused.stderr
    assert "--help" not in refused.stderr
    assert json.loads(run_command("new", typed, "--json").stdout)["code"] == "wrong_url"


@pytest.mark.parametrize("other", ["http://LOCALHOST:{}/", "http://127.0.0.1:{}", "http://[::1]:{}/"])
def test_one_server_under_two_names_gets_one_channel(system: System, other: str) -> None:
    """A second channel would pay the opening price once more."""
    port = system.url.rpartition(":")[2]
    with Payer(f"http://localhost:{port}") as payer:
        first = payer.channel_for(room_sat=10).name
    with Payer(other.format(port)) as payer:
        assert payer.channel_for(room_sat=10).name == first


def test_a_payment_that_takes_long_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person sees nothing else until the answer comes."""
    monkeypatch.setattr(terminal, "_QUIET_SECONDS", 0.01)
    with Liar() as liar:
        name = opened(liar.url)
        liar.lies.append(Lie(seconds=0.3))
        shown = run_command("pay", name, 1)

    assert shown.stderr.startswith("Waiting for the server's answer. The payment is signed and kept")


def test_closing_names_a_payment_that_was_never_answered() -> None:
    """The sum comes back; without a word the payer could not tell."""
    with Liar() as liar:
        name = opened(liar.url)
        refusal = b'{"code": "payment_pending", "error": "the application has not answered"}'
        liar.lies.extend([Lie(body=refusal, status=503, deaf=True)] * 9)
        failed = run_command("pay", name, 9)
        liar.lies.clear()
        shown = run_command("close", name).stdout

    assert "the payment of 9 sat is signed and kept" in failed.stderr
    assert "9 sat of a payment that no answer accepted" in shown


def test_debug_mode_is_named_and_has_no_refund(name: str) -> None:
    """The network is that of the addresses; no chain has the coins, so no command brings them back."""
    listed = next(each for each in run_json("list") if each["name"] == name)

    assert (listed["debug"], listed["way_back"]) == (True, "")
    assert "refund" not in run_command("key", name).output


def test_an_amount_of_nothing_has_a_code(name: str) -> None:
    """Programs read the code; it was the name of a class of Python."""
    assert json.loads(run_command("pay", name, 0, "--json").stdout)["code"] == "amount_too_small"
    assert json.loads(run_command("pay", name, "--json").stdout)["code"] == "wrong_value"
