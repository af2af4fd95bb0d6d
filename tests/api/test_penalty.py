"""Connections with bad signatures are delayed and then closed; paying connections are not affected."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from paychan.api.budgets import penalty as manners_module
from paychan.api.budgets.penalty import Penalty
from paychan.protocol.errors import ValueBackwards
from paychan.protocol.payment import encode_v1
from paychan.protocol.wire.payment_frames import MAX_FRAME_PAYMENTS, Said, Taken, write_payments
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.streams import answers, closed, code, open_stream, pay_frame, stream_url
from tests.api.wire import connect as dial
from tests.api.wire import exchange, statuses
from tests.lib.rbpcp import V1, V2, Payer, refusal
from tests.lib.system import System

LIMIT = 3
KEY = "02" + "11" * 32
BODY = V2("", Payer(), httpx.Client(verify=False), Dialect.S).body(Payer().payment(100_000))


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "handlers"])
def strict(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server that accepts few bad signatures on a connection."""
    http = f"max_bad_signatures = {LIMIT}\nfast_lane = {str(request.param).lower()}"
    with System(tmp_path_factory.mktemp("strict"), sections={"http": http}) as running:
        yield running


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """An HTTP client with one new connection."""
    with httpx.Client(trust_env=False, timeout=30, limits=httpx.Limits(max_connections=1), verify=False) as client:
        yield client


def test_threat_26_bad_signatures_end_their_connection(strict: System, http: httpx.Client) -> None:
    """After the limit of bad signatures a payment gets 429 and a code, and its connection is closed."""
    v1 = V1(strict.url, Payer(), http)
    assert v1.open(v1.payer.payment(100_000)).status_code == 201

    for _ in range(LIMIT):
        assert refusal(v1.pay(Payer().payment(100_001))) == (400, "bad_signature")
    ended = v1.pay(v1.payer.payment(100_001))

    assert refusal(ended) == (429, "too_many_bad_signatures")
    assert ended.headers["Connection"] == "close"


def test_another_connection_of_the_same_channel_is_not_affected(strict: System, http: httpx.Client) -> None:
    """Bad signatures count for their connection, so that an attacker can't lock a channel with them."""
    v1 = V1(strict.url, Payer(), http)
    assert v1.open(v1.payer.payment(100_000)).status_code == 201
    with httpx.Client(trust_env=False, verify=False) as attacker:
        bad = V1(strict.url, v1.payer, attacker)
        assert [bad.pay(Payer().payment(100_001)).status_code for _ in range(LIMIT + 1)] == [400] * LIMIT + [429]

    assert [v1.pay(v1.payer.payment(100_001 + paid)).status_code for paid in range(50)] == [200] * 50


def test_both_versions_and_closings_are_counted_together(strict: System, http: httpx.Client) -> None:
    """Bad signatures in openings, payments and closings are one count, on the fast path and at the handlers."""
    v1, v2 = V1(strict.url, Payer(), http), V2(strict.url, Payer(), http)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201

    answers = [
        v1.open(Payer().payment(100_000)),
        v2.pay(Payer().payment(100_001)),
        v2.close(Payer().payment(100_001)),
        v2.pay(v2.payer.payment(100_001)),
    ]

    assert [answer.status_code for answer in answers] == [400, 400, 400, 429]


def test_refusals_of_an_honest_client_close_nothing(strict: System, http: httpx.Client) -> None:
    """A refusal that depends on the channel's state never closes the connection, however often it happens."""
    v1 = V1(strict.url, Payer(), http)
    assert v1.open(v1.payer.payment(100_000)).status_code == 201

    for _ in range(5 * LIMIT):
        assert refusal(v1.pay(v1.payer.payment(99_999))) == (400, "value_backwards")
    assert v1.pay(v1.payer.payment(100_001)).status_code == 200


