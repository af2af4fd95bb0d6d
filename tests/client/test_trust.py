"""A lying server gets no satoshi more than intended, and no request goes to another server (RBPCP D22)."""

from __future__ import annotations

from pathlib import Path

import pytest

from paychan.client import (
    AsyncPayer,
    ClientError,
    ServerMisbehaved,
    State,
    TermsUnacceptable,
    Unreachable,
)
from paychan.client.transport.effects import Response
from paychan.client.transport.routes import located
from paychan.protocol.debug_funding import debug_outpoint
from tests.client.conftest import IMPATIENT, OpenChannel
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, SERVER_KEY, Liar, Lie

NAN = b'{"channel_status":"open","channel_value_left":NaN,"value_received":NaN,"settlement_txid":null}'

LIES = {
    "no value_received": Lie(change={"value_received": ...}),
    "value_received null": Lie(change={"value_received": None}),
    "value_received NaN": Lie(body=NAN),
    "value_received text": Lie(change={"value_received": "100"}),
    "value_received float": Lie(change={"value_received": 100.5}),
    "value_received true": Lie(change={"value_received": True}),
    "value_received less": Lie(change={"value_received": 99}),
    "value_received more than all": Lie(change={"value_received": OPEN_PRICE_SAT + 101}),
    "value_received 0 for a new payment": Lie(change={"value_received": 0}),
    "value_received negative": Lie(change={"value_received": -100}),
    "value_received huge": Lie(change={"value_received": 10**30}),
    "no channel_value_left": Lie(change={"channel_value_left": ...}),
    "channel_value_left less": Lie(change={"channel_value_left": 0}),
    "channel_value_left more": Lie(change={"channel_value_left": FUNDING_SAT}),
    "closed": Lie(change={"channel_status": "closed"}),
    "unknown status": Lie(change={"channel_status": "half-open"}),
    "empty body": Lie(body=b""),
    "an array": Lie(body=b"[]"),
    "deep nesting": Lie(body=b"[" * 50_000),
    "not JSON": Lie(body=b"<html>200 OK</html>", headers={"Content-Type": "text/html"}),
    "not UTF-8": Lie(body=b'{"channel_status":"\xff"}'),
    "endless": Lie(body=b" " * 200_000),
    "redirect": Lie(status=302, headers={"Location": "http://127.0.0.1:1/"}),
    "moved for ever": Lie(status=308, headers={"Location": "http://127.0.0.1:1/"}),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_about_a_payment_changes_no_balance(liar: Liar, opened: OpenChannel, lie: Lie, version: int) -> None:
    """A false answer to a payment raises ServerMisbehaved, and exactly that payment counts as paid."""
    channel = opened(version)
    liar.lies.append(lie)
    with pytest.raises(ServerMisbehaved):
        channel.pay(100)

    assert channel.left_sat == FUNDING_SAT - OPEN_PRICE_SAT - 100
    assert channel.record.unacknowledged
    assert channel.pay(1).total_paid_sat == liar.received_sat == OPEN_PRICE_SAT + 101


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_after_a_lie_the_next_payment_pays_only_its_own_amount(liar: Liar, opened: OpenChannel, lie: Lie) -> None:
    """D22: an answer without numbers never makes the next payment pay the whole channel."""
    channel = opened()
    liar.lies.append(lie)
    with pytest.raises(ServerMisbehaved):
        channel.pay(100)

    assert channel.resume().repeated
    assert channel.pay(7).left_sat == FUNDING_SAT - OPEN_PRICE_SAT - 107
    assert liar.received_sat == OPEN_PRICE_SAT + 107


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_after_a_lie_about_the_opening_it_can_be_sent_again(
    liar: Liar, funded: OpenChannel, lie: Lie, version: int
) -> None:
    """A false answer to the opening raises ServerMisbehaved; the same opening, sent again, continues the channel."""
    channel = funded(version)
    liar.lies.append(lie)
    with pytest.raises(ServerMisbehaved):
        channel.open()

    assert channel.record.state is State.NEW
    assert channel.open().left_sat == FUNDING_SAT - OPEN_PRICE_SAT
    assert liar.received_sat == OPEN_PRICE_SAT


CLOSING_LIES = {
    "no txid": Lie(change={"settlement_txid": ...}),
    "null": Lie(change={"settlement_txid": None}),
    "not a txid": Lie(change={"settlement_txid": "none of your business"}),
    "upper case": Lie(change={"settlement_txid": "5E" * 32}),
    "still open": Lie(change={"channel_status": "open"}),
    "other change": Lie(change={"channel_value_left": 5}),
    "value received": Lie(change={"value_received": 5}),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("lie", CLOSING_LIES.values(), ids=CLOSING_LIES.keys())
def test_a_lie_about_the_settlement_is_not_recorded(liar: Liar, opened: OpenChannel, lie: Lie, version: int) -> None:
    """After a false answer the closing stays open, and can be repeated."""
    channel = opened(version)
    liar.lies.append(lie)
    with pytest.raises(ServerMisbehaved):
        channel.close()

    assert channel.record.state is State.CLOSING
    assert channel.close().change_sat == FUNDING_SAT - OPEN_PRICE_SAT
    assert channel.record.state is State.CLOSED


TERMS = {
    "another address": (Lie(change={"funding_address_copy": "2NEQahmapUBueLzinJEViGkLdXRrzskH7Px"}), ServerMisbehaved),
    "no address": (Lie(change={"funding_address_copy": ...}), ServerMisbehaved),
    "another key": (Lie(change={"server_pubkey": "02" + "11" * 32}), ServerMisbehaved),
    "not on the curve": (Lie(change={"server_pubkey": "02" + "00" * 32}), ServerMisbehaved),
    "no key": (Lie(change={"server_pubkey": ""}), ServerMisbehaved),
    "upper case key": (Lie(change={"server_pubkey": SERVER_KEY.hex().upper()}), ServerMisbehaved),
    "price missing": (Lie(change={"open_price": ...}), ServerMisbehaved),
    "price NaN": (Lie(change={"open_price": float("nan")}), ServerMisbehaved),
    "price negative": (Lie(change={"open_price": -1}), TermsUnacceptable),
    "price above our limit": (Lie(change={"open_price": 250_001}), TermsUnacceptable),
    "dust above our limit": (Lie(change={"dust_limit": 10_001}), TermsUnacceptable),
    "confirmations above our limit": (Lie(change={"funding_tx_min_conf": 13}), TermsUnacceptable),
    "settlement period above our limit": (Lie(change={"settlement_period_hours": 73}), TermsUnacceptable),
    "no time left to pay": (Lie(change={"min_duration_hours": 101}), TermsUnacceptable),
    "redirect": (Lie(status=302, headers={"Location": "http://127.0.0.1:1/"}), ServerMisbehaved),
}


@pytest.mark.parametrize(("lie", "error"), TERMS.values(), ids=TERMS.keys())
def test_no_channel_is_made_on_terms_that_are_wrong(
    liar: Liar, funded: OpenChannel, lie: Lie, error: type[ClientError]
) -> None:
    """Impossible terms, or terms beyond the payer's limits, raise before there is an address to pay to."""
    liar.info_lie = lie
    with pytest.raises(error):
        funded()


@pytest.mark.parametrize("elsewhere", ["http://evil.example", "https://127.0.0.1", "//evil.example:1", "ftp://x"])
def test_location_elsewhere_is_not_followed(liar: Liar, funded: OpenChannel, elsewhere: str) -> None:
    """Opening and payments go to the base URL, whatever scheme, host or port `Location` names (D12)."""
    liar.public_url = elsewhere
    channel = funded(version=1)
    channel.open()
    channel.pay(5)

    assert liar.received_sat == OPEN_PRICE_SAT + 5


def test_a_server_below_a_path_is_reached_there() -> None:
    """If the base URL has a path, Location is accepted with and without that path."""
    answer = Response(200, "", {"location": "http://127.0.0.1:8000/v1/channels/x?a=b"}, b"")
    assert located(answer, "https://shop.example/pay") == "/v1/channels/x?a=b"
    answer = Response(200, "", {"location": "https://shop.example/pay/v1/channels/x"}, b"")
    assert located(answer, "https://shop.example/pay") == "/v1/channels/x"


@pytest.mark.parametrize("name", ["value_received NaN", "endless", "redirect", "not JSON", "closed"])
async def test_lies_are_seen_on_an_event_loop_too(liar: Liar, tmp_path: Path, name: str) -> None:
    """AsyncPayer trusts as little: the balance is the signed one, and the next payment pays its own amount only."""
    async with AsyncPayer(liar.url, wallet=tmp_path, patience=IMPATIENT) as payer:
        channel = await payer.new_channel(hours=100)
        outpoint = debug_outpoint(channel.record.terms.client_key, channel.record.expiry)
        await channel.fund(str(outpoint), FUNDING_SAT)
        await channel.open()
        liar.lies.append(LIES[name])
        with pytest.raises(ServerMisbehaved):
            await channel.pay(100)
        liar.lies.append(Lie(drop=True))
        with pytest.raises(Unreachable):
            await channel.resume()

        assert (await channel.resume()).repeated
        assert (await channel.pay(7)).left_sat == FUNDING_SAT - OPEN_PRICE_SAT - 107
