"""A channel that the server moved: the payer follows, counts every payment once, and first saves a refund."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from bitcoin.core import CTransaction

from paychan.client import (
    AsyncPayer,
    Channel,
    ChannelMoving,
    Dialect,
    Payer,
    PaymentRefused,
    Refused,
    State,
    TermsUnacceptable,
    Unreachable,
    WouldTakeBack,
)
from paychan.client.flows.pay import pay
from paychan.client.flows.refund import key_address
from paychan.client.limits import Limits
from paychan.client.transport.effects import Request, Response, Save
from paychan.protocol.debug_funding import debug_outpoint
from tests.client.conftest import IMPATIENT, PATIENT, OpenChannel
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, TXID, Liar, Lie

ADDRESS = "mmA2XECa7bVERzQKkyy1pNBQ3PC4HnxTC5"
REPLY_LOST = Lie(drop=True)
REQUEST_LOST = Lie(drop=True, deaf=True)
UNPROVEN = Lie(change={"transaction": ...})
LEFT_SAT = FUNDING_SAT - OPEN_PRICE_SAT


@pytest.fixture(params=Dialect)
def movable(request: pytest.FixtureRequest, opened: OpenChannel) -> Channel:
    """A movable channel of each dialect, opened with 10,000 sat."""
    return opened(movable=True, dialect=request.param)


def holds(channel: Channel, liar: Liar, paid_sat: int) -> None:
    """Payer and server are at the same output and count the same sum; the newest refund is of that output."""
    record = channel.record
    assert liar.channel is not None
    assert record.funding_outpoint == str(liar.channel.outpoint)
    assert (record.funding_sat, record.left_sat) == (liar.channel.funding_sat, liar.channel.payment.change_sat)
    assert channel.paid_sat == liar.received_sat == OPEN_PRICE_SAT + paid_sat
    refund = CTransaction.deserialize(bytes.fromhex(record.refunds[-1]))
    assert bytes(refund.vin[0].prevout.hash) == record.outpoint.txid


# --- following ------------------------------------------------------------------------------------------------------


def test_a_payment_follows_the_channel_and_counts_once(liar: Liar, movable: Channel) -> None:
    """The old output answers 318 or 308; the payment is signed again for the new output, and the totals continue."""
    movable.pay(100)
    liar.withdraw()

    receipt = movable.pay(50)

    assert (receipt.paid_sat, receipt.total_paid_sat, receipt.repeated) == (50, OPEN_PRICE_SAT + 150, False)
    assert movable.record.earlier_paid_sat == OPEN_PRICE_SAT + 100
    holds(movable, liar, 150)
    assert len(liar.requests) == 6, "terms twice, opening, payment, and the last payment twice"


def test_a_channel_may_move_again_and_again(liar: Liar, movable: Channel, tmp_path: Path) -> None:
    """The payer follows each withdrawal, whichever process pays next."""
    for amount_sat in (1000, 2000, 3000):
        movable.pay(amount_sat)
        liar.withdraw()
    movable.release()
    with Payer(wallet=tmp_path / "wallet") as payer, payer.channel(movable.name) as again:
        again.pay(4)

        holds(again, liar, 6004)
        assert len(again.record.moves) == 3
        assert len(again.record.refunds) == 4


def test_the_new_refund_is_saved_before_a_payment_is_sent(liar: Liar, movable: Channel) -> None:
    """After the answer that moves the channel, the client first saves record and refund, then sends the request."""
    liar.withdraw()
    flow = pay(movable.record, 100, Limits(), IMPATIENT, drain=False, application_data="")
    assert isinstance(next(flow), Save)
    request = flow.send(None)
    assert isinstance(request, Request)
    effect = flow.send(ask(liar, request))

    assert isinstance(effect, Save)
    assert liar.channel is not None
    assert effect.record.funding_outpoint == str(liar.channel.outpoint)
    refund = CTransaction.deserialize(bytes.fromhex(effect.record.refunds[-1]))
    assert bytes(refund.vin[0].prevout.hash) == liar.channel.outpoint.txid
    assert refund.vout[0].nValue < LEFT_SAT
    request = flow.send(None)
    assert isinstance(request, Request)
    assert liar.channel.outpoint.txid_hex in request.url or liar.channel.outpoint.txid.hex() in request.url
    finish(flow, liar, request)


def ask(liar: Liar, request: Request) -> Response:
    answer = liar.truth(request.method, request.url.removeprefix(liar.url), request.body)
    return Response(answer.status, answer.reason, {"location": answer.headers.get("Location", "")}, answer.body)


def finish(flow: Generator[Any, Any, Any], liar: Liar, effect: Any) -> None:
    """Perform the rest of a flow, without saving records."""
    try:
        while True:
            effect = flow.send(ask(liar, effect) if isinstance(effect, Request) else None)
    except StopIteration:
        pass


@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST], ids=["booked", "not booked"])
def test_a_lost_payment_is_resumed_at_the_new_output(liar: Liar, movable: Channel, loss: Lie) -> None:
    """Whether or not the settlement includes the payment, it is signed again and counts once."""
    liar.lies.append(loss)
    with pytest.raises(Unreachable):
        movable.pay(100)
    liar.withdraw()

    receipt = movable.resume()

    assert (receipt.paid_sat, receipt.total_paid_sat) == (100, OPEN_PRICE_SAT + 100)
    assert receipt.repeated is (loss is REPLY_LOST)
    holds(movable, liar, 100)
    assert movable.pay(1).total_paid_sat == OPEN_PRICE_SAT + 101


@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST], ids=["booked", "not booked"])
def test_status_follows_and_compares_with_the_settlement(liar: Liar, movable: Channel, loss: Lie) -> None:
    """A status request moves the record, too; a payment that was not booked can still be resumed."""
    liar.lies.append(loss)
    with pytest.raises(Unreachable):
        movable.pay(100)
    liar.withdraw()

    now = movable.status()

    booked = loss is REPLY_LOST
    assert now.funding_sat == LEFT_SAT - 100 * booked
    assert now.unacknowledged is not booked
    movable.resume()
    holds(movable, liar, 100)


def test_a_refused_payment_that_was_booked_late_is_in_the_settlement(liar: Liar, movable: Channel) -> None:
    """If the application accepted a refused payment later, the next, larger payment pays the rest at the new output."""
    liar.lies.append(Lie(status=400, body=b'{"code":"application_error","error":"no answer"}'))
    with pytest.raises(PaymentRefused):
        movable.pay(100)
    liar.withdraw()
    with pytest.raises(WouldTakeBack):
        movable.pay(99)

    receipt = movable.pay(150)

    assert (receipt.paid_sat, receipt.repeated) == (150, True)
    holds(movable, liar, 150)


def test_a_refused_payment_stays_refused_at_the_new_output(liar: Liar, movable: Channel) -> None:
    """A signed payment counts as paid, also at the new output."""
    liar.lies.append(Lie(deaf=True, status=400, body=b'{"code":"application_error","error":"sold out"}'))
    with pytest.raises(PaymentRefused):
        movable.pay(100)
    liar.withdraw()
    assert movable.status().refused

    with pytest.raises(WouldTakeBack):
        movable.pay(99)
    assert movable.pay(100).paid_sat == 100
    holds(movable, liar, 100)


def test_draining_after_a_move(liar: Liar, movable: Channel) -> None:
    """Draining at the new output pays the rest, and closes the channel."""
    liar.withdraw()

    receipt = movable.pay(drain=True)

    assert (receipt.paid_sat, receipt.total_paid_sat, receipt.settlement_txid) == (LEFT_SAT, FUNDING_SAT, TXID)
    assert liar.received_sat == FUNDING_SAT


def test_a_lost_drain_after_a_move_is_resumed(liar: Liar, movable: Channel) -> None:
    """The total of a drained channel includes the payments at earlier outputs."""
    liar.withdraw()
    movable.pay(1)
    liar.lies.append(REPLY_LOST)
    with pytest.raises(Unreachable):
        movable.pay(drain=True)

    assert movable.resume().total_paid_sat == FUNDING_SAT


def test_a_channel_that_moved_before_its_opening_was_answered(liar: Liar, funded: OpenChannel) -> None:
    """The settlement includes the opening payment: opening again finds the channel at its new output."""
    channel = funded(movable=True)
    liar.lies.append(REPLY_LOST)
    with pytest.raises(Unreachable):
        channel.open()
    liar.withdraw()

    receipt = channel.open()

    assert (receipt.paid_sat, receipt.total_paid_sat, receipt.repeated) == (OPEN_PRICE_SAT, OPEN_PRICE_SAT, True)
    assert channel.record.state is State.OPEN
    channel.pay(5)
    holds(channel, liar, 5)


@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST], ids=["moved", "after the move"])
def test_an_interrupted_payment_after_a_move_is_resumed(liar: Liar, movable: Channel, loss: Lie) -> None:
    """If the answer at the new output is lost, the payment is resumed there."""
    liar.withdraw()
    liar.lies.extend([None, loss])
    with pytest.raises(Unreachable):
        movable.pay(100)
    receipt = movable.pay(1)

    assert receipt.earlier is not None
    assert receipt.earlier.total_paid_sat == OPEN_PRICE_SAT + 100
    holds(movable, liar, 101)


# --- during a move --------------------------------------------------------------------------------------------------


def test_a_request_during_a_move_is_repeated(liar: Liar, opened: OpenChannel) -> None:
    """After 503 the client asks again as often as its retry policy allows; the final error names the move."""
    channel = opened(movable=True, patience=PATIENT)
    liar.begin_withdrawal()
    before = len(liar.requests)
    with pytest.raises(ChannelMoving) as caught:
        channel.pay(100)

    assert (caught.value.code, caught.value.status) == ("channel_moving", 503)
    assert len(liar.requests) - before == PATIENT.attempts
    assert channel.record.unacknowledged
    assert not channel.record.refused


def test_a_move_without_its_transaction_is_requested_again(liar: Liar, opened: OpenChannel) -> None:
    """Without the transaction the record does not move; the server may show it in a later answer."""
    channel = opened(movable=True, patience=PATIENT)
    liar.withdraw()
    liar.lies.extend([UNPROVEN] * PATIENT.attempts)
    with pytest.raises(Refused) as caught:
        channel.pay(100)
    assert (caught.value.code, caught.value.status) == ("channel_moved", 318)
    assert channel.record.earlier_paid_sat == 0

    liar.lies.append(UNPROVEN)
    assert channel.resume().paid_sat == 100
    holds(channel, liar, 100)


# --- the home address -----------------------------------------------------------------------------------------------


def test_a_closing_pays_to_the_home_address(liar: Liar, movable: Channel) -> None:
    """A closing pays to the key's own address by default: change to the channel would be locked until the expiry."""
    liar.withdraw()
    movable.pay(2000)

    settled = movable.close()

    home = key_address(movable.record.terms.client_key, movable.record.network)
    assert (settled.change_sat, settled.change_address) == (LEFT_SAT - 2000, home)
    assert liar.channel is not None
    assert liar.channel.change_script != liar.channel.terms.funding_script
    assert settled.outpoint == str(liar.channel.outpoint)


