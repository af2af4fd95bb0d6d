"""TLS of HTTP clients: plain HTTP needs no authorities, and https never goes without them."""

from __future__ import annotations

import ssl

import httpx
import pytest

from paychan.client.transport.proxy import ProxyTransport
from paychan.shared.tls import verification, without_authorities


@pytest.fixture
def settings() -> list[ssl.SSLContext]:
    """TLS settings that a transport has asked for."""
    return []


@pytest.fixture
def transport(settings: list[ssl.SSLContext]) -> ProxyTransport:
    def read() -> ssl.SSLContext:
        settings.append(without_authorities())
        return settings[-1]

    return ProxyTransport(read)


@pytest.mark.parametrize(("url", "reads"), [("http://127.0.0.1:1", 0), ("https://127.0.0.1:1", 1)])
def test_authorities_are_read_for_https_alone(
    transport: ProxyTransport, settings: list[ssl.SSLContext], url: str, reads: int
) -> None:
    with httpx.Client(transport=transport) as client, pytest.raises(httpx.ConnectError):
        client.get(url)

    assert len(settings) == reads


def test_a_client_of_plain_http_trusts_no_certificate() -> None:
    """A mistake that lets it speak TLS ends its connections."""
    context = without_authorities()

    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.get_ca_certs() == []


@pytest.mark.parametrize("url", ["https://node", "HTTP://node", "httpx://node", "node"])
def test_every_other_url_is_verified(url: str) -> None:
    assert verification(url) is True
