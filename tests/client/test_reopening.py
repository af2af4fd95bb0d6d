"""The operator restored a backup from before the opening: the client opens its channel again, and nothing counts twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paychan.cli.payer.channel import app
from paychan.client import (
    AsyncPayer,
    Channel,
    ChannelConflict,
    ChannelUnknown,
    Dialect,
    Payer,
    PaymentRefused,
    ServerFailed,
    State,
    Unreachable,
)
from tests.client.conftest import DRAINS, PATIENT, OpenChannel
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, Liar, Lie
from tests.lib.application import Application, yes
from tests.lib.restoring import back_up, lose_and_restore
from tests.lib.system import System

PAID_SAT = 10_000
REPLY_LOST = Lie(drop=True)
REQUEST_LOST = Lie(deaf=True, drop=True)

both_versions = pytest.mark.parametrize("version", [1, 2])


# --- the real server ------------------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path / "system") as running:
        yield running


def paid_channel(payer: Payer) -> Channel:
    """A channel that has paid `PAID_SAT` after its opening."""
    channel = payer.new_channel(hours=100)
    channel.fund_debug()
    channel.open()
    channel.pay(PAID_SAT)
    return channel


def received(system: System, channel: Channel) -> int:
    """Satoshi that the server has in its record of a channel."""
    return int(system.channel(channel.record.funding_outpoint)["value_received"])


@pytest.mark.parametrize(("version", "dialect"), [(1, Dialect.S), (2, Dialect.S), (2, Dialect.A)])
def test_fault_11_a_channel_that_the_server_lost_is_opened_again(
    system: System, tmp_path: Path, version: int, dialect: Dialect
) -> None:
    """Paying, resuming, paying many times, draining, asking and closing all go on; all that was paid is settled."""
    backup = back_up(system)
    payer = Payer(system.url, wallet=tmp_path, version=1 if version == 1 else 2, dialect=dialect, limits=DRAINS)
    pays, resumes, many, drains, asks, closes = (paid_channel(payer) for _ in range(6))
    secrets = {each.record.secret for each in (pays, resumes, many)}
    lose_and_restore(system, backup)

    receipt = pays.pay(100)
    assert (receipt.reopened, receipt.paid_sat, receipt.again_sat, receipt.repeated) == (True, 100, 0, False)
    assert not pays.pay(1).reopened
    receipt = resumes.resume()
    assert (receipt.reopened, receipt.paid_sat) == (True, 0)
    assert many.pay_many(1, 300).reopened
    receipt = drains.pay(drain=True)
    assert (receipt.reopened, receipt.left_sat) == (True, 0)
    assert not asks.status().unacknowledged
    assert closes.close().change_sat == closes.record.funding_sat - closes.paid_sat

    for channel in (pays, resumes, many, asks, closes):
        assert received(system, channel) == channel.paid_sat
        if channel is not closes:
            assert channel.record.state is State.OPEN
            assert channel.close().change_sat == channel.left_sat
            assert Payer(wallet=tmp_path).wallet.read(channel.name).state is State.CLOSED
    assert secrets.isdisjoint({each.record.secret for each in (pays, resumes, many)}) == (version == 2)


async def test_fault_11_the_same_for_tasks(system: System, tmp_path: Path) -> None:
    """`AsyncChannel` opens a lost channel again as well, and pays many times over its new stream."""
    backup = back_up(system)
    async with AsyncPayer(system.url, wallet=tmp_path) as payer:
        channel = await payer.new_channel(hours=100)
        await channel.fund_debug()
        await channel.open()
        await channel.pay(PAID_SAT)
        lose_and_restore(system, backup)
        assert (await channel.pay(7)).reopened
        assert not (await channel.pay_many(1, 300)).reopened
        assert system.channel(channel.record.funding_outpoint)["value_received"] == channel.paid_sat


def test_fault_11_the_command_tells_of_the_opening(system: System, tmp_path: Path) -> None:
    """`paychan channel pay` and `pay --resume` say so to a person and to a program."""
    backup = back_up(system)
    channels = [paid_channel(Payer(system.url, wallet=tmp_path)) for _ in range(2)]
    for channel in channels:
        channel.release()
    lose_and_restore(system, backup)
    said = CliRunner().invoke(app, ["pay", channels[0].name, "1", "--wallet", str(tmp_path)])
    assert "the server had lost this channel, which was opened again" in said.output
    told = CliRunner().invoke(app, ["pay", channels[1].name, "--resume", "--json", "--wallet", str(tmp_path)])
    assert json.loads(told.stdout)["reopened"] is True


def test_fault_11_the_application_is_asked_about_new_payments_alone(tmp_path: Path) -> None:
    """The opening carries the acknowledged payments and asks nothing; the next question has its own increment."""
    with (
        Application() as application,
        System(tmp_path / "system", sections={"callback": f'url = "{application.url}"'}) as system,
    ):
        application.answer = lambda _: yes("delivered")
        backup = back_up(system)
        channel = paid_channel(Payer(system.url, wallet=tmp_path))
        lose_and_restore(system, backup)
        assert channel.pay(100, application_data="order 2").application_data == "delivered"
        first, second = [question.body for question in application.questions]
        assert (first["value_received"], second["value_received"]) == (PAID_SAT, 100)
        assert second["received_sat"] == channel.paid_sat
        assert application.questions[0].idempotency_key != application.questions[1].idempotency_key


# --- answers that are lost, refused or false ------------------------------------------------------------------------


@both_versions
@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST])
@pytest.mark.parametrize("patient", [False, True])
def test_fault_11_a_lost_answer_to_the_second_opening(
    liar: Liar, opened: OpenChannel, loss: Lie, patient: bool, version: int
) -> None:
    """Whether the server got that opening or not, the next attempt continues on one channel; each payment counts once."""
    channel = opened(version, **({"patience": PATIENT} if patient else {}))
    channel.pay(100)
    liar.channel = None
    liar.lies.extend([None, loss])
    if not patient:
        with pytest.raises(Unreachable):
            channel.pay(10)
        assert channel.resume().reopened == (version == 2 or loss is REQUEST_LOST)  # v1 has no secret that changes
    else:
        assert channel.pay(10).reopened
    assert not channel.pay(1).reopened
    assert liar.received_sat == OPEN_PRICE_SAT + 111 == channel.paid_sat


@both_versions
def test_fault_11_a_busy_server_is_asked_again_later(liar: Liar, opened: OpenChannel, version: int) -> None:
    """503 to the opening decides nothing."""
    channel = opened(version)
    liar.channel = None
    liar.lies.extend([None, Lie(deaf=True, status=503, body=b"{}")])
    with pytest.raises(ServerFailed):
        channel.pay(10)
    assert channel.resume().reopened


@both_versions
@pytest.mark.parametrize("asked", [True, False])
def test_fault_11_a_payment_without_an_answer_is_finished_after_the_opening(
    liar: Liar, opened: OpenChannel, asked: bool, version: int
) -> None:
    """A server that lost the channel refused no payment: the next one, smaller, finishes the pending one first."""
    channel = opened(version)
    liar.lies.append(REQUEST_LOST)
    with pytest.raises(Unreachable):
        channel.pay(128)
    liar.channel = None
    if asked:
        assert not channel.status().refused

    receipt = channel.pay(7)

    assert receipt.earlier is not None
    assert (receipt.earlier.paid_sat, receipt.paid_sat) == (128, 7)
    assert liar.received_sat == OPEN_PRICE_SAT + 135 == channel.paid_sat


@both_versions
def test_fault_11_a_refused_second_opening_refuses_no_payment(liar: Liar, opened: OpenChannel, version: int) -> None:
    """Neither the answer "unknown channel" nor a refusal of the opening is about the pending payment."""
    channel = opened(version)
    liar.channel = None
    refusal = b'{"code":"expiry_too_soon","error":"expires too soon","need":5}'
    liar.lies.extend([None, Lie(deaf=True, status=400, body=refusal)])
    with pytest.raises(ChannelUnknown):
        channel.pay(128)
    assert not channel.record.refused

    earlier = channel.pay(7).earlier

    assert earlier is not None
    assert earlier.paid_sat == 128


@both_versions
def test_a_refused_closing_refuses_no_payment(liar: Liar, opened: OpenChannel, version: int) -> None:
    """The refusal of a closing is not one of the payment that has no answer."""
    channel = opened(version)
    liar.lies.extend([REQUEST_LOST, Lie(deaf=True, status=400, body=b'{"code":"not_economical","error":"no"}')])
    with pytest.raises(Unreachable):
        channel.pay(128)
    with pytest.raises(PaymentRefused):
        channel.close()

    assert (channel.record.refused, channel.record.unacknowledged) == (False, True)


@both_versions
def test_fault_11_a_404_by_mistake_costs_no_secret(liar: Liar, opened: OpenChannel, version: int) -> None:
    """The server has the channel under its earlier secret: the conflict is named, and the wallet keeps that secret."""
    channel = opened(version)
    channel.pay(100)
    not_found = Lie(deaf=True, status=404, body=b"")
    liar.lies.extend([not_found, None, not_found])
    with pytest.raises(ChannelConflict):
        channel.pay(10)
    assert channel.resume().paid_sat == 10
    assert liar.received_sat == channel.paid_sat


@both_versions
def test_fault_11_a_server_that_refuses_to_open_again(liar: Liar, opened: OpenChannel, version: int) -> None:
    """The error names the reason of the refusal; nothing more is signed, and the channel can be resumed."""
    channel = opened(version)
    liar.channel = None
    refusal = b'{"code":"expiry_too_soon","error":"expires too soon","need":5}'
    liar.lies.extend([None, Lie(deaf=True, status=400, body=refusal)])
    with pytest.raises(ChannelUnknown, match="expires too soon") as caught:
        channel.pay(10)
    assert (caught.value.code, caught.value.fields["refusal"]) == ("unknown_channel", "expiry_too_soon")
    assert (channel.record.state, channel.left_sat) == (State.OPEN, FUNDING_SAT - OPEN_PRICE_SAT - 10)
    assert channel.resume().reopened


def test_fault_11_a_moved_channel_with_little_paid_is_not_opened_again(liar: Liar, opened: OpenChannel) -> None:
    """At its new output it has not paid the open price, and the client pays none unasked: it waits for the server."""
    channel = opened(movable=True)
    liar.withdraw()
    channel.pay(50)
    there, liar.channel = liar.channel, None
    liar.requests.clear()
    with pytest.raises(ChannelUnknown):
        channel.pay(10)
    assert all(request.startswith("PUT") for request in liar.requests)
    liar.channel = there
    assert channel.resume().paid_sat == 10


@pytest.mark.parametrize("code", ["no_such_route", "other"])
def test_fault_11_another_404_opens_nothing(liar: Liar, opened: OpenChannel, code: str) -> None:
    """A 404 that names another reason says nothing about the channel."""
    channel = opened()
    liar.requests.clear()
    liar.lies.append(Lie(deaf=True, status=404, body=json.dumps({"code": code, "error": "no"}).encode()))
    with pytest.raises(ChannelUnknown):
        channel.pay(10)
    assert len(liar.requests) == 1
    assert channel.resume().paid_sat == 10


def test_fault_11_closing_with_a_fee_goes_on_after_the_opening(liar: Liar, opened: OpenChannel) -> None:
    """The closing payment that was under way is sent again as it was."""
    channel = opened()
    channel.pay(100)
    liar.lies.append(REQUEST_LOST)
    with pytest.raises(Unreachable):
        channel.close(fee_sat=500)
    liar.channel = None
    assert channel.close().change_sat == FUNDING_SAT - OPEN_PRICE_SAT - 600


def test_fault_11_a_refused_closing_after_the_opening(liar: Liar, opened: OpenChannel) -> None:
    """The channel is open again, under the new secret."""
    channel = opened()
    channel.pay(100)
    liar.channel = None
    liar.lies.extend([None, None, Lie(deaf=True, status=400, body=b'{"code":"not_economical","error":"no"}')])
    with pytest.raises(PaymentRefused):
        channel.close()
    assert not channel.pay(1).reopened
