"""RBPCP §5.8: `Location` is absolute, has the port, and names the host of the request, unless a URL is configured."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

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


@pytest.mark.parametrize("host", ["localhost:8000", "pay.example", "10.0.0.1:65535", "[::1]:8000", "a-b.c"])
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


@pytest.mark.parametrize("host", ["", "a b", "a,b", "<x>", 'evil"', "a/b", "user@host"])
def test_an_invalid_forwarded_host_is_ignored(proxied: System, host: str) -> None:
    """If the forwarded host is not a host name, `Location` has the Host header."""
    assert _location(proxied.url, Payer(), FORWARDED | {"X-Forwarded-Host": host}) == "https://inside:8000"


@pytest.mark.parametrize("scheme", ["javascript", "ftp", "", "https://x"])
def test_an_unknown_forwarded_scheme_is_ignored(proxied: System, scheme: str) -> None:
    """The only schemes in `Location` are http and https."""
    assert _location(proxied.url, Payer(), FORWARDED | {"X-Forwarded-Proto": scheme}) == "http://pay.example"


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
