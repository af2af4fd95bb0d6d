"""Lost answers: wherever a message is lost, a payment counts once, and the record has every signed payment."""

from __future__ import annotations

import pytest

from paychan.client import (
    ChannelConflict,
    ChannelGone,
    ChannelUnknown,
    InsufficientFunds,
    PaymentPending,
    PaymentRefused,
    ServerFailed,
    State,
    Unacknowledged,
    Unreachable,
    WouldTakeBack,
)
from tests.client.conftest import PATIENT, OpenChannel
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, TXID, Liar, Lie

REPLY_LOST = Lie(drop=True)
REQUEST_LOST = Lie(deaf=True, drop=True)
BUSY = Lie(deaf=True, status=503, headers={"Retry-After": "0"}, body=b'{"code":"try_again","error":"later"}')
APPLICATION_SAYS_NO = Lie(deaf=True, status=400, body=b'{"code":"application_error","error":"no","reason":"sold out"}')

both_versions = pytest.mark.parametrize("version", [1, 2])


@both_versions
@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST, BUSY])
def test_a_lost_message_is_repeated_automatically(liar: Liar, opened: OpenChannel, loss: Lie, version: int) -> None:
    """A payment without an answer is repeated automatically, and booked once."""
    channel = opened(version, patience=PATIENT)
    liar.lies.append(loss)

    receipt = channel.pay(100)

    assert (receipt.paid_sat, receipt.repeated) == (100, loss is REPLY_LOST)
    assert liar.received_sat == OPEN_PRICE_SAT + 100
    assert not channel.record.unacknowledged


@both_versions
@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST])
def test_a_lost_payment_is_resumed(liar: Liar, opened: OpenChannel, loss: Lie, version: int) -> None:
    """After the last attempt the same payment can be sent again, and counts once."""
    channel = opened(version)
    liar.lies.append(loss)
    with pytest.raises(Unreachable):
        channel.pay(100)

    receipt = channel.resume()

    assert (receipt.paid_sat, receipt.repeated) == (100, loss is REPLY_LOST)
    assert channel.pay(200).total_paid_sat == liar.received_sat == OPEN_PRICE_SAT + 300


@both_versions
@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST])
def test_fault_51_a_lost_payment_is_finished_before_the_next(
    liar: Liar, opened: OpenChannel, loss: Lie, version: int
) -> None:
    """The next payment, single or one of many, first sends the lost one again; its receipt names that one's receipt."""
    channel = opened(version)
    for pay in (lambda: channel.pay(200), lambda: channel.pay_many(100, 2)):
        before = liar.received_sat
        liar.lies.append(loss)
        with pytest.raises(Unreachable):
            channel.pay(100)

        receipt = pay()

        assert receipt.earlier is not None
        assert (receipt.earlier.paid_sat, receipt.earlier.repeated) == (100, loss is REPLY_LOST)
        assert receipt.total_paid_sat == liar.received_sat == before + 300


def test_fault_51_nothing_new_is_paid_while_the_earlier_payment_fails(liar: Liar, opened: OpenChannel) -> None:
    """The error names the earlier payment; an amount that does not fit is declined before anything is sent."""
    channel = opened()
    liar.lies.extend([REQUEST_LOST, REQUEST_LOST])
    with pytest.raises(Unreachable):
        channel.pay(100)
    with pytest.raises(InsufficientFunds):
        channel.pay(FUNDING_SAT - OPEN_PRICE_SAT)

    with pytest.raises(Unreachable, match="earlier payment of 100 sat") as caught:
        channel.pay(200)

    assert caught.value.fields["earlier_sat"] == 100
    assert channel.paid_sat == OPEN_PRICE_SAT + 100
    assert liar.received_sat == OPEN_PRICE_SAT


@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST])
def test_fault_51_a_drain_without_an_answer_is_drained_once(liar: Liar, opened: OpenChannel, loss: Lie) -> None:
    """Draining again finishes the earlier drain."""
    channel = opened()
    liar.lies.append(loss)
    with pytest.raises(Unreachable):
        channel.pay(drain=True)

    assert channel.pay(drain=True).left_sat == 0
    assert channel.record.state is State.CLOSED
    assert liar.received_sat == FUNDING_SAT


