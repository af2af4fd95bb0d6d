"""One real server with its merchant interface for all tests of the folder, and wallets that open channels to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paychan.client import Budget, Need, Payer, Purse
from tests.lib.system import System


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with System(tmp_path_factory.mktemp("mcp"), sections={"merchant": "on = true"}) as started:
        yield started


@pytest.fixture
def merchant(system: System) -> Path:
    """The socket of the merchant interface."""
    return system.state / "merchant.sock"


@pytest.fixture
def pay_url(system: System) -> str:
    return system.url


@pytest.fixture
def purse(tmp_path: Path) -> Purse:
    """An empty wallet that opens a channel if it has none."""
    wallet = tmp_path / "wallet"

    def open_channel(need: Need) -> None:
        with Payer(need.pay_url, wallet=wallet) as payer:
            payer.channel_for(room_sat=need.room_sat)

    return Purse(Budget(total=10_000), wallet, open_channel=open_channel)
