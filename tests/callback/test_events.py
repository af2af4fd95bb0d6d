"""Messages about a channel's life: each arrives at a real application, in order, also after kills of either side."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook

from tests.lib.application import Application, Question, Reply, yes
from tests.lib.rbpcp import V1, V2, Payer
from tests.lib.readme import ROOT
from tests.lib.system import System

FUNDING_SAT = 12_345_678_900_000
KEY = f"whsec_{base64.b64encode(bytes(32)).decode()}"
SILENT, SERVER_ERROR = Reply(0, b""), Reply(500, b"")


@pytest.fixture
def application() -> Iterator[Application]:
    with Application() as running:
        yield running


@pytest.fixture
def system(tmp_path: Path, application: Application) -> Iterator[System]:
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    settings = {
        "callback": f'url = "{application.url}"\ntimeout_seconds = 1\nalarm_minutes = 0\nkey_file = "{key_file}"'
    }
    with System(tmp_path / "system", sections=settings) as running:
        yield running


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30) as client:
        yield client


def opened(system: System, http: httpx.Client, paid_sat: int = 100_000) -> V1:
    """A new v1 channel."""
    v1 = V1(system.url, Payer(), http)
    assert v1.open(v1.payer.payment(paid_sat)).status_code == 201
    return v1


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def told(messages: list[Question], channel: V1 | V2) -> list[str]:
    """The kinds of messages about a channel, in the order of their first arrival."""
    kinds = [each.body["type"] for each in messages if each.body["channel_id"] == str(channel.payer.outpoint)]
    return list(dict.fromkeys(kinds))


def test_fault_48_the_opening_payment_is_told(application: Application, system: System, http: httpx.Client) -> None:
    """A signed message names the channel and its sum; it has all keys of the page."""
    v1 = opened(system, http)
    until(lambda: application.events)
    [event] = application.events
    name = str(v1.payer.outpoint)
    assert event.path == "/app/channel_event"
    assert Webhook(KEY).verify(event.raw, {key.lower(): value for key, value in event.headers.items()}) == event.body
    assert event.headers["webhook-id"] == event.body["idempotency_key"]
    assert event.body["idempotency_key"].startswith(f"{name}:opened:1:")
    assert abs(event.body.pop("time") - time.time()) < 30
    assert event.body == {
        "version": 1,
        "type": "opened",
        "channel_id": name,
        "idempotency_key": event.body["idempotency_key"],
        "sequence": 1,
        "client_pubkey": v1.payer.public_key.hex(),
        "chan_total_capacity": FUNDING_SAT,
        "received_sat": 100_000,
        "restored": False,
        "reason": None,
        "txid": None,
        "fee_sat": None,
        "client_fee_sat": None,
        "settled_channels": None,
        "continues_at": None,
    }


def test_fault_48_closing_and_settled_are_told_with_sum_fee_and_txid(
    application: Application, system: System, http: httpx.Client
) -> None:
    """The fee that a client offers at closing is no payment: the sum is without it."""
    v2 = V2(system.url, Payer(), http)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    assert v2.pay(v2.payer.payment(150_000)).status_code == 200
    closed = v2.close(v2.payer.payment(151_000)).json()
    until(lambda: told(application.events, v2) == ["opened", "closing", "settled"])
    closing, settled = (each.body for each in application.events[-2:])
    assert (closing["reason"], closing["received_sat"], closing["client_fee_sat"]) == ("client", 150_000, 1_000)
    assert closing["txid"] is closing["fee_sat"] is None
    assert (settled["txid"], settled["received_sat"], settled["settled_channels"]) == (
        closed["settlement_txid"],
        150_000,
        1,
    )
    assert settled["fee_sat"] >= 1_000
    assert closing["sequence"] < settled["sequence"]


def test_fault_48_messages_survive_kills_and_arrive_in_order(
    application: Application, system: System, http: httpx.Client
) -> None:
    """With a silent application a channel opens and settles; the server is killed; all messages come later, in order."""
    application.answer_event = lambda _: SILENT
    first, second = opened(system, http), opened(system, http)
    began = time.monotonic()
    assert first.close(first.payer.payment(100_000)).status_code == 202
    assert time.monotonic() - began < 1
    assert system.channel(first.payer.outpoint)["status"] == "closed"
    system.kill_server()
    application.forget()
    application.answer_event = lambda _: SILENT
    system.start_server()
    until(lambda: application.events)
    taken: list[Question] = []

    def take(question: Question) -> Reply:
        taken.append(question)
        return Reply(200, b"thanks")

    application.answer_event = take
    until(lambda: told(taken, first) == ["opened", "closing", "settled"] and told(taken, second) == ["opened"])
    taken.clear()
    system.restart_server()
    third = opened(system, http)
    until(lambda: told(taken, third) == ["opened"])
    assert len({*told(taken, first), *told(taken, second)}) <= 1  # killed between an acknowledgement and the removal


def test_a_message_that_is_refused_keeps_no_other_channel_waiting(
    application: Application, system: System, http: httpx.Client
) -> None:
    """Only the channel of the refused message pauses, and its later messages wait for the refused one."""
    bad = V1(system.url, Payer(), http)
    names = {str(bad.payer.outpoint)}

    def answer(question: Question) -> Reply:
        return SERVER_ERROR if question.body["channel_id"] in names else Reply(204, b"")

    application.answer_event = answer
    alarms = lambda: [each["channel"] for each in system.manage("GET", "/health").json()["alarms"]]  # noqa: E731
    assert bad.open(bad.payer.payment(100_000)).status_code == 201
    assert bad.close(bad.payer.payment(100_000)).status_code == 202
    good = [opened(system, http) for _ in range(3)]
    until(lambda: all(told(application.events, each) == ["opened"] for each in good))
    assert told(application.events, bad) == ["opened"]
    assert alarms() == [str(bad.payer.outpoint)]
    names.clear()
    until(lambda: told(application.events, bad) == ["opened", "closing", "settled"])


def test_a_silent_application_is_an_alarm(application: Application, system: System, http: httpx.Client) -> None:
    """After `callback.alarm_minutes` `/health` shows the alarm with the reason; an answer ends it; payments go on."""
    application.answer_event = lambda _: Reply(404, b"")
    v1 = opened(system, http)

    def alarms() -> list[str]:
        shown = system.manage("GET", "/health").json()["alarms"]
        return [each["text"] for each in shown if each["kind"] == "application"]

    until(alarms)
    assert "status 404" in alarms()[0]
    assert v1.pay(v1.payer.payment(150_000)).status_code == 200
    assert "status 404" in alarms()[0]
    application.answer_event = lambda _: Reply(204, b"")
    until(lambda: not alarms())


@pytest.mark.parametrize("limit", ["events = false", ""])
def test_only_paid_channels_are_told_and_only_if_configured(
    tmp_path: Path, application: Application, http: httpx.Client, limit: str
) -> None:
    """A channel that paid nothing leaves no message; `callback.events = false` ends all of them."""
    sections = {
        "callback": f'url = "{application.url}"\n{limit}',
        "open": "base_price_sat = 0\nadd_settlement_fee = false",
    }
    with System(tmp_path / "free", sections=sections) as system:
        opened(system, http, 0)
        paid = opened(system, http, 1_000)
        if limit:
            time.sleep(1)
            assert application.events == []
        else:
            until(lambda: application.events)
            assert [each.body["channel_id"] for each in application.events] == [str(paid.payer.outpoint)]


def test_after_a_restore_all_channels_that_can_still_change_are_told_again(
    application: Application, system: System, http: httpx.Client
) -> None:
    """A backup lacks the messages that waited: `opened` and the present part of each life come again, marked."""
    application.answer_event = lambda _: SILENT
    first, second = opened(system, http), opened(system, http)
    assert first.close(first.payer.payment(100_000)).status_code == 202
    made = system.manage("POST", "/backups").json()["path"]
    system.kill_server()
    shutil.rmtree(system.state / "store")
    command = Path(sys.executable).parent / "paychan"
    subprocess.run([command, "backup", "restore", str(system.server_file), made], check=True, capture_output=True)
    application.forget()
    system.start_server()
    until(lambda: told(application.events, first) == ["opened", "settled"])
    until(lambda: told(application.events, second) == ["opened"])
    assert all(each.body["restored"] for each in application.events)


def test_an_application_that_gives_no_answer_is_asked_less_and_less_often(
    application: Application, system: System, http: httpx.Client
) -> None:
    """The pause doubles also when there is no HTTP answer and only one message waits."""
    times: list[float] = []

    def silent(_: Question) -> Reply:
        times.append(time.monotonic())
        return SILENT

    application.answer_event = silent
    opened(system, http)
    until(lambda: len(times) == 4)
    first, second, third = (after - before for before, after in itertools.pairwise(times))
    assert first < 1.7 < second < 3.5 < third


def test_an_unanswered_question_is_a_warning_at_once(
    tmp_path: Path, application: Application, http: httpx.Client
) -> None:
    """`/health` shows it without `callback.alarm_minutes`; payments are not frozen; the next valid answer ends it."""
    with System(tmp_path / "asking", sections={"callback": f'url = "{application.url}"'}) as system:
        v1 = opened(system, http)

        def health() -> tuple[str, list[str], list[str]]:
            shown = system.manage("GET", "/health").json()
            return shown["status"], [each["kind"] for each in shown["alarms"]], shown["frozen"]

        assert health() == ("ok", [], [])
        application.answer = lambda _: SERVER_ERROR
        assert v1.pay(v1.payer.payment(150_000)).status_code == 503
        assert health() == ("warning", ["application"], [])
        command = [Path(sys.executable).parent / "paychan", "status", system.server_file]
        status = subprocess.run(command, capture_output=True, text=True, check=False)
        assert status.returncode == 1
        assert "accepted; see the alarm about the application" in status.stdout
        application.answer = lambda _: yes()
        assert v1.pay(v1.payer.payment(150_000)).status_code == 200
        assert health() == ("ok", [], [])


def test_the_page_shows_real_bodies(application: Application, system: System, http: httpx.Client) -> None:
    """Question and message of the page have the keys of real ones, in their order, the numbers, and how texts begin."""
    page = (ROOT / "paychan/callback/README.md").read_text()
    question, event = (json.loads(body) for body in re.findall(r"(?s)```json\n(.*?)\n```", page))
    v2 = V2(system.url, Payer(), http)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    payment = v2.body(v2.payer.payment(150_000), "two coffees")
    assert http.put(v2.resource(), content=payment).status_code == 200
    assert v2.close(v2.payer.payment(151_000)).is_success
    until(lambda: told(application.events, v2)[-1:] == ["settled"])
    assert shape(json.loads(application.questions[0].raw)) == shape(question)
    assert [*json.loads(application.events[-1].raw)] == [*event]


def shape(value: Any, key: str = "") -> Any:
    """Keys in order, numbers and words; of the random texts the first byte where the format fixes it."""
    if isinstance(value, dict):
        return [(name, shape(each, name)) for name, each in value.items()]
    if key in ("redeem_script", "signature_data"):
        return value[:2]
    return "" if key in RANDOM else value


RANDOM = {"client_pubkey", "funding_txid", "funding_vout", "change_address", "channel_id", "idempotency_key"}