@both_versions
@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize(("loss", "booked"), [(REPLY_LOST, True), (REQUEST_LOST, False)])
def test_status_tells_whether_a_lost_payment_was_booked(
    liar: Liar, opened: OpenChannel, loss: Lie, booked: bool, codes: bool, version: int
) -> None:
    """A status request has no new value, and shows whether a lost payment was booked; if not, it is finished later."""
    channel = opened(version)
    liar.lies.append(loss)
    liar.codes = codes
    with pytest.raises(Unreachable):
        channel.pay(100)
    before = liar.received_sat

    record = channel.status()

    assert liar.received_sat == before
    assert (record.unacknowledged, record.refused) == (not booked, False)
    assert record.left_sat == FUNDING_SAT - OPEN_PRICE_SAT - 100
    earlier = channel.pay(7).earlier
    assert (earlier is None, liar.received_sat) == (booked, OPEN_PRICE_SAT + 107)


@both_versions
@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST])
def test_a_lost_opening_is_repeated_unchanged(liar: Liar, funded: OpenChannel, loss: Lie, version: int) -> None:
    """An opening without an answer is repeated; after a 409 with Location, the same payment identifies the channel."""
    channel = funded(version)
    liar.lies.append(loss)
    with pytest.raises(Unreachable):
        channel.open(20_000)
    with pytest.raises(Unacknowledged):
        channel.open(30_000)

    receipt = channel.open()

    assert (receipt.paid_sat, receipt.repeated) == (20_000, loss is REPLY_LOST)
    assert channel.pay(1).total_paid_sat == liar.received_sat == 20_001


@both_versions
def test_an_opening_with_lost_replies_makes_one_channel(liar: Liar, funded: OpenChannel, version: int) -> None:
    """A repeated opening meets the 409 of its own first attempt, and continues that channel."""
    channel = funded(version, patience=PATIENT)
    liar.lies.append(REPLY_LOST)

    assert channel.open().repeated
    assert channel.record.state is State.OPEN


@both_versions
def test_a_channel_of_another_payer_is_not_continued(liar: Liar, funded: OpenChannel, version: int) -> None:
    """A 409 is a conflict if the channel at its Location does not take the opening payment, or does not exist."""
    channel = funded(version)
    conflict = Lie(deaf=True, status=409, headers={"Location": f"/v{version}/channels/{'00' * 32}/0"})
    for lie in (conflict, Lie(deaf=True, status=409)):
        liar.lies.append(lie)
        with pytest.raises(ChannelConflict):
            channel.open()
    assert channel.record.state is State.NEW
    assert channel.open().left_sat == FUNDING_SAT - OPEN_PRICE_SAT


@both_versions
@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST])
def test_a_lost_drain_is_resumed(liar: Liar, opened: OpenChannel, loss: Lie, version: int) -> None:
    """The draining payment can be sent again, too: the closed channel then reports its settlement."""
    channel = opened(version)
    liar.lies.append(loss)
    with pytest.raises(Unreachable):
        channel.pay(drain=True)

    receipt = channel.resume()

    assert (receipt.left_sat, receipt.settlement_txid) == (0, TXID)
    assert channel.record.state is State.CLOSED
    assert liar.received_sat == FUNDING_SAT


@both_versions
@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST, BUSY])
def test_a_lost_closing_is_repeated(liar: Liar, opened: OpenChannel, loss: Lie, version: int) -> None:
    """While closing no payment is made; closing again completes it."""
    channel = opened(version)
    liar.lies.append(loss)
    with pytest.raises((Unreachable, ServerFailed)):
        channel.close()
    assert channel.record.state is State.CLOSING

    settled = channel.close()

    assert (settled.settlement_txid, settled.change_sat) == (TXID, FUNDING_SAT - OPEN_PRICE_SAT)


