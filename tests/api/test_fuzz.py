"""Threats 26 and 27: any query and any body gets exactly one answer, and never a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from paychan.protocol.payment import encode_v1
from tests.api.wire import exchange, statuses
from tests.lib.rbpcp import V1, V2, Payer
from tests.lib.system import System

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TARGET = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=60)
"""Any characters that a request line may have."""


@pytest.fixture(scope="module")
def channels(system: System) -> Iterator[tuple[V1, V2, V2]]:
    """Open channels of both versions, so that nearly valid requests get far; the last one may become closed."""
    with httpx.Client(trust_env=False, verify=False) as http:
        v1, *v2 = V1(system.url, Payer(), http), V2(system.url, Payer(), http), V2(system.url, Payer(), http)
        for client in (v1, *v2):
            assert client.open(client.payer.payment(100_000)).status_code == 201
        yield v1, v2[0], v2[1]


def _ask(url: str, method: str, target: str, body: bytes = b"") -> int:
    """Send one request without changes, and return the status of its only answer."""
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    found = statuses(exchange(url, head.encode() + body))
    assert len(found) == 1
    event(f"{method} {found[0]}")
    return found[0]


def _damaged(text: str, draw: st.DrawFn) -> str:
    """Return the text with one piece replaced, as fuzzers do."""
    begin = draw(st.integers(0, len(text)))
    end = draw(st.integers(begin, min(len(text), begin + 8)))
    return text[:begin] + draw(TARGET) + text[end:]


@st.composite
def _queries(draw: st.DrawFn) -> list[tuple[str, str]]:
    names = st.sampled_from(["client_pubkey", "exp_time", "change_address", "payment", "test", "secret"]) | TARGET
    values = TARGET | st.text(max_size=20).map(quote) | st.binary(max_size=20).map(quote) | st.integers().map(str)
    return draw(st.lists(st.tuples(names, values), max_size=6))


@FUZZ
@given(query=_queries(), where=st.integers(0, 6))
def test_threat_26_27_no_query_makes_the_server_fail(
    channels: tuple[V1, V2, V2], query: list[tuple[str, str]], where: int
) -> None:
    """Any query on any resource gets one answer, below 500."""
    v1, v2, _ = channels
    pay, post, close = (urlsplit(url).path for url in (v1.resource, v2.resource(), v2.resource("/close")))
    method, path = [
        ("GET", "/v1/fundingInfo"),
        ("POST", "/v1/channels/new"),
        ("PUT", pay),
        ("PUT", f"{pay}/pay"),
        ("DELETE", pay),
        ("POST", post),
        ("PUT", close),
    ][where]
    assert _ask(v1.url, method, f"{path}?{'&'.join(map('='.join, query))}") < 500


@FUZZ
@given(data=st.data(), which=st.integers(0, 3))
def test_threat_26_27_no_damaged_request_makes_the_server_fail(
    channels: tuple[V1, V2, V2], data: st.DataObject, which: int
) -> None:
    """A valid request with a piece replaced after its path gets one answer, below 500."""
    v1, v2, _ = channels
    payment = v1.payer.payment(100_000)
    url = [
        v1.opening_url(payment),
        f"{v1.resource}?payment={encode_v1(payment)}",
        f"{v1.url}/v1/fundingInfo?client_pubkey={v1.payer.public_key.hex()}&exp_time={v1.payer.expiry}",
        v2.resource(),
    ][which]
    parts = urlsplit(url)
    query = data.draw(st.composite(lambda draw: _damaged(parts.query, draw))())
    body = v2.body(v2.payer.payment(100_000)) if which == 3 else b""
    method = ("POST", "PUT", "GET", "PUT")[which]
    assert _ask(v1.url, method, f"{parts.path}?{query}", body) < 500


def _json() -> st.SearchStrategy[Any]:
    names = st.sampled_from(["payment_data", "application_data", "redeem_script", "funding_txid", "funding_vout"])
    more = st.sampled_from(["signature_data", "change_value", "change_address", "sighash_flag"]) | st.text(max_size=5)
    hexes = st.binary(max_size=90).map(bytes.hex)
    numbers = st.integers() | st.floats() | st.booleans() | st.none()
    return st.recursive(
        numbers | hexes | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | more, inner, max_size=8),
        max_leaves=20,
    )


@FUZZ
@given(data=st.data(), which=st.integers(0, 2), kind=st.sampled_from(["json", "bytes", "damaged", "replaced"]))
def test_threat_26_27_no_body_makes_the_server_fail(
    channels: tuple[V1, V2, V2], data: st.DataObject, which: int, kind: str
) -> None:
    """Any JSON, any bytes, and a valid body with a piece or a value replaced gets one answer, below 500."""
    v2 = channels[2 if which == 2 else 1]
    payment = v2.payer.payment(100_000)
    right = v2.opening_body(payment) if which == 0 else v2.body(payment)
    if kind == "json":
        body = json.dumps(data.draw(_json())).encode()
    elif kind == "bytes":
        body = data.draw(st.binary(max_size=200))
    elif kind == "damaged":
        body = data.draw(st.composite(lambda draw: _damaged(right.decode(), draw))()).encode()
    else:
        parsed = json.loads(right)
        inner = parsed.get("payment_data", parsed)
        inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(_json())
        body = json.dumps(parsed).encode()
    parts = urlsplit(v2.resource("/close" if which == 2 else ""))
    assert _ask(v2.url, "PUT" if which else "POST", f"{parts.path}?{parts.query}", body) < 500
