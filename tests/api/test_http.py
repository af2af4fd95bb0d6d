"""HTTP as RFC 9110 and RFC 9112 ask of an origin server, on every route and on both paths."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from paychan.api.negotiation import accepts_rather
from paychan.protocol.payment import encode_v1
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.both_paths import BOTH_PATHS
from tests.api.streams import stream_url
from tests.api.test_cors import PATHS
from tests.api.wire import exchange, statuses
from tests.lib.rbpcp import V1, V2, Payer
from tests.lib.system import System

LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
BIP70 = "application/bitcoin-paymentrequest"


def _info(version: int = 1) -> str:
    payer = Payer()
    if version == 2:
        return f"/v2/funding/{payer.expiry}/{payer.public_key.hex()}/info"
    return f"/v1/fundingInfo?client_pubkey={payer.public_key.hex()}&exp_time={payer.expiry}"


# --- methods ---------------------------------------------------------------------------------------------------------


@BOTH_PATHS
@pytest.mark.parametrize("path", [_info(), _info(2), "/health"], ids=["terms v1", "terms v2", "health"])
def test_fault_39_head_is_get_without_the_body(system: System, http: httpx.Client, path: str) -> None:
    """HEAD has status and fields of GET, with the size of its body."""
    got, head = http.get(system.url + path), http.head(system.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert {**head.headers, "date": ""} == {**got.headers, "date": ""}


@BOTH_PATHS
def test_fault_39_head_leaves_the_connection_usable(system: System) -> None:
    """After the head comes the next answer, also after a refused HEAD."""
    refused = b"HEAD /v1/channels/new HTTP/1.1\r\nHost: x\r\n\r\nHEAD /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"
    received = exchange(system.url, f"HEAD {_info()} HTTP/1.1\r\nHost: x\r\n\r\n".encode() + refused + LAST)
    assert statuses(received) == [200, 405, 404, 404]
    assert received.count(b"\r\n\r\nHTTP/1.1 ") == 3


@pytest.mark.parametrize("path", PATHS)
def test_fault_39_a_405_and_options_name_the_same_methods(system: System, http: httpx.Client, path: str) -> None:
    """RFC 9110 15.5.6: a 405 "MUST generate an Allow header field"; HEAD is in it where GET is."""
    allowed = http.options(system.url + path).headers["Allow"]
    assert http.request("PATCH", system.url + path).headers["Allow"] == allowed
    assert ("HEAD" in allowed) == ("GET" in allowed)
    assert "OPTIONS" in allowed


@BOTH_PATHS
def test_fault_39_options_of_the_whole_server(system: System) -> None:
    """RFC 9110 9.3.7: `OPTIONS *` asks what the server can do at all."""
    received = exchange(system.url, b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n" + LAST)
    assert statuses(received) == [200, 404]
    assert b"\r\nAllow: GET,HEAD,POST,DELETE,PUT,OPTIONS\r\n" in received


# --- targets and hosts ------------------------------------------------------------------------------------------------


@BOTH_PATHS
def test_fault_39_an_absolute_target_is_served(open_v1: V1) -> None:
    """RFC 9112 3.2.2: its host counts instead of Host, for payments too."""
    path = open_v1.resource.removeprefix(open_v1.url)
    payment = f"{path}?payment={encode_v1(open_v1.payer.payment(100_001))}"
    lines = (
        f"GET HTTP://pay_1.example:81{_info()}",
        f"PUT http://pay.example{payment}",
        "GET https://x",
        "GET http://x?a",
    )
    content = "".join(f"{line} HTTP/1.1\r\nHost: other\r\n\r\n" for line in lines)
    received = exchange(open_v1.url, content.encode() + LAST)
    assert statuses(received) == [200, 200, 404, 404, 404]
    assert b"\r\nLocation: http://pay_1.example:81/v1/channels/new?" in received


@pytest.mark.parametrize("target", ["http:///v1", "http://", "http://a@b/v1", "http://a,b/v1", "http://a b/v1"])
def test_fault_39_an_absolute_target_without_a_host_is_a_400(system: System, target: str) -> None:
    """A URL without a host, or with user information, names no resource of this server."""
    received = exchange(system.url, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode() + LAST)
    assert statuses(received) == [400]


def test_fault_39_a_stream_may_begin_with_an_absolute_target(system: System, http: httpx.Client) -> None:
    """RFC 6455 4.2.1 names this form of the target, too."""
    client = V2(system.url, Payer(), http, Dialect.S)
    assert client.open(client.payer.payment(100_000)).status_code == 201
    url = stream_url(client).replace("ws", "http", 1)
    key = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
    fields = b"Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + key
    received = exchange(system.url, f"GET {url} HTTP/1.1\r\n".encode() + fields + b"\x88\x80\0\0\0\0")
    assert received.startswith(b"HTTP/1.1 101 ")


BAD_HOSTS = {
    "none": b"",
    "two": b"Host: x\r\nHost: x\r\n",
    "two in a list": b"Host: x, x\r\n",
    "a path": b"Host: x/y\r\n",
    "a user": b"Host: a@b\r\n",
    "a space": b"Host: a b\r\n",
}


@BOTH_PATHS
@pytest.mark.parametrize("kind", BAD_HOSTS)
@pytest.mark.parametrize("method", ["GET", "PUT", "OPTIONS"])
def test_fault_39_a_missing_repeated_or_invalid_host_is_a_400(system: System, method: str, kind: str) -> None:
    """RFC 9112 3.2: a server "MUST respond with a 400 (Bad Request)"; it is an answer like all others."""
    path = "/v1/channels/" + "0" * 64 + "/0?payment=AAAA"
    received = exchange(system.url, f"{method} {path} HTTP/1.1\r\n".encode() + BAD_HOSTS[kind] + b"\r\n" + LAST)
    assert statuses(received) == [400]
    for field in (b"Date: ", b"Access-Control-Allow-Origin: *", b"Cache-Control: no-store", b"Connection: close"):
        assert b"\r\n" + field in received
    assert b'"code":"malformed"' in received


# --- connection -------------------------------------------------------------------------------------------------------


@BOTH_PATHS
@pytest.mark.parametrize("option", ["close", "x, Close", "close,keep-alive", "upgrade , close"])
def test_fault_39_close_among_other_options_is_heeded(system: System, option: str) -> None:
    """RFC 9112 9.6: the server closes after the answer, and says so."""
    for line in (f"GET {_info()}", "PUT /v1/channels/" + "0" * 64 + "/0?payment=AAAA"):
        received = exchange(system.url, f"{line} HTTP/1.1\r\nHost: x\r\nConnection: {option}\r\n\r\n".encode() + LAST)
        assert len(statuses(received)) == 1
        assert b"\r\nConnection: close\r\n" in received


@BOTH_PATHS
def test_fault_36_http_1_0_is_told_that_the_connection_ends(system: System) -> None:
    """HTTP/1.0 is what nginx speaks by default: each answer is complete and says that the connection closes."""
    for line in (f"GET {_info()}", "PUT /v1/channels/" + "0" * 64 + "/0?payment=AAAA"):
        received = exchange(system.url, f"{line} HTTP/1.0\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert len(statuses(received)) == 1
        assert b"\r\nConnection: close\r\n" in received


# --- caches -----------------------------------------------------------------------------------------------------------


@BOTH_PATHS
def test_fault_39_no_answer_is_stored(open_v1: V1, system: System) -> None:
    """Every answer has `Cache-Control: no-store` and a date, refusals too."""
    path = open_v1.resource.removeprefix(open_v1.url)
    pay = f"PUT {path}?payment={encode_v1(open_v1.payer.payment(100_001))}"
    lines = [
        pay,
        f"PUT {path}",
        f"GET {_info()}",
        "OPTIONS /v1/channels/new",
        "GET /nowhere",
        "PATCH /health",
        "GET /health",
    ]
    content = "".join(f"{line} HTTP/1.1\r\nHost: x\r\n\r\n" for line in lines)
    received = exchange(system.url, content.encode() + LAST)
    assert statuses(received) == [200, 400, 200, 200, 404, 405, 200, 404]
    assert received.count(b"\r\nCache-Control: no-store\r\n") == received.count(b"\r\nDate: ") == len(lines) + 1


@BOTH_PATHS
def test_fault_39_an_answer_that_depends_on_accept_says_so(system: System, http: httpx.Client) -> None:
    """RFC 9110 12.5.5: v2's terms are JSON or a BIP70 request by `Accept`; refusals there say `Vary`, too."""
    url = system.url + _info(2)
    for accept, kind in (("*/*", "application/json"), (BIP70, BIP70), (f"{BIP70};q=0", "application/json")):
        answer = http.get(url, headers={"Accept": accept})
        assert (answer.headers["Content-Type"], answer.headers["Vary"]) == (kind, "Accept")
    assert http.get(f"{system.url}/v2/funding/1/x/info").headers["Vary"] == "Accept"


