"""`paychan pay URL` and `paychan wallet` against a real seller: output for people, JSON for programs, exit status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from paychan.cli.main import app
from paychan.cli.payer import pay_url
from paychan.protocol.wire.mpp_outcomes import read_receipt
from paychan.protocol.wire.x402_json import read_response
from paychan.protocol.wire.x402_outcomes import read_settled
from tests.client.conftest import OpenChannel
from tests.client.liar import Liar
from tests.client.paying.seller import Lie, Seller


@pytest.fixture
def seller(liar: Liar) -> Iterator[Seller]:
    with Seller(liar) as server:
        yield server


@pytest.fixture
def wallet(opened: OpenChannel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    opened().release()
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "wallet"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "wallet"


def run(*words: object, typed: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], input=typed)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run_json(*words: object) -> Any:
    return json.loads(run(*words, "--json").stdout)


@pytest.mark.usefixtures("wallet")
def test_an_answer_goes_to_standard_output(seller: Seller, tmp_path: Path) -> None:
    """The body alone is on standard output, the payment on standard error; --output writes a file."""
    result = run("pay", seller.url + "tile", "--max", 25)
    assert (result.exit_code, result.stdout) == (0, "goods")
    assert f"Paid 25 sat to {seller.host}; 989,975 sat are left in channel" in result.stderr

    (tmp_path / "body").write_bytes(b"\x00\xff")
    options = ("--data", f"@{tmp_path}/body", "-H", "X-One: 1", "-X", "PUT", "-o", tmp_path / "out", "--prefer", "mpp")
    assert run("pay", seller.url, "--max", 25, *options).exit_code == 0
    assert (tmp_path / "out").read_bytes() == b"goods"
    assert seller.bodies[-1] == b"\x00\xff"
    assert seller.seen[-1]["x-one"] == "1"
    assert seller.paid[-1] == "PUT /"


@pytest.mark.usefixtures("wallet")
def test_a_price_above_max_is_refused(seller: Seller) -> None:
    """Exit status 1 and a sentence with both numbers; --json has the same as an object."""
    result = run("pay", seller.url, "--max", 24)
    assert result.exit_code == 1
    assert "wants 25 sat" in result.stderr
    assert "--max SAT" in result.stderr
    assert run_json("pay", seller.url, "--max", 24)["code"] == "over_budget"
    assert "want --max SAT" in run("pay", seller.url).stderr
    assert seller.signed_sat == 0


@pytest.mark.usefixtures("wallet")
@pytest.mark.parametrize(("typed", "paid"), [("y\n", 25), ("n\n", 0)])
def test_without_max_the_terminal_is_asked(
    seller: Seller, monkeypatch: pytest.MonkeyPatch, typed: str, paid: int
) -> None:
    """The question names host and price."""
    monkeypatch.setattr(pay_url, "_has_terminal", lambda: True)
    result = run("pay", seller.url, typed=typed)

    assert f"{seller.host} wants 25 sat. Pay?" in result.stderr
    assert seller.signed_sat == paid
    assert result.exit_code == (0 if paid else 1)


def test_open_opens_a_channel_once(seller: Seller, liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --open the sentence names the command; with it the channel is opened and pays."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "new"))
    result = run("pay", seller.url, "--max", 25)
    assert result.exit_code == 1
    assert f"channel new {liar.url}" in result.stderr

    for _ in range(2):
        assert run("pay", seller.url, "--max", 25, "--open").exit_code == 0
    assert sum(request.startswith("POST") for request in liar.requests) == 1
    assert seller.signed_sat == 50


@pytest.mark.usefixtures("wallet")
def test_a_lost_answer_and_the_wallet(seller: Seller) -> None:
    """`paychan wallet` shows channels, sums by host and day, open requests and refusals; the same command pays once."""
    seller.lies.append(Lie(drop="after"))
    lost = run_json("pay", seller.url + "tile", "--max", 25)
    assert lost["code"] == "unreachable"
    run("pay", seller.url, "--max", 3)
    shown = run("wallet").stdout
    assert "Without answer" in shown
    assert f"{seller.host} wants 25 sat" in shown

    assert run_json("pay", seller.url + "tile", "--max", 25)["bills"][0]["charged_sat"] == 0
    found = run_json("wallet")
    assert found["spending"]["total_sat"] == 25
    assert found["spending"]["by_host"] == [{"host": seller.host, "spent_sat": 25}]
    assert [each["spent_sat"] for each in found["spending"]["by_day"]] == [25]
    assert found["spending"]["unanswered"] == []
    assert [each["code"] for each in found["spending"]["declined"]] == ["over_budget"]
    assert len(found["channels"]) == 1
    assert seller.signed_sat == 25


@pytest.mark.usefixtures("wallet")
def test_each_paid_answer_leaves_its_receipt(seller: Seller) -> None:
    """The list has the paid requests in order; --json has what a receipt says about its channel."""
    assert "No paid requests" in run("wallet", "receipts").stdout
    for prefer in ("x402", "mpp"):
        run("pay", f"{seller.url}{prefer}", "--max", 25, "--prefer", prefer)
    seller.lies.append(Lie(status=404))
    run("pay", seller.url + "nothing", "--max", 25)
    found = run_json("wallet", "receipts")

    assert [(each["url"], each["status"], each["charged_sat"]) for each in found] == [
        (seller.url + "x402", 200, 25),
        (seller.url + "mpp", 200, 25),
        (seller.url + "nothing", 404, 25),
    ]
    assert read_settled(read_response(found[0]["receipt"])).state.channel == seller.channel.outpoint
    assert read_receipt(found[1]["receipt"]).settled.charged_sat == 25
    assert found[2]["receipt"] == ""
    assert run("wallet", "receipts").stdout.count(seller.host) == 3


def test_options_of_the_wallet_stand_after_its_command(wallet: Path) -> None:
    """An option before the subcommand would be ignored, so it is refused."""
    result = run("wallet", "--wallet", wallet, "words")

    assert result.exit_code == 2
    assert "stand after" in result.stderr


@pytest.mark.usefixtures("wallet")
def test_limits_of_the_wallet_by_command(seller: Seller) -> None:
    """The command sets limits, keeps those that it does not name, and refuses hosts that are none; they hold for `pay`."""
    run("wallet", "budget", "--per-day", 60, "--per-host", 30)
    assert run_json("wallet", "budget", "--per-host", "40")["per_day_sat"] == 60
    assert run_json("pay", seller.url, "--max", 25)["bills"][0]["price_sat"] == 25
    assert run_json("pay", seller.url, "--max", 25)["code"] == "over_budget"
    assert run("wallet", "budget", "--host", "a/b").exit_code == 2

    shown, found = run("wallet").stdout, run_json("wallet")["budget"]
    assert "at most 60 sat, 35 sat left" in shown
    assert found["left_by_host"] == [{"host": seller.host, "left_sat": 15}]
    assert (found["left_per_day_sat"], found["per_request_sat"]) == (35, None)
    assert "no limits" in run("wallet", "budget", "--anew").stdout


@pytest.mark.usefixtures("wallet")
def test_a_backup_brings_the_sums_back(seller: Seller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restored wallet has what was spent and the wallet's limits."""
    run("wallet", "budget", "--total", 30)
    run("pay", seller.url, "--max", 25)
    assert run("wallet", "backup", tmp_path / "b.wallet").exit_code == 0
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "second"))
    assert run("wallet", "restore", tmp_path / "b.wallet").exit_code == 0

    assert run_json("pay", seller.url, "--max", 25)["limit"] == "wallet_total"
    assert run_json("wallet")["spending"]["total_sat"] == 25
