"""Real proxies in front of the server, with the shipped files and with the lines that tutorials have.

Clients get the same answers as without a proxy, `Location` has the URL that they used, payments take the fast path, and an
idle stream outlives the proxies' time-outs.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from websockets.sync.client import connect

from paychan.protocol.wire.rbpcp import Dialect
from tests.api.streams import pay_frame, stream_url
from tests.lib.electrumx import make_certificate
from tests.lib.ports import free_port
from tests.lib.proxies import COPIED, PLAIN, Proxy, Recorder, payments, shipped
from tests.lib.rbpcp import V1, V2, Payer
from tests.lib.system import System

_SECONDS = 2
"""The proxies' time-outs in these tests, instead of 60 s; the server sends a ping every half second."""


APART = """
    server {{
        listen {port};
        location / {{
            proxy_pass http://{upstream};
            proxy_http_version 1.1;
            proxy_read_timeout {seconds}s;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection "upgrade";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-Port $server_port;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }}
    }}
"""
"""`$host` has no port."""

PREFIXED = """
    server {{
        listen {port};
        location /shop/ {{
            proxy_pass http://{upstream}/;
            proxy_http_version 1.1;
            proxy_read_timeout {seconds}s;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection "upgrade";
            proxy_set_header Forwarded 'for=$remote_addr;host="$http_host";proto=$scheme';
            proxy_set_header X-Forwarded-Prefix /shop;
        }}
    }}
"""
"""The server is below a path, and the proxy speaks RFC 7239."""


class Chain(NamedTuple):
    """A server behind proxies."""

    system: System
    url: str
    """URL of the outermost proxy."""
    recorder: Recorder
    streams: bool


class Site:
    """Builds proxies, from the innermost on."""

    def __init__(self, directory: Path, upstream: str, stack: ExitStack) -> None:
        self.directory, self.upstream, self.stack = directory, upstream, stack
        self.url = ""
        self.certificate = directory / "site.crt"
        make_certificate(self.certificate)
        both = self.certificate.read_text() + self.certificate.with_suffix(".key").read_text()
        self.certificate.with_suffix(".both").write_text(both)

    def add(self, program: str, lines: str, port: int, scheme: str = "http") -> None:
        self.url = f"{scheme}://localhost:{port}"
        directory = self.directory / f"{program}{port}"
        self.stack.enter_context(Proxy(program, directory, lines, self.url.replace("localhost", "127.0.0.1")))
        self.upstream = f"127.0.0.1:{port}"

    def shipped(self, program: str, name: str) -> None:
        port = free_port()
        self.add(program, shipped(name, self.certificate, port, self.upstream, _SECONDS), port, "https")

    def nginx(self, lines: str, scheme: str = "") -> None:
        port = free_port()
        filled = lines.format(port=port, upstream=self.upstream, seconds=_SECONDS, scheme=scheme)
        self.add("nginx", filled, port)


def _copied_twice(site: Site) -> None:
    site.nginx(COPIED)
    site.nginx(COPIED, "proxy_set_header X-Forwarded-Proto $scheme;")


def _copied_behind_haproxy(site: Site) -> None:
    site.nginx(COPIED)
    site.shipped("haproxy", "haproxy.cfg")


def _with_prefix(site: Site) -> None:
    site.nginx(PREFIXED)
    site.url += "/shop"


def _plain_behind_caddy(site: Site) -> None:
    site.nginx(PLAIN)
    site.shipped("caddy", "Caddyfile")


SITES: dict[str, Callable[[Site], None]] = {
    "nginx as shipped": lambda site: site.shipped("nginx", "nginx.conf"),
    "Caddy as shipped": lambda site: site.shipped("caddy", "Caddyfile"),
    "haproxy as shipped": lambda site: site.shipped("haproxy", "haproxy.cfg"),
    "nginx, copied block": lambda site: site.nginx(COPIED, "proxy_set_header X-Forwarded-Proto $scheme;"),
    "nginx, HTTP/1.0": lambda site: site.nginx(PLAIN),
    "nginx, host and port apart": lambda site: site.nginx(APART),
    "nginx with a prefix and RFC 7239": _with_prefix,
    "two nginx, copied block": _copied_twice,
    "nginx behind haproxy": _copied_behind_haproxy,
    "nginx with HTTP/1.0 behind Caddy": _plain_behind_caddy,
}


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    sections = {"http": "trust_forwarded = true", "stream": "ping_seconds = 0.5"}
    with System(tmp_path_factory.mktemp("behind"), sections=sections) as running:
        yield running


@pytest.fixture(scope="module", params=SITES)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, behind: System) -> Iterator[Chain]:
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(behind.url))
        site = Site(tmp_path_factory.mktemp("site"), recorder.address, stack)
        SITES[request.param](site)
        yield Chain(behind, site.url, recorder, streams="HTTP/1.0" not in request.param)


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, verify=False, timeout=30) as client:
        yield client


def test_fault_36_37_locations_are_those_of_the_client(chain: Chain, client: httpx.Client) -> None:
    """A v1 client follows `Location` from terms to opening to payment, with the scheme and port of the outermost proxy."""
    payer = V1(chain.url, Payer(), client)
    assert payer.funding_info().headers["Location"].startswith(f"{chain.url}/v1/channels/new?")
    opened = payer.open(payer.payer.payment(100_000))
    assert opened.status_code == 201
    assert opened.headers["Location"] == payer.resource
    assert payer.pay(payer.payer.payment(100_010)).json()["value_received"] == 10


