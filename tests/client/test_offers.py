"""The terms that a payer accepts before it risks coins: the lifetime of a channel, and the price of a closing."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from typer.testing import CliRunner

from paychan.cli.payer.channel import app
from paychan.client import Channel, FeeTooHigh, Payer, ServerMisbehaved, State, TermsUnacceptable
from paychan.client.limits import HOUR
from paychan.protocol.address import decode_address
from paychan.protocol.types import Network
from tests.client.conftest import IMPATIENT, OpenChannel
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, Liar, Lie
from tests.lib.channels import SERVER_DESTINATION

LEFT_SAT = FUNDING_SAT - OPEN_PRICE_SAT
SETTLING_HOURS = 6
LEAST_HOURS = 12
"""The liar's minimum payment time, which in version 1 only a version 2 request reports."""


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def payer(request: pytest.FixtureRequest, liar: Liar, tmp_path: Path) -> Payer:
    return Payer(liar.url, wallet=tmp_path / "wallet", version=request.param, patience=IMPATIENT)


@pytest.mark.parametrize("confirmations", [0, 6])
def test_fault_24_hours_count_the_time_for_payments(payer: Payer, liar: Liar, confirmations: int) -> None:
    """The expiry leaves the requested hours between a deep funding and the server's settlement."""
    liar.info_lie = Lie(change={"funding_tx_min_conf": confirmations})
    begun = int(time.time())
    channel = payer.new_channel(hours=LEAST_HOURS)

    life = channel.record.expiry - begun
    opened_after = confirmations * 600 * 2  # unusually slow blocks
    assert life >= (LEAST_HOURS + SETTLING_HOURS) * HOUR + opened_after + HOUR // 2
    assert life <= (LEAST_HOURS + SETTLING_HOURS) * HOUR + confirmations * 1800 + 2 * HOUR


@pytest.mark.parametrize("hours", [0, 1, 10, 11.9])
def test_fault_24_no_address_for_fewer_hours_than_the_server_wants(payer: Payer, tmp_path: Path, hours: float) -> None:
    """The error gives both numbers before there is an address, also in version 1, which does not report the minimum."""
    with pytest.raises(TermsUnacceptable, match=f"hours of paying is {hours:g}, want at least 12"):
        payer.new_channel(hours=hours)
    assert list((tmp_path / "wallet").glob("*.json")) == []  # there may be a seed


@pytest.mark.parametrize("hours", ["inf", "nan", "1e+300", "-1"])
def test_fault_24_hours_that_are_no_number_are_refused(payer: Payer, tmp_path: Path, hours: str) -> None:
    """Python parses all these texts as floats."""
    with pytest.raises(TermsUnacceptable, match=f"hours of paying is {re.escape(hours)}, want 0 to 1,193,046"):
        payer.new_channel(hours=float(hours))
    assert list((tmp_path / "wallet").glob("*.json")) == []  # there may be a seed


@pytest.mark.parametrize("hours", [10.5, 18.5])
def test_fault_24_an_expiry_that_is_too_near_is_refused(payer: Payer, hours: float) -> None:
    """A given expiry must also leave time for the funding to become deep."""
    with pytest.raises(TermsUnacceptable, match=rf"hours until expiry is {int(hours)}, want at least 19"):
        payer.new_channel(expires=int(time.time() + hours * HOUR))
    assert payer.new_channel(expires=int(time.time() + 19.1 * HOUR)).address


@pytest.mark.parametrize("ahead_hours", [-30, 3, 24 * 365])
def test_fault_24_a_wrong_clock_makes_no_expiry(
    payer: Payer, monkeypatch: pytest.MonkeyPatch, ahead_hours: int
) -> None:
    """An expiry computed from a clock that is a year ahead would lock the coins up for that year."""
    now = time.time() + ahead_hours * HOUR
    monkeypatch.setattr("paychan.client.payer_base.time", SimpleNamespace(time=lambda: now))
    with pytest.raises(TermsUnacceptable, match="clocks"):
        payer.new_channel(hours=100)


def test_fault_25_no_address_of_a_server_that_can_not_open(liar: Liar, tmp_path: Path) -> None:
    """A frozen server or one without its node refuses, and the payer sees the reason instead of an address."""
    reason = b'{"code":"chain_unavailable","error":"the node is in its initial download"}'
    liar.info_lie = Lie(status=503, body=reason, headers={"Retry-After": "60"})
    result = CliRunner().invoke(app, ["new", liar.url, "--wallet", str(tmp_path / "wallet")])
    assert result.exit_code == 1
    assert "initial download" in result.stderr
    assert result.stdout == ""
    assert list((tmp_path / "wallet").glob("*.json")) == []  # there may be a seed


