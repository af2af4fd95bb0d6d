"""RBPCP §13.2: the operator's interface."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from paychan.protocol.types import Network
from signer.keys.ring import DEBUG_KEY, StaticKey
from tests.lib.rbpcp import V1, V2, Payer, path, refusal
from tests.lib.system import System

FUNDING_SAT = 12_345_678_900_000


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server only for this module, so that its totals are known."""
    with System(tmp_path_factory.mktemp("managed")) as running:
        yield running


def _get(system: System, where: str, **headers: str) -> httpx.Response:
    """Send a GET with the token and further headers."""
    headers = {"Authorization": f"Bearer {system.token}"} | headers
    return httpx.get(system.management_url + where, headers=headers, trust_env=False, verify=False)


def _info(system: System, payer: Payer) -> dict[str, Any]:
    found: dict[str, Any] = _get(system, path(payer.outpoint).removeprefix("/v2")).json()
    return found


def test_health_describes_the_server(system: System) -> None:
    """Health has network, signer, chain and the watcher's last scan; it is 200 while payments are accepted."""
    answer = _get(system, "/health")
    health = answer.json()
    assert answer.status_code == 200
    assert (health["network"], health["signer"], health["frozen"], health["alarms"]) == ("debug", "debug", [], [])
    assert health["identity"] == StaticKey(DEBUG_KEY).identity_key().public_key.hex()
    assert health["watcher_last_look"] > 1_700_000_000


def test_totals_count_channels_and_satoshi(own: System, http: httpx.Client) -> None:
    """Totals have channels and satoshi by state, the unsettled value, and the first expiry."""
    assert _get(own, "/totals").json()["next_expiry"] is None
    early, late, closed = Payer(2_000_000_000), Payer(2_100_000_000), Payer(1_950_000_000)
    for payer, paid in ((early, 100_000), (late, 200_000), (closed, 400_000)):
        assert V1(own.url, payer, http).open(payer.payment(paid)).status_code == 201
    assert V1(own.url, closed, http).close(closed.payment(400_000)).status_code == 202
    totals = _get(own, "/totals").json()
    assert (totals["channels"]["open"], totals["channels"]["closed"]) == (2, 1)
    assert (totals["received_sat"]["open"], totals["received_sat"]["closed"]) == (300_000, 400_000)
    assert (totals["unsettled_sat"], totals["next_expiry"]) == (300_000, 2_000_000_000)


def test_a_channel_is_shown_with_all_facts(open_v1: V1, system: System) -> None:
    """GET of an outpoint has the keys of the original server, and the data to find the settlement."""
    payer = open_v1.payer
    assert open_v1.pay(payer.payment(150_000)).status_code == 200
    info = _info(system, payer)
    assert info.pop("opened_at") > 1_700_000_000
    assert info == {
        "sender": payer.public_key.hex(),
        "status": "open",
        "value_left": FUNDING_SAT - 150_000,
        "expires": payer.expiry,
        "funding_value": FUNDING_SAT,
        "funding_address": payer.terms.funding_address(Network.TEST),
        "funding_source": str(payer.outpoint),
        "settlement_txid": None,
        "value_received": 150_000,
        "payments": 1,
        "version": 1,
        "close_reason": None,
        "settlement_fee": None,
        "settlement_transaction": None,
        "spent_by": None,
        "moving": False,
        "movable": False,
        "moved_to": None,
    }


def test_a_channel_is_found_by_its_clients_key(open_v2: V2, system: System) -> None:
    """The original's `GET /channels/{client_pubkey}/info`, before and after the close.

    404 for a key without a channel.
    """
    where = f"/channels/{open_v2.payer.public_key.hex()}/info"
    assert _get(system, where).json()["status"] == "open"
    assert open_v2.close(open_v2.payer.payment(120_000)).status_code == 200
    found = _get(system, where).json()
    assert (found["status"], found["close_reason"], found["version"]) == ("closed", "client", 2)
    assert refusal(_get(system, f"/channels/{Payer().public_key.hex()}/info")) == (404, "unknown_channel")
    assert refusal(_get(system, f"/channels/{'02' + 'ff' * 32}/info")) == (400, "malformed")


def test_channels_are_listed_by_state_and_expiry(own: System, http: httpx.Client) -> None:
    """`GET /channels` lists the channels in a state, earliest expiry first, at most `limit`."""
    for expiry in (2_050_000_000, 2_040_000_000, 2_060_000_000):
        payer = Payer(expiry)
        assert V1(own.url, payer, http).open(payer.payment(100_000)).status_code == 201
    expiries = [channel["expires"] for channel in _get(own, "/channels").json()["channels"]]
    assert expiries == sorted(expiries)
    assert {2_040_000_000, 2_050_000_000, 2_060_000_000} <= set(expiries)
    assert len(_get(own, "/channels?state=open&limit=2").json()["channels"]) == 2
    assert _get(own, "/channels?limit=0").json()["channels"] == []
    assert _get(own, "/channels?state=lost").json()["channels"] == []


def test_fault_52_channels_of_all_states_are_found_by_the_beginning(own: System, http: httpx.Client) -> None:
    """`GET /channels?begins=` reads the beginning of a txid:vout in any state; `limit` holds here, too."""
    opened, closed = Payer(2_020_000_000), Payer(2_030_000_000)
    for payer in (opened, closed):
        assert V1(own.url, payer, http).open(payer.payment(100_000)).status_code == 201
    assert V1(own.url, closed, http).close(closed.payment(100_000)).status_code == 202

    def found(begins: str) -> set[str]:
        return {each["funding_source"] for each in _get(own, f"/channels?begins={begins}").json()["channels"]}

    for payer in (opened, closed):
        txid, _, vout = str(payer.outpoint).partition(":")
        assert (
            found(str(payer.outpoint)) == found(txid.upper()) == found(f"{txid[:20]}:{vout}") == {str(payer.outpoint)}
        )
        assert found(f"{txid}:7777") == found(f"{txid}0") == set()
    assert len(_get(own, "/channels?begins=&limit=2").json()["channels"]) == 2


