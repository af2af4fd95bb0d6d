"""Waiting for the funding: the server's answers are checked, and a refund is kept before the first payment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paychan.client import (
    AsyncPayer,
    Channel,
    FundingMissing,
    FundingNotTold,
    Payer,
    RefundTerms,
    ServerFailed,
    ServerMisbehaved,
    Source,
    State,
)
from tests.client.conftest import IMPATIENT
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, Liar, Lie
from tests.signer.messages import funding_transaction

TXID = "ab" * 32
OUTPUT = {
    "funding_txid": TXID,
    "funding_vout": 1,
    "value": FUNDING_SAT,
    "confirmations": 2,
    "confirmations_needed": 2,
}


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def channel(request: pytest.FixtureRequest, liar: Liar, tmp_path: Path) -> Channel:
    """A channel planned for 500,000 sat, not funded yet."""
    payer = Payer(liar.url, wallet=tmp_path / "wallet", version=request.param, patience=IMPATIENT)
    return payer.new_channel(hours=100, amount_sat=500_000)


def outputs(address: str, *found: dict[str, Any]) -> Lie:
    return Lie(body=json.dumps({"funding_address": address, "outputs": found}).encode())


def test_a_deep_output_is_recorded_with_its_refund(liar: Liar, channel: Channel, tmp_path: Path) -> None:
    """The file holds outpoint, value and a signed refund before the client signs anything for the server."""
    liar.info_lie = outputs(channel.address, OUTPUT)
    found = channel.wait_funded(0)

    assert (found.outpoint, found.value_sat, found.deep_enough) == (f"{TXID}:1", FUNDING_SAT, True)
    stored = json.loads((tmp_path / "wallet" / f"{channel.name}.json").read_text())
    assert stored["funding_outpoint"] == found.outpoint
    assert stored["refunds"] == [channel.refund(unchecked=True).transaction.hex()]
    assert stored["signed_sat"] is None


def test_a_shallow_output_is_recorded_while_confirmations_are_missing(liar: Liar, channel: Channel) -> None:
    """The refund is kept while confirmations are missing; another output may replace the recorded one."""
    liar.info_lie = outputs(channel.address, OUTPUT | {"confirmations": 1})
    with pytest.raises(FundingMissing, match="1 of 2 confirmations"):
        channel.wait_funded(0)
    assert channel.record.funding_outpoint == f"{TXID}:1"
    liar.info_lie = outputs(channel.address, OUTPUT | {"funding_vout": 0})

    assert channel.wait_funded(0).outpoint == f"{TXID}:0"
    assert channel.record.refunds[-1] == channel.refund(unchecked=True).transaction.hex()


@pytest.mark.parametrize("proven", [True, False])
def test_an_output_that_is_enough_but_less_than_planned_must_be_proven(
    liar: Liar, channel: Channel, proven: bool
) -> None:
    """A server that understates an output, which may hold the planned amount, would get the difference."""
    funding = funding_transaction(channel.record.terms.funding_script, 300_000, 1)
    txid = funding.GetTxid()[::-1].hex()
    vout = next(at for at, each in enumerate(funding.vout) if each.nValue == 300_000)
    shown = {"transaction": funding.serialize().hex()} if proven else {}
    small = OUTPUT | {"funding_txid": txid, "funding_vout": vout, "value": 300_000} | shown
    liar.info_lie = outputs(channel.address, small)

    if proven:
        assert channel.wait_funded(0, enough_sat=300_000).value_sat == 300_000
        assert channel.record.funding_source is Source.TRANSACTION
    else:
        with pytest.raises(FundingMissing, match="at least 300,000 sat"):
            channel.wait_funded(0, enough_sat=300_000)
        assert channel.record.funding_outpoint == ""
    planned = OUTPUT | {"value": 500_000}
    liar.info_lie = outputs(channel.address, small | {"confirmations": 9}, planned)
    assert channel.wait_funded(0, enough_sat=300_000).value_sat == 500_000


def test_an_output_below_the_planned_amount_is_not_recorded(liar: Liar, channel: Channel) -> None:
    """An understated value would give the difference to the server, so no output below `amount_sat` is recorded."""
    liar.info_lie = outputs(channel.address, OUTPUT | {"value": 499_999})
    with pytest.raises(FundingMissing, match=r"499,999 sat.*at least 500,000 sat"):
        channel.wait_funded(0)

    assert channel.record.funding_outpoint == ""


@pytest.mark.parametrize(
    "lie",
    [
        {"value": 0},
        {"value": -1},
        {"value": 2_100_000_000_000_001},
        {"value": 1.5},
        {"confirmations": -1},
        {"funding_vout": 2**32},
        {"funding_txid": "AB" * 32},
        {"funding_txid": "ab"},
    ],
    ids=str,
)
def test_impossible_outputs_are_not_believed(liar: Liar, channel: Channel, lie: dict[str, Any]) -> None:
    """Impossible amounts, depths and outpoints count as misbehaviour of the server."""
    liar.info_lie = outputs(channel.address, OUTPUT | lie)
    with pytest.raises(ServerMisbehaved):
        channel.wait_funded(0)

    assert channel.record.funding_outpoint == ""


def test_outputs_of_another_address_are_not_believed(liar: Liar, channel: Channel) -> None:
    """The answer must name the address that the client derives from the keys."""
    liar.info_lie = outputs("2N" + channel.address[2:][::-1], OUTPUT)
    with pytest.raises(ServerMisbehaved, match="funding address"):
        channel.funding()


def test_a_server_without_a_list_of_outputs_is_recognised(liar: Liar, channel: Channel) -> None:
    """404 means that the payer must name the outpoint; a busy server raises its refusal after the last attempt."""
    liar.info_lie = Lie(status=404, body=b"Not Found")
    with pytest.raises(FundingNotTold):
        channel.wait_funded()
    liar.info_lie = Lie(status=503, body=b"{}")
    with pytest.raises(ServerFailed):
        channel.wait_funded(0)


def test_a_busy_server_is_asked_again(liar: Liar, channel: Channel) -> None:
    """Waiting survives a short failure of the server, and the watcher is called after every poll."""
    looks: list[str] = []

    def watch(seen: object) -> None:
        looks.append(type(seen).__name__)
        liar.info_lie = outputs(channel.address, OUTPUT)

    liar.info_lie = Lie(status=503, body=b"{}")
    assert channel.wait_funded(5, watch).deep_enough
    assert looks == ["ServerFailed", "tuple"]


async def test_waiting_on_an_event_loop(liar: Liar, tmp_path: Path) -> None:
    """`AsyncChannel` waits and records like `Channel`, and then opens."""
    async with AsyncPayer(liar.url, wallet=tmp_path / "wallet", patience=IMPATIENT) as payer:
        channel = await payer.new_channel(hours=100)
        liar.info_lie = outputs(channel.address, OUTPUT)
        assert await channel.funding() == (await channel.wait_funded(0),)
        assert len(channel.record.refunds) == 1


def test_the_spend_of_the_funding_is_a_refund_or_a_settlement(liar: Liar, channel: Channel) -> None:
    """Every refund in the record is recognised by its txid; any other spend is the settlement."""
    liar.info_lie = outputs(channel.address, OUTPUT)
    channel.wait_funded(0)
    first, dearer = channel.refund(unchecked=True), channel.keep_refund(RefundTerms(9, unchecked=True))
    assert first.txid != dearer.txid
    for signed in (first, dearer):
        record = channel.spent(signed.txid[::-1].hex())
        assert (record.state, record.settlement_txid) == (State.REFUNDED, "")
    record = channel.spent(TXID)
    assert (record.state, record.settlement_txid, record.end_seen) == (State.CLOSED, TXID, True)


def test_the_default_amount_is_the_minimum(liar: Liar, tmp_path: Path) -> None:
    """Without a planned amount, the address asks for open price plus dust limit, and so does the URI."""
    with Payer(liar.url, wallet=tmp_path / "wallet", patience=IMPATIENT) as payer:
        channel = payer.new_channel(hours=100)
        assert channel.amount_sat == OPEN_PRICE_SAT + 700
        assert channel.bip21().endswith("amount=0.00010700")
