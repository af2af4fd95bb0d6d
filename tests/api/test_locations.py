"""RBPCP §5.8: `Location` is absolute, has the port, and names the host of the request, unless a URL is configured."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tornado.httputil import HTTPHeaders

from paychan.api.forwarded import address
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System

FORWARDED = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "pay.example", "Host": "inside:8000"}


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with System(tmp_path_factory.mktemp("proxied"), sections={"http": "trust_forwarded = true"}) as running:
        yield running


def _location(url: str, payer: Payer, headers: dict[str, str]) -> str:
    query = f"client_pubkey={payer.public_key.hex()}&exp_time={payer.expiry}"
    answer = httpx.get(f"{url}/v1/fundingInfo?{query}", headers=headers, trust_env=False, verify=False)
    assert answer.status_code == 200
    base, _, rest = answer.headers["Location"].partition("/v1/")
    assert rest == f"channels/new?{query}"
    return base


@pytest.mark.parametrize(
    "host", ["localhost:8000", "pay.example", "10.0.0.1:65535", "[::1]:8000", "a-b.c", "pay_1.lan:80"]
)
def test_the_host_is_that_of_the_request(system: System, host: str) -> None:
    """Defect D12: `Location` has the Host header with its port."""
    assert _location(system.url, Payer(), {"Host": host}) == f"http://{host}"


@pytest.mark.parametrize("host", ["", "*", "a'b", "(x)", "a;b=1", "$", "x:123456", "%41", "[x]", "::"])
def test_a_strange_host_is_not_repeated(system: System, host: str) -> None:
    """If the Host header is not a host name with a port, `Location` has the address of the connection."""
    assert _location(system.url, Payer(), {"Host": host}) == system.url


@pytest.mark.parametrize("host", ["a b", 'a"b', "<script>", "a@b", "a/b", "a,b", "a\\b", "a#b", "a?b"])
def test_an_impossible_host_is_refused(system: System, host: str) -> None:
    """A Host header with characters that are not allowed is a 400 (RFC 9112), and is not repeated."""
    query = f"client_pubkey={Payer().public_key.hex()}&exp_time=1500000000"
    answer = httpx.get(f"{system.url}/v1/fundingInfo?{query}", headers={"Host": host}, trust_env=False, verify=False)
    assert (answer.status_code, "Location" in answer.headers) == (400, False)


def test_a_request_without_host_gets_the_address_of_its_connection(system: System) -> None:
    """HTTP/1.0 needs no Host header; `Location` still has the right port."""
    where = urlsplit(system.url)
    query = f"client_pubkey={Payer().public_key.hex()}&exp_time=1500000000"
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        connection.sendall(f"GET /v1/fundingInfo?{query} HTTP/1.0\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    assert answer.startswith("HTTP/1.1 200 ")
    assert f"\r\nLocation: {system.url}/v1/channels/new?" in answer


def test_forwarded_headers_are_ignored_unless_trusted(system: System) -> None:
    """Any client can send X-Forwarded headers: without a configured proxy the server ignores them."""
    assert _location(system.url, Payer(), FORWARDED) == "http://inside:8000"


def test_forwarded_headers_of_a_trusted_proxy_count(proxied: System) -> None:
    """Behind a configured TLS proxy, `Location` has the scheme and host that the client sees."""
    assert _location(proxied.url, Payer(), FORWARDED) == "https://pay.example"


@pytest.mark.parametrize("host", ["", "a b", ",b", "<x>", 'evil"', "a/b", "user@host", "a b, c"])
def test_an_invalid_forwarded_host_is_ignored(proxied: System, host: str) -> None:
    """If the forwarded host is not a host name, `Location` has the Host header."""
    assert _location(proxied.url, Payer(), FORWARDED | {"X-Forwarded-Host": host}) == "https://inside:8000"


@pytest.mark.parametrize("scheme", ["javascript", "ftp", "", "https://x"])
def test_an_unknown_forwarded_scheme_is_ignored(proxied: System, scheme: str) -> None:
    """The only schemes in `Location` are http and https."""
    assert _location(proxied.url, Payer(), FORWARDED | {"X-Forwarded-Proto": scheme}) == "http://pay.example"


PROXIES: dict[str, tuple[dict[str, str], str]] = {
    "a list of hosts": ({"X-Forwarded-Host": "pay.example, inner:8080"}, "http://pay.example"),
    "a list of schemes": ({"X-Forwarded-Proto": "https, http"}, "https://inside:8000"),
    "a scheme in upper case": ({"X-Forwarded-Proto": "HTTPS"}, "https://inside:8000"),
    "the scheme of a WebSocket": ({"X-Forwarded-Proto": "wss"}, "https://inside:8000"),
    "a port": ({"X-Forwarded-Host": "pay.example", "X-Forwarded-Port": "8443"}, "http://pay.example:8443"),
    "a list of ports": ({"X-Forwarded-Host": "a", "X-Forwarded-Port": "8443, 80"}, "http://a:8443"),
    "the usual port": (
        {"X-Forwarded-Host": "pay.example", "X-Forwarded-Port": "443", "X-Forwarded-Proto": "https"},
        "https://pay.example",
    ),
    "a port beside one in the host": ({"X-Forwarded-Host": "a:1", "X-Forwarded-Port": "2"}, "http://a:1"),
    "a port of an IPv6 host": (
        {"X-Forwarded-Host": "[2001:db8::1]", "X-Forwarded-Port": "2"},
        "http://[2001:db8::1]:2",
    ),
    "no port": ({"X-Forwarded-Host": "a", "X-Forwarded-Port": "x"}, "http://a"),
    "a prefix": ({"X-Forwarded-Prefix": "/shop/"}, "http://inside:8000/shop"),
    "two prefixes": ({"X-Forwarded-Prefix": "/a, /b"}, "http://inside:8000/a/b"),
    "a strange prefix": ({"X-Forwarded-Prefix": "//evil.example/'"}, "http://inside:8000"),
    "a prefix without a slash": ({"X-Forwarded-Prefix": "shop"}, "http://inside:8000"),
    "RFC 7239": ({"Forwarded": 'for=192.0.2.1;host="pay.example:8443";proto=https'}, "https://pay.example:8443"),
    "RFC 7239, two proxies": (
        {"Forwarded": "host=pay.example;Proto=https, for=10.0.0.1;host=b"},
        "https://pay.example",
    ),
    "RFC 7239, quoted comma": ({"Forwarded": 'by="a,b;host=c" ; host=d'}, "http://d"),
    "RFC 7239, unreadable": ({"Forwarded": 'host="pay.example'}, "http://inside:8000"),
    "both families": ({"X-Forwarded-Host": "a", "Forwarded": "host=b;proto=https"}, "http://a"),
}


@pytest.mark.parametrize("kind", PROXIES)
def test_fault_37_headers_of_proxies_are_understood(proxied: System, kind: str) -> None:
    """Lists, ports, prefixes and RFC 7239 give the URL that the client sees."""
    headers, base = PROXIES[kind]
    assert _location(proxied.url, Payer(), {"Host": "inside:8000"} | headers) == base


ADDRESSES = {
    "nothing": ({}, "peer"),
    "one": ({"X-Forwarded-For": "192.0.2.1"}, "192.0.2.1"),
    "a client's own entry": ({"X-Forwarded-For": "6.6.6.6, 192.0.2.1"}, "192.0.2.1"),
    "two proxies of one machine": ({"X-Forwarded-For": "192.0.2.1, 127.0.0.1, ::1", "X-Real-Ip": "::1"}, "192.0.2.1"),
    "a port": ({"X-Forwarded-For": "192.0.2.1:4711"}, "192.0.2.1"),
    "IPv6": ({"X-Forwarded-For": "[2001:db8::1]:4711"}, "2001:db8::1"),
    "IPv6, no brackets": ({"X-Forwarded-For": "2001:db8::1"}, "2001:db8::1"),
    "no address": ({"X-Forwarded-For": "192.0.2.1, unknown"}, "peer"),
    "a real address": ({"X-Real-Ip": "192.0.2.1"}, "192.0.2.1"),
    "a real address of the client": ({"X-Forwarded-For": "192.0.2.1", "X-Real-Ip": "6.6.6.6"}, "192.0.2.1"),
    "only this machine": ({"X-Forwarded-For": "127.0.0.1"}, "peer"),
    "RFC 7239": ({"Forwarded": 'for="[2001:db8::1]:1", for=127.0.0.1;by=x'}, "2001:db8::1"),
    "RFC 7239, hidden": ({"Forwarded": "for=_hidden"}, "peer"),
    "RFC 7239 of the client": ({"Forwarded": "for=6.6.6.6", "X-Forwarded-For": "192.0.2.1"}, "192.0.2.1"),
}


@pytest.mark.parametrize("kind", ADDRESSES)
def test_fault_37_the_address_is_that_of_the_client(kind: str) -> None:
    """The address that the nearest proxy of another machine saw counts, not what the client wrote itself."""
    headers, expected = ADDRESSES[kind]
    assert address(HTTPHeaders(headers), "peer") == expected


def test_fault_37_headers_that_are_not_believed_are_named_once(tmp_path: Path) -> None:
    """The log says once that a proxy's headers arrive and are ignored, and which setting believes them."""
    with System(tmp_path / "plain") as running:
        assert running.server is not None
        assert "trust_forwarded" not in running.server.text()
        for _ in range(3):
            _location(running.url, Payer(), {"Host": "x", "X-Forwarded-For": "1.2.3.4", "Forwarded": "for=1.2.3.4"})
        lines = [line for line in running.server.text().splitlines() if "http.trust_forwarded = true" in line]
    assert len(lines) == 1
    assert "X-Forwarded-For" in lines[0]
    assert "Forwarded" in lines[0]


def test_a_public_url_is_the_base_of_everything(tmp_path_factory: pytest.TempPathFactory, http: httpx.Client) -> None:
    """A configured public URL, also one with a path, takes precedence over all headers of the request."""
    settings = {"http": 'public_url = "https://pay.example/paychan/"\ntrust_forwarded = true'}
    with System(tmp_path_factory.mktemp("public"), sections=settings) as running:
        assert _location(running.url, Payer(), FORWARDED) == "https://pay.example/paychan"
        v1 = V1(running.url, Payer(), http)
        for status in (201, 409):
            opened = v1.open(v1.payer.payment(100_000))
            assert opened.status_code == status
            assert opened.headers["Location"] == v1.resource.replace(running.url, "https://pay.example/paychan")