@pytest.mark.parametrize("query", ["state=all", "state=", "limit=-1", "limit=x", "limit=1.5", "state=%ff"])
def test_a_list_with_invalid_parameters_is_refused(system: System, query: str) -> None:
    """The parameters must be a known state and a plain number."""
    assert refusal(_get(system, f"/channels?{query}"))[0] == 400


def test_the_operator_closes_a_channel(open_v1: V1, system: System) -> None:
    """POST with the token settles; a second POST has the same answer."""
    where = path(open_v1.payer.outpoint).removeprefix("/v2") + "/close"
    first, second = system.manage("POST", where), system.manage("POST", where)
    assert (first.status_code, first.json()["close_reason"]) == (200, "operator")
    assert len(first.json()["settlement_txid"]) == 64
    assert (second.status_code, second.json()) == (200, first.json())
    assert refusal(open_v1.pay(open_v1.payer.payment(200_000))) == (410, "channel_closed")


@pytest.mark.parametrize("token", [None, "", "Bearer", "Bearer x", "Basic {}", "bearer {}", "Bearer {}x", "{}"])
def test_changes_need_the_token(open_v1: V1, system: System, token: str | None) -> None:
    """POST without the exact token of this run is 401 and changes nothing."""
    headers = {} if token is None else {"Authorization": token.format(system.token)}
    where = path(open_v1.payer.outpoint).removeprefix("/v2")
    for resource in (f"{where}/close", "/backups"):
        answer = httpx.post(system.management_url + resource, headers=headers, trust_env=False, verify=False)
        assert refusal(answer) == (401, "unauthorized")
    assert _info(system, open_v1.payer)["status"] == "open"


def test_a_token_that_is_not_ascii_is_refused(system: System) -> None:
    """A header with bytes beyond ASCII is refused like a wrong token, and causes no error."""
    where = urlsplit(system.management_url)
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        connection.sendall(b"POST /backups HTTP/1.0\r\nAuthorization: Bearer \xff\xfe\xe2\x82\xac\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_the_token_is_the_users_own(system: System) -> None:
    """Only the user that runs the server can read the token file."""
    assert (system.state / "management.token").stat().st_mode & 0o777 == 0o600


def test_unknown_paths_and_channels_are_not_found(system: System) -> None:
    """Unknown channels and paths are 404, with the token and without."""
    unknown = path(Payer().outpoint).removeprefix("/v2")
    assert refusal(_get(system, unknown)) == (404, "unknown_channel")
    assert refusal(system.manage("POST", f"{unknown}/close")) == (404, "unknown_channel")
    assert refusal(_get(system, "/nowhere")) == (404, "no_such_route")


@pytest.mark.parametrize("where", ["/totals", "/channels", "/channels?state=closed", "/nowhere"])
def test_fault_38_reading_needs_the_token_too(system: System, where: str) -> None:
    """Other users of the machine can't read channels or totals without the token; `/health` is open for monitors."""
    for headers in ({}, {"Authorization": "Bearer x"}):
        answer = httpx.get(system.management_url + where, headers=headers, trust_env=False, verify=False)
        assert refusal(answer) == (401, "unauthorized")
    assert httpx.get(system.management_url + "/health", trust_env=False, verify=False).status_code == 200


FOREIGN = [
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.0.0.1.evil.example:{port}",
    "",
]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("where", ["/health", "/channels", "/nowhere"])
def test_fault_71_a_foreign_host_is_misdirected(system: System, host: str, where: str) -> None:
    """A request with a foreign host name (DNS rebinding) reads nothing, with the token or without."""
    port = urlsplit(system.management_url).port
    assert refusal(_get(system, where, Host=host.format(port=port))) == (421, "misdirected")


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}"])
def test_fault_71_own_hosts_are_served(system: System, host: str) -> None:
    """Requests to local names with the listener's port are served, and no cache may store the answers."""
    answer = _get(system, "/health", Host=host.format(port=urlsplit(system.management_url).port))
    assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "no-store")


@pytest.mark.parametrize(
    "sent",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
    ],
)
def test_fault_71_pages_of_other_sites_get_nothing(system: System, sent: dict[str, str]) -> None:
    """A browser request from a page of another site is refused; one from the operator's own page is served."""
    for where in ("/health", "/channels"):
        assert refusal(_get(system, where, **sent)) == (403, "cross_site")
    assert _get(system, "/health", **{"Sec-Fetch-Site": "none"}).status_code == 200
    assert _get(system, "/health", **{"Sec-Fetch-Site": "same-origin"}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
def test_web_pages_get_nothing(system: System, method: str) -> None:
    """No answer of this listener has headers that let a page of another origin read it."""
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for where in ("/health", "/channels", "/backups", "/nowhere"):
        answer = httpx.request(method, system.management_url + where, headers=headers, trust_env=False, verify=False)
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_interfaces_are_separate(system: System) -> None:
    """Clients can't reach the operator's resources, and the operator's listener accepts no payments."""
    assert httpx.get(f"{system.url}/health", trust_env=False, verify=False).json() == {"status": "ok"}
    for where in ("/totals", "/channels", f"/channels/{Payer().public_key.hex()}/info"):
        assert refusal(httpx.get(system.url + where, trust_env=False, verify=False)) == (404, "no_such_route")
    info = f"/v1/fundingInfo?client_pubkey={Payer().public_key.hex()}&exp_time=1500000000"
    assert refusal(_get(system, info)) == (404, "no_such_route")
