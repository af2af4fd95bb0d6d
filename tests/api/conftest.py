"""One signer and one server for most tests of this folder; each test uses a payer of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from paychan.protocol.wire.rbpcp import Dialect
from tests.api.wire import close_all
from tests.lib.rbpcp import V1, V2, Payer
from tests.lib.system import System


@pytest.fixture(scope="session")
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The server as configured by default; tests with `BOTH_PATHS` also run on one without the fast path."""
    fast = getattr(request, "param", True)
    with System(tmp_path_factory.mktemp("system"), sections={} if fast else {"http": "fast_lane = false"}) as running:
        yield running


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """An HTTP client without keep-alive: refused requests delay their connection, and many tests share this client."""
    no_keepalive = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(timeout=30, trust_env=False, limits=no_keepalive, verify=False) as client:
        yield client


@pytest.fixture(autouse=True)
def raw_connections_end_with_their_test() -> Iterator[None]:
    """Close raw sockets after each test: one left to the garbage collector causes a warning in another test."""
    yield
    close_all()


@pytest.fixture
def v1(system: System, http: httpx.Client) -> V1:
    """A fresh payer that speaks v1."""
    return V1(system.url, Payer(), http)


@pytest.fixture
def open_v1(v1: V1) -> V1:
    """The same, with a channel that has received 100,000 satoshi."""
    assert v1.open(v1.payer.payment(100_000)).status_code == 201
    return v1


@pytest.fixture(params=Dialect)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    chosen: Dialect = request.param
    return chosen


@pytest.fixture
def new_v2(system: System, http: httpx.Client) -> Callable[[Dialect], V2]:
    """Make fresh payers that speak v2."""
    return lambda dialect: V2(system.url, Payer(), http, dialect)


@pytest.fixture
def v2(new_v2: Callable[[Dialect], V2], dialect: Dialect) -> V2:
    """A fresh payer for each dialect."""
    return new_v2(dialect)


@pytest.fixture
def open_v2(v2: V2) -> V2:
    """The same, with a channel that has received 100,000 satoshi."""
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    return v2