@pytest.mark.parametrize(
    ("accept", "special"),
    [
        ("", False), ("*/*", False), ("text/html", False), (BIP70, True), (BIP70.upper(), True),
        (f"{BIP70}, */*;q=0.5", True), (f"{BIP70};q=0.0", False), (f"{BIP70};q=0.5, application/json", False),
        (f"application/json;q=0.5,{BIP70} ; q=0.9", True), (f"{BIP70};q=x", False), (f"text/html, {BIP70};q=0.1", True),
        (f"{BIP70}-x", False), (";q=1,,", False),
    ],
)  # fmt: skip
def test_fault_39_qualities_decide(accept: str, special: bool) -> None:
    """The special type is given where it is named, not refused, and not liked less than JSON (RFC 9110 12.5.1)."""
    assert accepts_rather(accept, BIP70, "application/json") is special


def test_a_401_names_its_scheme(system: System) -> None:
    """RFC 9110 15.5.2: a 401 "MUST send a WWW-Authenticate header field"."""
    answer = httpx.get(f"{system.management_url}/totals", trust_env=False, verify=False)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")


# --- health -----------------------------------------------------------------------------------------------------------


@BOTH_PATHS
def test_fault_39_the_public_port_has_a_health_path(system: System, http: httpx.Client) -> None:
    """A proxy learns that payments are accepted, and nothing else."""
    answer = http.get(f"{system.url}/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert http.get(f"{system.url}/health?x=1").status_code == 200


def test_fault_39_the_health_path_says_when_payments_are_refused(tmp_path: Path, http: httpx.Client) -> None:
    """With too little free disk payments are refused: 503 with Retry-After, a code, and no path or limit."""
    with System(tmp_path / "full", sections={"store": "reserve_mb = 100000000"}) as running:
        answer = http.get(f"{running.url}/health")
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_full")
        assert int(answer.headers["Retry-After"]) > 0
        assert not re.search(r"/tmp|[0-9]{3}", answer.text.replace(str(answer.json().get("incident", "")), ""))