def test_a_closing_fee_is_offered_at_the_new_output(liar: Liar, movable: Channel) -> None:
    """A closing that finds the channel moved offers the same fee at the new output."""
    liar.withdraw()

    settled = movable.close(fee_sat=700)

    assert settled.change_sat == LEFT_SAT - 700
    assert liar.received_sat == OPEN_PRICE_SAT + 700


@pytest.mark.parametrize("fee_sat", [0, 700])
@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST], ids=["booked", "not booked"])
def test_closing_with_a_lost_payment_after_a_move(liar: Liar, movable: Channel, loss: Lie, fee_sat: int) -> None:
    """The final change is that of the settlement, less the offered fee."""
    liar.lies.append(loss)
    with pytest.raises(Unreachable):
        movable.pay(100)
    liar.withdraw()
    if not fee_sat:
        fee_sat = 500
        movable.status()

    settled = movable.close(fee_sat=fee_sat)

    booked = 100 if loss is REPLY_LOST else 0
    assert settled.change_sat == LEFT_SAT - booked - fee_sat
    assert liar.received_sat == OPEN_PRICE_SAT + booked + fee_sat


def test_the_home_address_can_be_chosen(liar: Liar, tmp_path: Path) -> None:
    """With an address of the payer's own wallet, the closing and the refund pay to it."""
    with Payer(liar.url, wallet=tmp_path, patience=IMPATIENT) as payer:
        channel = payer.new_channel(hours=100, movable=True, change_address=ADDRESS)
        channel.fund(str(debug_outpoint(channel.record.terms.client_key, channel.record.expiry)), FUNDING_SAT)
        channel.open()

        assert channel.record.change_address == channel.record.funding_address
        assert channel.close().change_address == ADDRESS


def test_refunds_of_a_movable_channel_pay_to_the_home_address(movable: Channel) -> None:
    """A refund to the channel's own script would need a second refund."""
    home = CTransaction.deserialize(movable.refund(unchecked=True).transaction).vout[0].scriptPubKey
    assert bytes(home)[:3] == b"\x76\xa9\x14"


def test_only_version_2_moves(liar: Liar, funded: OpenChannel) -> None:
    """A v1 channel cannot be movable: its opening names no output."""
    with pytest.raises(TermsUnacceptable, match="movable"):
        funded(1, movable=True)


async def test_following_on_an_event_loop(liar: Liar, tmp_path: Path) -> None:
    """AsyncPayer follows in the same way."""
    async with AsyncPayer(liar.url, wallet=tmp_path, patience=IMPATIENT) as payer:
        channel = await payer.new_channel(hours=100, movable=True)
        await channel.fund(str(debug_outpoint(channel.record.terms.client_key, channel.record.expiry)), FUNDING_SAT)
        await channel.open()
        liar.withdraw()

        assert (await channel.pay(5)).total_paid_sat == OPEN_PRICE_SAT + 5
        assert (await channel.close(fee_sat=600)).change_sat == LEFT_SAT - 605