@pytest.mark.parametrize("paid_sat", [99_999, 100_000], ids=["stale", "repeated"])
def test_fault_69_requests_of_no_value_are_delayed(system: System, paid_sat: int) -> None:
    """16 requests of no value are free, the number in progress on a lost connection; then 100 a second are served."""
    with httpx.Client(trust_env=False, timeout=30, verify=False) as http:
        v1 = V1(system.url, Payer(), http)
        assert v1.open(v1.payer.payment(100_000)).status_code == 201
        path = v1.resource.removeprefix(v1.url)
    request = "PUT {}?payment={} HTTP/1.1\r\nHost: x\r\n\r\n"
    nothing = request.format(path, encode_v1(v1.payer.payment(paid_sat))).encode()
    paid = (
        request.format(path, encode_v1(v1.payer.payment(100_001))).replace("Host", "Connection: close\r\nHost").encode()
    )

    began = time.monotonic()
    received = exchange(system.url, nothing * 216 + paid)

    assert time.monotonic() - began >= 1.5  # 200 at 100 a second, minus the time of judging
    assert statuses(received) == [400 if paid_sat < 100_000 else 200] * 216 + [200]


def test_fault_69_requests_of_no_value_have_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals by state and repeated payments share the rate.

    Payments of value allow more; the longest delay is 1 s.
    """
    now = 1000.0
    monkeypatch.setattr(manners_module, "monotonic", lambda: now)
    penalty = Penalty(3)
    stale = ValueBackwards(got_sat=2, need_sat=1)
    penalty.paid()
    assert [penalty.refused(stale) for _ in range(8)] == [penalty.no_value() for _ in range(8)] == [0] * 8
    assert penalty.refused(stale) == pytest.approx(0.01)
    penalty.paid()
    penalty.paid()
    assert penalty.refused(stale) == 0
    assert [penalty.refused(stale) for _ in range(200)][-1] == 1
    assert penalty.problem() is None
    now += 1.2
    assert [penalty.refused(stale) for _ in range(16)] == [0] * 16


def test_fault_69_bad_signatures_over_a_stream_are_delayed_as_by_put(strict: System, http: httpx.Client) -> None:
    """Of 256 at once the same number is checked as by `PUT`, each with a delay.

    The rest is refused, and the stream ends.
    """
    v2 = V2(strict.url, Payer(), http)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    bad = [Payer().payment(100_001)] * MAX_FRAME_PAYMENTS

    with open_stream(v2) as stream:
        stream.send(write_payments([v2.payer.payment(100_001)]))
        stream.send(write_payments(bad))
        stream.send(write_payments(bad))
        began = time.monotonic()
        assert isinstance(answers(stream, 1)[0], Taken)
        codes = [code(each) for each in answers(stream, MAX_FRAME_PAYMENTS)]
        assert closed(stream) == (4429, "too_many_bad_signatures")

    assert codes[:LIMIT] == [(400, "bad_signature")] * LIMIT
    assert set(codes[LIMIT:]) == {(429, "too_many_bad_signatures")}
    assert time.monotonic() - began >= 0.07  # delays of 10, 20 and 40 ms


@pytest.mark.parametrize("paid_sat", [99_999, 100_000], ids=["stale", "repeated"])
def test_fault_69_payments_of_no_value_over_a_stream_are_delayed(
    strict: System, http: httpx.Client, paid_sat: int
) -> None:
    """256 payments of no value are free, the number in flight on a lost stream; then 100 a second are judged."""
    v2 = V2(strict.url, Payer(), http)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    frame = write_payments([v2.payer.payment(paid_sat)] * MAX_FRAME_PAYMENTS)

    with open_stream(v2) as stream:
        began = time.monotonic()
        for _ in range(4):
            stream.send(frame)
        stream.send(write_payments([v2.payer.payment(100_001)]))
        *nothing, paid = answers(stream, 4 * MAX_FRAME_PAYMENTS + 1)

    assert time.monotonic() - began >= 2.0  # 256 at 100 a second, minus the time of judging
    assert len({code(each) if isinstance(each, Said) else each.value_sat for each in nothing}) == 1
    assert isinstance(paid, Taken)
    assert paid.value_sat == 1


def test_fault_69_a_new_stream_does_not_reset_the_count(strict: System, http: httpx.Client) -> None:
    """All streams of a channel share one count of bad signatures; streams of other channels are not affected."""
    mine, other = V2(strict.url, Payer(), http), V2(strict.url, Payer(), http)
    for client in (mine, other):
        assert client.open(client.payer.payment(100_000)).status_code == 201

    with open_stream(mine) as stream, open_stream(mine) as second:
        assert code(pay_frame(second, [Payer().payment(100_001)])[0]) == (400, "bad_signature")
        stream.send(write_payments([Payer().payment(100_001)] * LIMIT))
        assert closed(stream) == (4429, "too_many_bad_signatures")
    with pytest.raises(InvalidStatus) as refused:
        open_stream(mine)
    with connect(stream_url(mine).partition("?")[0], proxy=None) as stream:
        stream.send(json.dumps({"secret": mine.secret}))
        assert closed(stream) == (4429, "too_many_bad_signatures")

    assert refused.value.response.status_code == 429
    with open_stream(other) as stream:
        assert len(pay_frame(stream, [other.payer.payment(100_001)])) == 1
    with httpx.Client(trust_env=False, verify=False) as fresh:
        mine.http = fresh
        assert mine.pay(mine.payer.payment(100_001)).status_code == 200


CHEAP = {
    "no such resource": ("GET", "/nowhere", b""),
    "unknown channel of v1": ("DELETE", f"/v1/channels/{'0' * 64}/0?payment=AAAA", b""),
    "payment to an unknown channel of v2": ("PUT", f"/v2/channels/{'0' * 64}/0?secret={'0' * 64}", BODY),
    "malformed payment": ("PUT", f"/v1/channels/{'0' * 64}/0?payment=!", b""),
    "missing parameter": ("GET", "/v1/fundingInfo", b""),
    "repeated parameter": ("GET", f"/v1/fundingInfo?client_pubkey={KEY}&exp_time=1&exp_time=1", b""),
    "no JSON": ("PUT", f"/v2/channels/{'0' * 64}/0", b"{"),
    "method": ("DELETE", "/v1/fundingInfo", b""),
    "large body": ("POST", "/v1/channels/new", b"x" * 5000),
    "stream of an unknown channel": ("GET", f"/v2/channels/{'0' * 64}/0/stream?secret={'0' * 64}", b""),
}


@pytest.mark.parametrize("kind", CHEAP)
def test_fault_78_malformed_and_unknown_requests_end_their_connection(
    strict: System, http: httpx.Client, kind: str
) -> None:
    """404s, malformed requests, wrong methods and large bodies count like bad signatures: 429, then the close."""
    method, where, body = CHEAP[kind]
    refused = [http.request(method, strict.url + where, content=body) for _ in range(LIMIT)]
    ended = http.request(method, strict.url + where, content=body)

    assert {answer.status_code for answer in refused} <= {400, 404, 405, 413}
    assert refusal(ended) == (429, "too_many_bad_signatures")
    assert ended.headers["Connection"] == "close"


def test_fault_78_behind_a_proxy_clients_do_not_affect_each_other(tmp_path: Path, http: httpx.Client) -> None:
    """Many clients share a trusted proxy's connection: refused requests of one client do not close it for a payer."""
    with System(tmp_path, sections={"http": f"max_bad_signatures = {LIMIT}\ntrust_forwarded = true"}) as system:
        v1 = V1(system.url, Payer(), http)
        assert v1.open(v1.payer.payment(100_000)).status_code == 201
        for _ in range(LIMIT + 1):
            assert http.get(f"{system.url}/nowhere").status_code == 404
            assert refusal(v1.pay(Payer().payment(100_001))) == (400, "bad_signature")
        assert v1.pay(v1.payer.payment(100_001)).status_code == 200


def test_fault_78_a_delayed_404_costs_no_work(strict: System) -> None:
    """The delay of a 404 costs no processor time: hundreds at once cost less time than they wait."""
    assert strict.server is not None
    process, waiting = strict.server.process.pid, 0.0
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(dial(strict.url)) for _ in range(40)]
        before, begun = _processor_seconds(process), time.monotonic()
        for _ in range(LIMIT):
            for connection in connections:
                connection.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
            for connection in connections:
                assert connection.recv(4096).startswith(b"HTTP/1.1 404 ")
        spent, waiting = _processor_seconds(process) - before, time.monotonic() - begun
    assert spent < 40 * LIMIT * 0.003, f"{spent} s of processor time in {waiting} s"


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
