"""Fixtures of the tests with the stock SDK: a wallet with a channel to a seller that lies on request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paychan.client import Budget, Need, Payer, Purse
from tests.client.conftest import OpenChannel, funded, liar, opened
from tests.client.liar import Liar
from tests.client.paying.seller import Seller
from tests.gateway.shop import Shop, open_shop
from tests.lib.system import System

__all__ = ["funded", "liar", "opened"]


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A real server with its merchant interface."""
    with System(tmp_path_factory.mktemp("mpp"), sections={"merchant": "on = true"}) as started:
        yield started


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A seller's service behind the gateway of a real server."""
    with open_shop(tmp_path_factory.mktemp("gateway")) as opened:
        yield opened


@pytest.fixture
def purse(tmp_path: Path) -> Purse:
    """An empty wallet that opens a channel if it has none."""
    wallet = tmp_path / "wallet"

    def open_channel(need: Need) -> None:
        with Payer(need.pay_url, wallet=wallet) as payer:
            payer.channel_for(room_sat=need.room_sat)

    return Purse(Budget(total=10_000), wallet, open_channel=open_channel)


@pytest.fixture
def seller(liar: Liar) -> Iterator[Seller]:
    with Seller(liar, protocols=("mpp",)) as server:
        yield server


@pytest.fixture
def wallet(opened: OpenChannel, tmp_path: Path) -> Path:
    """A wallet with one channel of 1,000,000 sat to the seller, opened with 10,000 sat."""
    opened().release()
    return tmp_path / "wallet"
