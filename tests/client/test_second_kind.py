"""The payer's record names the channel's kind, and the library pays and refunds by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from paychan.client import ChannelRecord
from paychan.client.coins import Source
from paychan.client.errors import LaterFile
from paychan.client.flows.refund import RefundTerms, refund
from paychan.client.record import check_record
from paychan.client.wallet import Wallet
from paychan.protocol.address import encode_address
from paychan.protocol.types import Network, Sat
from tests.client.test_spend import FUNDING_SAT, record_of
from tests.lib.kernel import interpreter_accepts
from tests.lib.p2wsh import P2WSH, SegwitPayer, forget, registered

PAYER = SegwitPayer("spender")
PAYER_ADDRESS = encode_address(PAYER.change_script, Network.TEST)


@pytest.fixture(autouse=True)
def second_kind() -> Iterator[None]:
    """Both kinds are known."""
    with registered():
        yield


def record() -> ChannelRecord:
    """An open channel of the second kind."""
    return record_of(
        kind=P2WSH.tag,
        funding_address=PAYER.terms.funding_address(Network.TEST),
        funding_source=Source.CHAIN,
    )


def test_payments_and_refunds_are_of_the_records_kind() -> None:
    """The payment is the one that the server verifies, and Core accepts the refund."""
    check_record(record())

    assert record().terms == PAYER.terms
    payment = record().sign(Sat(900_000), PAYER_ADDRESS)
    assert payment == msgspec.structs.replace(PAYER, funding_sat=Sat(FUNDING_SAT)).payment(900_000)
    raw = refund(record(), RefundTerms(address=PAYER_ADDRESS)).transaction
    assert interpreter_accepts(PAYER.terms.funding_script, raw, 0, FUNDING_SAT)


def test_an_earlier_record_is_of_rbpcps_kind() -> None:
    """A record that names no kind was written before there were two."""
    fields = msgspec.to_builtins(record_of())
    assert fields.pop("kind") == "p2sh"

    assert msgspec.convert(fields, ChannelRecord) == record_of()


def test_a_record_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    """The wallet says so, instead of taking the channel for one of RBPCP's."""
    wallet = Wallet(tmp_path / "wallet")
    wallet.create(record()).release()
    assert wallet.read("spender") == record()

    forget()
    with pytest.raises(LaterFile, match="unknown channel kind 'p2wsh'"):
        wallet.read("spender")
