"""Forgotten channels: their keys are in each backup, and can be shown; their files say how they come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from paychan.cli.payer.wallet_commands import app as wallet_app
from paychan.client import ChannelForgotten, Payer, State
from paychan.client.backup import check, read_backup, restore, take_backup, write_backup
from paychan.client.wallet import FORGOTTEN, Wallet
from paychan.protocol.types import Network
from tests.client.liar import Liar
from tests.client.test_cli import run_command, run_json
from tests.client.test_cli_says import opened


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    """A server that is honest."""
    with Liar() as server:
        yield server


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the test's own wallet."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "wallet"))
    return tmp_path / "wallet"


@pytest.fixture
def name(liar: Liar) -> str:
    """A channel without coins, which was forgotten."""
    made = str(run_json("new", liar.url, "--hours", 100)["name"])
    with Payer() as payer, payer.channel(made) as channel:
        channel.fund_debug()
    assert "moved back" in run_command("forget", made).stdout
    return made


def wallet_command(*words: object) -> Result:
    return CliRunner().invoke(wallet_app, [str(word) for word in words])


def test_the_key_of_a_forgotten_channel_is_shown(name: str, place: Path) -> None:
    """`close` names that command for the change; the key is there all the same."""
    forgotten = Wallet(place / FORGOTTEN).read(name)

    shown = run_json("key", name)
    assert (shown["name"], shown["address"]) == (name, forgotten.home_address)


@pytest.mark.parametrize("words", [["status"], ["forget"], ["close"], ["pay", "--resume"]])
def test_other_commands_say_that_it_was_forgotten(name: str, place: Path, words: list[str]) -> None:
    """They name the file, and where it is a channel again."""
    refused = run_command(words[0], name, *words[1:])

    assert refused.exit_code == 1
    assert f"channel {name} was forgotten" in refused.stderr.replace("\n", " ")
    assert f"channel key {name}" in refused.stderr
    (place / FORGOTTEN / f"{name}.json").rename(place / f"{name}.json")
    assert [each["name"] for each in run_json("list")] == [name]


def test_a_backup_has_the_forgotten_channels(name: str, place: Path, tmp_path: Path) -> None:
    """A restore writes them to `forgotten`, and not to the list; a second one changes nothing."""
    write_backup(take_backup(Wallet(place), 1)[0], tmp_path / "one.wallet")
    backup, other = read_backup(tmp_path / "one.wallet"), Wallet(tmp_path / "other")

    assert restore(other, backup).forgotten == (name,)
    assert restore(other, backup).forgotten == ()
    assert (other.names(), Wallet(other.directory / FORGOTTEN).names()) == ([], [name])
    assert Wallet(other.directory / FORGOTTEN).read(name) == Wallet(place / FORGOTTEN).read(name)
    with pytest.raises(ChannelForgotten):
        other.find(name)
    assert check(other, backup) == []


def test_a_backup_without_forgotten_channels_is_as_before(liar: Liar, place: Path) -> None:
    """Earlier versions refuse a field that they don't know."""
    run_json("new", liar.url, "--hours", 100)
    backup = take_backup(Wallet(place), 1)[0]

    assert "forgotten" not in msgspec.json.decode(msgspec.json.encode(backup))


def test_check_looks_at_forgotten_channels(name: str, place: Path, tmp_path: Path) -> None:
    """A backup that lacks one is a problem, and so is a file that can't be read."""
    wallet = Wallet(place)
    lacks = msgspec.structs.replace(take_backup(wallet, 1)[0], forgotten=msgspec.UNSET)
    assert [(each.name, each.text) for each in check(wallet, lacks)] == [(name, "in the wallet, not in the backup")]
    assert json.loads(wallet_command("check", "--json").stdout)["forgotten"] == 1
    assert "0 channels and 1 forgotten one in" in wallet_command("check").stdout

    (place / FORGOTTEN / f"{name}.json").write_text("{}")
    refused = wallet_command("check")
    assert refused.exit_code == 1
    assert f"{FORGOTTEN}/{name}" in refused.stderr
    assert f"{FORGOTTEN}/{name} is not in it" in wallet_command("backup", tmp_path / "two.wallet").stderr


def test_an_older_backup_that_heals_is_no_problem(liar: Liar, place: Path, tmp_path: Path) -> None:
    """A payment needs no new backup, so a check does not fail after one; coins that the backup lacks are a problem."""
    path = tmp_path / "one.wallet"
    name = opened(liar.url)
    assert "Wrote 1 channel to" in wallet_command("backup", path).stdout.replace("\n", " ")
    run_json("pay", name, 2000)

    checked = wallet_command("check", path)
    assert checked.exit_code == 0, checked.output
    assert "2,000 sat were paid since the backup" in checked.stderr.replace("\n", " ")
    shown = json.loads(wallet_command("check", path, "--json").stdout)
    assert ([each["name"] for each in shown["notes"]], shown["problems"]) == ([name], [])

    wallet = Wallet(place)
    (old,) = read_backup(path).channels
    unopened = msgspec.structs.replace(old, state=State.NEW, funding_outpoint="")
    lacks = msgspec.structs.replace(read_backup(path), channels=(unopened,))
    assert [each.is_note for each in check(wallet, lacks)] == [False]


def test_a_channel_for_real_coins_is_forgotten_after_a_question(liar: Liar, place: Path) -> None:
    """Without a terminal, the caller gives --yes; the file stays in the list until then."""
    made = run_json("new", liar.url, "--hours", 100)["name"]
    path = place / f"{made}.json"
    record = Wallet(place).read(made)
    address = record.terms.funding_address(Network.LIVE)
    live = msgspec.structs.replace(record, network=Network.LIVE, funding_address=address, change_address=address)
    path.write_bytes(msgspec.json.encode(live))

    refused = run_command("forget", made)
    assert refused.exit_code == 1
    assert "--yes confirms it" in refused.stderr
    assert path.exists()


def test_the_descriptor_of_all_keys_is_not_printed_unasked(liar: Liar) -> None:
    """It gives the same access as the words."""
    run_json("new", liar.url, "--hours", 100)

    refused = wallet_command("words", "--descriptor")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "--yes" in refused.stderr
    assert wallet_command("words", "--descriptor", "--yes").stdout.startswith("pkh(xprv")
