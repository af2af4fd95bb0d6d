"""Each test with the fixture `backend` runs once per store backend, each with `chain` once per chain backend."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from paychan.chain.base import Chain
from paychan.store.base import Store
from tests.contract.backends import BACKENDS, Backend
from tests.contract.chains import FUNDING_SAT, OLD, WORLDS, World, address, opened
from tests.lib.node import Node


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return BACKENDS[request.param](tmp_path)


@pytest.fixture
async def store(backend: Backend) -> AsyncIterator[Store]:
    opened = backend.open()
    yield opened
    await opened.close()


@pytest.fixture(scope="module", params=sorted(WORLDS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with WORLDS[request.param](tmp_path_factory.mktemp(request.param)) as world:
        world.node.fund(address(OLD), FUNDING_SAT)
        world.node.mine()
        world.node.set_mock_time(0)
        world.node.mine(12)  # the block of two days ago is now too old for any scan of recent blocks
        yield world


@pytest.fixture
def node(world: World) -> Node:
    return world.node


@pytest.fixture
async def chain(world: World) -> AsyncIterator[Chain]:
    chain = await opened(world)
    yield chain
    await chain.close()
