"""The operator withdraws from one channel, or from all above an amount, over HTTP and by the command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest
from typer.testing import CliRunner, Result

from paychan.cli.main import app
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.moving import OPENED_SAT, open_movable, withdraw
from tests.lib.customer import wait_for
from tests.lib.rbpcp import V1, V2, Payer, path, refusal
from tests.lib.system import System


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server only for this module, so that its channels are known."""
    with System(tmp_path_factory.mktemp("withdrawals")) as running:
        yield running


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def say(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def named(v2: V2) -> str:
    return path(v2.payer.outpoint).removeprefix("/v2")


def test_the_answer_to_a_withdrawal_has_the_new_outpoint(own: System, http: httpx.Client) -> None:
    """The old record shows the new outpoint; a repeat has the same answer; the successor is a normal channel."""
    v2 = open_movable(own.url, http, Dialect.S)
    first = withdraw(own, v2.payer.outpoint)
    assert (first["status"], first["close_reason"], first["moving"]) == ("closed", "withdraw", False)
    assert first["moved_to"] == f"{first['settlement_txid']}:0"
    assert withdraw(own, v2.payer.outpoint) == first
    successor = own.channel(first["moved_to"])
    assert (successor["status"], successor["value_received"]) == ("open", 0)
    assert successor["funding_value"] == first["value_left"]
    assert successor["moved_to"] is None
    by_key = own.manage("GET", f"/channels/{v2.payer.public_key.hex()}/info").json()
    assert by_key == successor


def test_a_channel_that_closes_is_not_withdrawn_from(own: System, http: httpx.Client) -> None:
    """If a channel closes for another reason, the answer is that error and not a move."""
    v2 = open_movable(own.url, http, Dialect.S)
    assert own.manage("POST", f"{named(v2)}/close").status_code == 200
    assert refusal(own.manage("POST", f"{named(v2)}/withdraw")) == (410, "channel_closed")


def test_all_channels_above_the_amount_are_withdrawn_from(own: System, http: httpx.Client) -> None:
    """Channels below the amount stay open, those that can't continue are counted, and refusals have their code."""
    rich, poor = (open_movable(own.url, http, dialect) for dialect in Dialect)
    fixed = V1(own.url, Payer(), http)
    for door in (rich, fixed):
        if isinstance(door, V1):
            assert door.open(door.payer.payment(2_000_000)).status_code == 201
        else:
            assert door.pay(door.payer.payment(2_000_000)).status_code == 200
    answer = own.manage("POST", "/withdraw?above=1000000").json()
    assert [channel["funding_source"] for channel in answer["channels"]] == [str(rich.payer.outpoint)]
    assert (answer["refused"], answer["not_withdrawable"]) == ([], 1)
    assert answer["not_withdrawable_because"] == {"change_elsewhere": 1, "opening_only": 0}
    assert (own.channel(fixed.payer.outpoint)["movable"], own.channel(poor.payer.outpoint)["movable"]) == (False, True)
    assert own.channel(poor.payer.outpoint)["status"] == "open"
    assert own.manage("POST", "/withdraw?above=1000000").json()["channels"] == []
    assert own.channel(poor.payer.outpoint)["value_received"] == OPENED_SAT


def test_each_refusal_of_many_is_listed(own: System, http: httpx.Client) -> None:
    """Without a signer every channel begins to move and waits; the answer has a refusal for each channel."""
    v2 = open_movable(own.url, http, Dialect.S)
    assert v2.pay(v2.payer.payment(3_000_000)).status_code == 200
    assert own.signer is not None
    own.signer.stop()
    try:
        shown = say("withdraw", own.server_file, "--above", 2_500_000).output
        assert "signer is not available" in shown
        assert str(v2.payer.outpoint) in shown
    finally:
        own.start_signer()
        wait_for(lambda: own.manage("GET", "/health").json()["signer"] == "debug", "signer is back")
    assert own.channel(v2.payer.outpoint)["close_reason"] == "withdraw"


@pytest.mark.parametrize("query", ["", "?above=0", "?above=-1", "?above=x", "?above=1&above=2", "?above="])
def test_an_amount_is_required(own: System, query: str) -> None:
    """The amount must be one number of at least 1."""
    assert refusal(own.manage("POST", f"/withdraw{query}"))[0] == 400


def test_withdrawing_needs_the_token(own: System, http: httpx.Client) -> None:
    """A withdrawal needs the token, like every change."""
    v2 = open_movable(own.url, http, Dialect.S)
    for where in (f"{named(v2)}/withdraw", "/withdraw?above=1"):
        answer = httpx.post(own.management_url + where, trust_env=False, verify=False)
        assert refusal(answer) == (401, "unauthorized")
    assert own.channel(v2.payer.outpoint)["status"] == "open"


def test_the_command_withdraws_from_one_channel(own: System, http: httpx.Client) -> None:
    """`paychan withdraw FILE OUTPOINT` shows the record, and `channels show` the new outpoint."""
    v2 = open_movable(own.url, http, Dialect.S)
    shown = say("withdraw", own.server_file, v2.payer.outpoint)
    assert shown.exit_code == 0, shown.output
    moved_to = own.channel(v2.payer.outpoint)["moved_to"]
    assert re.search(rf"moved to +{moved_to}", shown.output)
    assert moved_to in say("channels", "show", own.server_file, v2.payer.outpoint).output
    assert json.loads(say("withdraw", own.server_file, v2.payer.outpoint, "--json").output)["moved_to"] == moved_to


def test_the_command_withdraws_from_all(own: System, http: httpx.Client) -> None:
    """`--above` shows a line for each channel; with `--json` the answer is shown unchanged."""
    v2 = open_movable(own.url, http, Dialect.A)
    shown = say("withdraw", own.server_file, "--above", OPENED_SAT).output
    assert str(v2.payer.outpoint) in shown
    assert "continues at" in shown
    assert "more not withdrawn from: " in shown
    answer = json.loads(say("withdraw", own.server_file, "--above", OPENED_SAT, "--json").output)
    assert answer["channels"] == []


@pytest.mark.parametrize("words", [[], ["ab:0", "--above", "5"]])
def test_the_command_needs_a_channel_or_an_amount(own: System, words: list[str]) -> None:
    """The command needs exactly one of channel and amount."""
    result = say("withdraw", own.server_file, *words)
    assert result.exit_code == 1
    assert "--above SAT" in result.output


def test_the_command_has_help_with_examples() -> None:
    """--help shows both uses."""
    shown = say("withdraw", "--help").output
    assert "TXID:VOUT" in shown
    assert "--above 1000000" in shown
