"""Fixtures of the payer's tests: a server that lies on request, and payers with their own wallet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from paychan.client import Channel, Limits, Patience, Payer
from paychan.protocol.debug_funding import debug_outpoint
from tests.client.liar import FUNDING_SAT, Liar

IMPATIENT = Patience(attempts=1)
PATIENT = Patience(attempts=3, first_pause_seconds=0.001)


DRAINS = Limits(payment_sat=10**14)
"""A debug funding is larger than the usual limit of a payment, which counts for draining, too."""


class OpenChannel(Protocol):
    def __call__(self, version: int = 2, **settings: Any) -> Channel: ...


@pytest.fixture
def liar() -> Iterator[Liar]:
    """A server that is honest unless a test adds a lie."""
    with Liar() as server:
        yield server


@pytest.fixture
def funded(liar: Liar, tmp_path: Path) -> Iterator[OpenChannel]:
    """Make a channel of 1,000,000 sat to the liar, not opened yet."""
    payers: list[Payer] = []

    def make(version: int = 2, *, movable: bool = False, **settings: Any) -> Channel:
        payer = Payer(liar.url, wallet=tmp_path / "wallet", version=version, **{"patience": IMPATIENT, **settings})
        payers.append(payer)
        channel = payer.new_channel(hours=100, movable=movable)
        outpoint = debug_outpoint(channel.record.terms.client_key, channel.record.expiry)
        channel.fund(str(outpoint), FUNDING_SAT)
        return channel

    yield make
    for payer in payers:
        payer.close()


@pytest.fixture
def opened(funded: OpenChannel) -> OpenChannel:
    """Make a channel of 1,000,000 sat to the liar, opened with 10,000 sat."""

    def make(version: int = 2, **settings: Any) -> Channel:
        channel = funded(version, **settings)
        channel.open()
        return channel

    return make