@both_versions
@pytest.mark.parametrize("loss", [REPLY_LOST, REQUEST_LOST])
@pytest.mark.parametrize("codes", [True, False])
def test_closing_with_a_lost_payment(liar: Liar, opened: OpenChannel, loss: Lie, codes: bool, version: int) -> None:
    """Closing after a lost payment ends with the server's state, whether it had booked that payment or not."""
    channel = opened(version)
    liar.codes = codes
    liar.lies.append(loss)
    with pytest.raises(Unreachable):
        channel.pay(100)

    settled = channel.close()

    booked = 100 if loss is REPLY_LOST else 0
    assert settled.change_sat == FUNDING_SAT - OPEN_PRICE_SAT - booked
    assert liar.received_sat == OPEN_PRICE_SAT + booked


def test_a_closing_fee_is_offered_once(liar: Liar, opened: OpenChannel) -> None:
    """A v2 closing with a fee, repeated after a lost answer, offers the same fee and address again."""
    channel = opened()
    address = "2NEQahmapUBueLzinJEViGkLdXRrzskH7Px"
    liar.lies.append(REQUEST_LOST)
    with pytest.raises(Unreachable):
        channel.close(fee_sat=500, change_address=address)

    settled = channel.close(fee_sat=900)

    assert (settled.change_sat, settled.change_address) == (FUNDING_SAT - OPEN_PRICE_SAT - 500, address)
    assert liar.received_sat == OPEN_PRICE_SAT + 500


def test_a_refused_closing_leaves_the_channel_open(liar: Liar, opened: OpenChannel) -> None:
    """If the server refuses an uneconomical closing, the channel stays open; payments stay above the signed fee."""
    channel = opened()
    liar.lies.append(Lie(deaf=True, status=400, body=b'{"code":"not_economical","error":"not worth it"}'))
    with pytest.raises(PaymentRefused, match="not worth it"):
        channel.close(fee_sat=300)

    assert channel.record.state is State.OPEN
    with pytest.raises(WouldTakeBack):
        channel.pay(299)
    assert channel.pay(300).paid_sat == 300


def test_the_fee_of_a_closing_without_an_answer_is_never_paid_as_a_payment(liar: Liar, opened: OpenChannel) -> None:
    """Once the server says that the channel is open, the closing was not booked, and the next payment finishes none."""
    channel = opened()
    liar.lies.append(REQUEST_LOST)
    with pytest.raises(Unreachable):
        channel.close(fee_sat=300)

    assert channel.status().state is State.OPEN
    receipt = channel.pay(300)

    assert (receipt.earlier, receipt.paid_sat, liar.received_sat) == (None, 300, OPEN_PRICE_SAT + 300)


@both_versions
def test_attempts_are_limited(liar: Liar, opened: OpenChannel, version: int) -> None:
    """A server that stays busy gets exactly the configured number of attempts; then the payment waits for `resume`."""
    channel = opened(version, patience=PATIENT)
    liar.lies.extend([BUSY] * 10)
    before = len(liar.requests)
    with pytest.raises(ServerFailed) as caught:
        channel.pay(100)

    assert (caught.value.code, caught.value.status) == ("try_again", 503)
    assert len(liar.requests) - before == PATIENT.attempts
    liar.lies.clear()
    assert channel.resume().paid_sat == 100


def test_after_a_refusal_no_smaller_payment_is_sent(liar: Liar, opened: OpenChannel) -> None:
    """After a refusal the client sends the same payment or a larger one, never a smaller one."""
    channel = opened()
    liar.lies.append(APPLICATION_SAYS_NO)
    with pytest.raises(PaymentRefused) as caught:
        channel.pay(100)
    assert (caught.value.code, caught.value.fields["reason"]) == ("application_error", "sold out")
    assert channel.left_sat == FUNDING_SAT - OPEN_PRICE_SAT - 100

    with pytest.raises(WouldTakeBack) as too_little:
        channel.pay(99)

    assert too_little.value.fields == {"got_sat": 99, "need_sat": 100}
    liar.lies.append(APPLICATION_SAYS_NO)
    with pytest.raises(PaymentRefused):
        channel.resume()
    assert channel.pay(150).total_paid_sat == liar.received_sat == OPEN_PRICE_SAT + 150