def test_fault_36_37_payments_take_the_fast_path(chain: Chain, client: httpx.Client) -> None:
    """Each payment that a proxy forwards, of v1 and of both forms of v2, is plain to the parser of the fast path."""
    payers = [V1(chain.url, Payer(), client), *(V2(chain.url, Payer(), client, dialect) for dialect in Dialect)]
    for payer in payers:
        assert payer.open(payer.payer.payment(100_000)).status_code == 201
    before = _counted(chain.recorder)
    for paid in range(100_001, 100_006):
        for payer in payers:
            assert payer.pay(payer.payer.payment(paid)).status_code == 200
    assert [now - then for now, then in zip(_counted(chain.recorder), before, strict=True)] == [15, 15]


def _counted(recorder: Recorder) -> list[int]:
    """Count all payments so far: those that the fast path reads, and all."""
    each = [payments(bytes(sent)) for sent in recorder.sent]
    return [sum(counts) for counts in zip(*each, strict=True)] or [0, 0]


def test_fault_36_37_refusals_arrive_unharmed(chain: Chain, client: httpx.Client) -> None:
    """Status, body and the fields that a client reads are those of the server itself."""
    channel = f"/v1/channels/{'0' * 64}/0"
    requests = [
        ("PUT", channel, b""), ("PUT", f"{channel}?payment=AAAA", b"x"), ("PATCH", channel, b""), ("GET", "/nowhere", b""),
        ("PUT", channel.replace("v1", "v2") + f"?secret={'0' * 64}", b"{}"), ("OPTIONS", channel, b""), ("GET", "/health", b""),
        ("HEAD", "/health", b""), ("POST", "/v1/channels/new?client_pubkey=x", b""), ("PUT", channel, b"x" * 5000),
    ]  # fmt: skip
    fields = ("Allow", "Cache-Control", "Content-Type", "Access-Control-Allow-Origin", "Access-Control-Expose-Headers")
    for method, path, body in requests:
        direct, through = (client.request(method, url + path, content=body) for url in (chain.system.url, chain.url))
        assert (through.status_code, through.content) == (direct.status_code, direct.content)
        assert [through.headers.get(name) for name in fields] == [direct.headers.get(name) for name in fields]


def test_fault_36_37_an_idle_stream_outlives_the_proxies_time_outs(chain: Chain, client: httpx.Client) -> None:
    """The server's pings keep a stream open, twice as long as a proxy lets a silent connection live."""
    if not chain.streams:
        return  # HTTP/1.0 has no upgrade
    payer = V2(chain.url, Payer(), client, Dialect.S)
    assert payer.open(payer.payer.payment(100_000)).status_code == 201
    tls = _trusting_all() if chain.url.startswith("https") else None
    with connect(stream_url(payer), proxy=None, compression=None, ssl=tls) as stream:
        pay_frame(stream, [payer.payer.payment(100_001)])
        time.sleep(2 * _SECONDS)
        assert len(pay_frame(stream, [payer.payer.payment(100_002)])) == 1


def _trusting_all() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def test_fault_36_a_stream_without_upgrade_is_refused_by_a_sentence(client: httpx.Client, tmp_path: Path) -> None:
    """Behind a proxy that speaks HTTP/1.0 an upgrade is a 400 that names the missing header."""
    with System(tmp_path / "old") as running, ExitStack() as stack:
        site = Site(tmp_path, running.url.removeprefix("http://"), stack)
        site.nginx(PLAIN)
        answer = client.get(f"{site.url}/v2/channels/{'0' * 64}/0/stream")
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed")
        assert "Upgrade" in answer.json()["error"]


@pytest.mark.parametrize("name", ["pay_1.lan", "a_b:8080", "_"])
def test_fault_36_a_name_with_an_underscore_goes_through(
    behind: System, client: httpx.Client, tmp_path: Path, name: str
) -> None:
    """Names of containers have underscores; `Location` repeats them."""
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(behind.url))
        site = Site(tmp_path, recorder.address, stack)
        site.nginx(COPIED)
        client.headers["Host"] = name
        payer = V1(site.url, Payer(), client)
        assert payer.funding_info().headers["Location"].startswith(f"http://{name}/v1/channels/new?")
        assert payer.open(payer.payer.payment(100_000)).status_code == 201
        assert payer.pay(payer.payer.payment(100_001)).status_code == 200
        assert _counted(recorder) == [1, 1]


def test_fault_37_ipv6_on_both_sides_of_a_proxy(tmp_path: Path, client: httpx.Client) -> None:
    """Server and proxy listen on IPv6 addresses, and each URL has its brackets."""
    listen = 'listen = "::1"'
    with System(tmp_path / "six", sections={"http": listen, "management": listen}) as running, ExitStack() as stack:
        for url in (running.url, running.management_url):
            assert re.fullmatch(r"http://\[::1\]:\d+", url)
            assert client.get(f"{url}/health").status_code == 200
        site = Site(tmp_path, running.url.removeprefix("http://"), stack)
        site.nginx(COPIED)
        url = site.url.replace("localhost", "[::1]")
        for base in (url, running.url):
            payer = V1(base, Payer(), client)
            assert payer.funding_info().headers["Location"].startswith(f"{base}/v1/channels/new?")
            assert payer.open(payer.payer.payment(100_000)).status_code == 201
            assert payer.pay(payer.payer.payment(100_001)).status_code == 200
