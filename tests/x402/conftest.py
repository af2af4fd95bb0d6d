"""Fixtures of the tests with the stock SDK: a wallet with a channel to a seller that lies on request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.conftest import OpenChannel, funded, liar, opened
from tests.client.liar import Liar
from tests.client.paying.seller import Seller

__all__ = ["funded", "liar", "opened"]


@pytest.fixture
def seller(liar: Liar) -> Iterator[Seller]:
    with Seller(liar, protocols=("x402",)) as server:
        yield server


@pytest.fixture
def wallet(opened: OpenChannel, tmp_path: Path) -> Path:
    """A wallet with one channel of 1,000,000 sat to the seller, opened with 10,000 sat."""
    opened().release()
    return tmp_path / "wallet"
