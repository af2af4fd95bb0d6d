"""One real server for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lib.system import System
from tests.sell.shop import Customer, Shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    directory = tmp_path_factory.mktemp("sell")
    with System(directory, sections={"merchant": "on = true"}) as system:
        yield Shop(system, directory / "wallet")


@pytest.fixture
def customer(shop: Shop) -> Customer:
    return Customer(shop)