# --- closing ----------------------------------------------------------------------------------------------------------


def test_fault_21_a_disproportionate_fee_needs_confirmation(opened: OpenChannel) -> None:
    """A fee is a payment: 50,000 sat are offered only if the payer confirms that number."""
    channel = opened()
    with pytest.raises(FeeTooHigh) as refused:
        channel.close(fee_sat=50_000)
    assert refused.value.fields["got_sat"] == 50_000
    assert refused.value.fields["most_sat"] < 50_000
    assert (channel.record.state, channel.record.left_sat) == (State.OPEN, LEFT_SAT)
    assert channel.close(fee_sat=50_000, max_fee_sat=50_000).change_sat == LEFT_SAT - 50_000


def settlement(channel: Channel, change_sat: int, fee_sat: int, **other: Any) -> dict[str, str]:
    """Build the server's answer with a settlement that pays this change and this fee."""
    record = channel.record
    outpoint = other.get("outpoint", record.outpoint)
    change = decode_address(other.get("address", record.change_address), Network.TEST)
    outputs = [
        CTxOut(change_sat, CScript(change)),
        CTxOut(FUNDING_SAT - change_sat - fee_sat, CScript(SERVER_DESTINATION)),
    ]
    transaction = CTransaction([CTxIn(COutPoint(outpoint.txid, outpoint.vout))], outputs, nVersion=1)
    return {
        "settlement_txid": transaction.GetTxid()[::-1].hex(),
        "settlement_transaction": transaction.serialize().hex(),
    }


def test_fault_21_the_fee_of_the_settlement_is_shown(opened: OpenChannel, liar: Liar) -> None:
    """The server passed on 2,776 sat of a fee of 20,000: the result has both numbers."""
    channel = opened()
    liar.lies.append(Lie(change=settlement(channel, LEFT_SAT - 20_000, 2_776)))
    settled = channel.close(fee_sat=20_000)
    assert (settled.offered_fee_sat, settled.paid_fee_sat) == (20_000, 2_776)


@pytest.mark.parametrize("lie", ["less change", "another address", "another output", "another txid", "no transaction"])
def test_fault_21_a_settlement_without_the_change_is_rejected(opened: OpenChannel, liar: Liar, lie: str) -> None:
    """The shown settlement is compared with the signed change; if it differs, the channel does not count as settled."""
    channel = opened()
    shown = {
        "less change": settlement(channel, LEFT_SAT - 20_001, 2_000),
        "another address": settlement(channel, LEFT_SAT - 20_000, 2_000, address="mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY"),
        "another output": settlement(channel, LEFT_SAT - 20_000, 2_000, outpoint=channel.record.outpoint.reversed),
        "another txid": settlement(channel, LEFT_SAT - 20_000, 2_000) | {"settlement_txid": "ab" * 32},
        "no transaction": {"settlement_transaction": "00ff"},
    }[lie]
    liar.lies.append(Lie(change=shown))
    with pytest.raises(ServerMisbehaved):
        channel.close(fee_sat=20_000)
    assert (channel.record.state, channel.record.left_sat) == (State.CLOSING, LEFT_SAT - 20_000)


def test_fault_23_a_price_that_rose_is_named_and_can_be_paid(liar: Liar, tmp_path: Path) -> None:
    """The price rose between terms and opening: the error has both numbers and the command that pays, and it works."""
    wallet = ["--wallet", str(tmp_path / "wallet")]
    with Payer(liar.url, wallet=tmp_path / "wallet", patience=IMPATIENT) as payer:
        name = payer.new_channel(hours=100).name
    body = b'{"code":"payment_short","error":"payment short: got 10000 sat, need 20000 sat","need_sat":20000}'
    liar.lies.append(Lie(status=400, body=body, deaf=True))
    refused = CliRunner().invoke(app, ["open", name, "--no-wait", *wallet])
    assert "got 10,000 sat, need 20,000 sat" in refused.stderr
    assert f"paychan channel open {name} --amount 20000" in refused.stderr.replace("\n", " ")
    opened = CliRunner().invoke(app, ["open", name, "--no-wait", "--amount", "20000", *wallet])
    assert opened.exit_code == 0, opened.output
    assert liar.received_sat == 20_000