@both_versions
def test_a_refused_payment_that_was_booked_later(liar: Liar, opened: OpenChannel, version: int) -> None:
    """If the server turns out to have booked a payment that it refused, the next payment pays the rest, once."""
    channel = opened(version)
    liar.lies.append(Lie(status=400, body=b'{"code":"application_error","error":"no"}'))
    with pytest.raises(PaymentRefused):
        channel.pay(100)

    receipt = channel.pay(150)

    assert (receipt.paid_sat, receipt.repeated) == (150, True)
    assert receipt.total_paid_sat == liar.received_sat == OPEN_PRICE_SAT + 150


@both_versions
def test_refusals_without_a_body_are_read_from_the_reason_phrase(liar: Liar, opened: OpenChannel, version: int) -> None:
    """A server that reports errors by status and reason phrase alone, as the original, is understood (RBPCP §5.7)."""
    channel = opened(version)
    liar.codes = False
    liar.lies.append(Lie(deaf=True, status=400, reason="dust output", body=b""))
    with pytest.raises(PaymentRefused, match="dust output"):
        channel.pay(100)
    liar.lies.extend([Lie(deaf=True, status=404, reason="Not Found", body=b"")] * 2)  # the client tries to open again
    with pytest.raises(ChannelUnknown, match="unknown channel, and opening it again was refused with status 404"):
        channel.resume()
    liar.lies.append(Lie(deaf=True, status=410, reason="settlement in progress", body=b""))
    with pytest.raises(ChannelGone):
        channel.resume()
    assert channel.resume().paid_sat == 100


@both_versions
def test_fault_59_a_channel_that_the_server_closed_is_known_as_closed(
    liar: Liar, opened: OpenChannel, version: int
) -> None:
    """A 410 that names the settlement ends the channel; one that says closing leaves it to be closed. Both are status."""
    channel = opened(version)
    liar.lies.append(Lie(deaf=True, status=410, body=b'{"code":"channel_closing","error":"closing"}'))
    with pytest.raises(ChannelGone):
        channel.pay(5)
    assert channel.record.state is State.CLOSING

    gone = f'{{"code":"channel_closed","error":"settled","txid":"{TXID}"}}'.encode()
    liar.lies.append(Lie(deaf=True, status=410, body=gone))
    channel.status()

    assert (channel.record.state, channel.record.settlement_txid) == (State.CLOSED, TXID)


@both_versions
def test_fault_59_closing_what_the_server_closed_is_no_error(liar: Liar, opened: OpenChannel, version: int) -> None:
    """The result says that the channel had ended before."""
    channel = opened(version)
    gone = f'{{"code":"channel_closed","error":"settled","txid":"{TXID}"}}'.encode()
    liar.lies.append(Lie(deaf=True, status=410, body=gone))

    settled = channel.close()

    assert (settled.before, settled.settlement_txid) == (True, TXID)
    assert settled.change_sat == FUNDING_SAT - OPEN_PRICE_SAT
    assert channel.record.state is State.CLOSED


PENDING = Lie(deaf=True, status=503, body=b'{"code":"payment_pending","error":"no answer yet"}')


@both_versions
def test_fault_49_a_payment_that_the_application_has_not_answered_stays_pending(
    liar: Liar, opened: OpenChannel, version: int
) -> None:
    """`status` tells it, and the next payment finishes it first."""
    channel = opened(version)
    liar.lies.append(PENDING)
    with pytest.raises(PaymentPending):
        channel.pay(100)
    liar.lies.append(PENDING)

    record = channel.status()

    assert (record.state, record.pending_sat, record.refused) == (State.OPEN, 100, False)
    receipt = channel.pay(20)
    assert receipt.earlier is not None
    assert (receipt.earlier.paid_sat, receipt.paid_sat, liar.received_sat) == (100, 20, OPEN_PRICE_SAT + 120)


def test_text_of_the_server_holds_no_control_characters(liar: Liar, opened: OpenChannel) -> None:
    """Error text from the server cannot move the cursor of a terminal, and is short."""
    channel = opened()
    evil = "\\u001b[2J\\u0007" + "x" * 10_000
    liar.lies.append(Lie(deaf=True, status=400, body=f'{{"code":"\\u001bcode","error":"{evil}"}}'.encode()))
    with pytest.raises(PaymentRefused) as caught:
        channel.pay(1)

    assert "\x1b" not in str(caught.value) + caught.value.code
    assert len(str(caught.value)) < 400
