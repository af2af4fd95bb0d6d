"""RBPCP §6.3, threats 29 and 30: a caller without the secret learns nothing, not even whether a channel exists."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import httpx
import pytest
import uvloop

from paychan.api.responses import until_404s_leave, when_404s_leave
from paychan.protocol.wire.rbpcp import Dialect, opening_secret
from tests.api.both_paths import BOTH_PATHS
from tests.api.wire import connect
from tests.lib.rbpcp import V1, V2, Payer
from tests.lib.system import System

WRONG = {
    "missing": "",
    "empty": "?secret=",
    "another": "?secret=" + "ab" * 32,
    "all zero": "?secret=" + "00" * 32,
    "short": "?secret=abcd",
    "long": "?secret=" + "ab" * 33,
    "not hex": "?secret=" + "zz" * 32,
    "not UTF-8": "?secret=%ff%fe",
    "twice": "?secret={right}&secret={right}",
    "twice, one wrong": "?secret=" + "ab" * 32 + "&secret={right}",
    "one quote": "?secret=%22{right}",
    "quoted twice": "?secret=%22%22{right}%22%22",
    "with a space": "?secret={right}%20",
    "under another name": "?Secret={right}",
}


def _facts(answer: httpx.Response) -> tuple[object, ...]:
    headers = {name: value for name, value in answer.headers.items() if name != "date"}
    return answer.status_code, answer.reason_phrase, answer.content, headers


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("tail", ["", "/close"])
@BOTH_PATHS
def test_threat_29_30_wrong_secrets_and_unknown_channels_are_one_404(
    open_v2: V2, new_v2: Callable[[Dialect], V2], system: System, kind: str, tail: str
) -> None:
    """With a wrong secret an open channel answers like an unknown one: the same phrase and headers, an empty body."""
    query = WRONG[kind].format(right=open_v2.secret)
    stranger = new_v2(open_v2.dialect)
    stranger.secret = open_v2.secret
    unknown = stranger.http.put(stranger.resource(tail), content=stranger.body(stranger.payer.payment(120_000)))
    body = open_v2.body(open_v2.payer.payment(120_000))
    refused = open_v2.http.put(open_v2.resource(tail).partition("?")[0] + query, content=body)
    assert (refused.status_code, refused.content) == (404, b"")
    assert _facts(refused) == _facts(unknown)
    assert system.channel(open_v2.payer.outpoint)["value_received"] == 100_000


@pytest.mark.parametrize("kind", WRONG)
def test_threat_29_opening_needs_the_secret_of_this_very_payment(v2: V2, system: System, kind: str) -> None:
    """Defect D10: a wrong or missing secret is 404 with an empty body, which does not reveal the secret."""
    first = v2.payer.payment(100_000)
    query = WRONG[kind].format(right=opening_secret(first).hex())
    refused = v2.http.post(v2.resource().partition("?")[0] + query, content=v2.opening_body(first))
    assert (refused.status_code, refused.content) == (404, b"")
    assert "funding_value" not in system.channel(v2.payer.outpoint)


@BOTH_PATHS
def test_threat_29_the_secret_is_checked_before_the_body(open_v2: V2) -> None:
    """Without the secret, a body that contradicts the channel gets the same 404."""
    open_v2.secret = "ab" * 32
    for facts in ({"funding_txid": "11" * 32, "funding_vout": 1}, {"redeem_script": "00"}, {"change_address": "x"}):
        answer = open_v2.pay(open_v2.payer.payment(120_000), **facts)
        assert (answer.status_code, answer.content) == (404, b"")


@BOTH_PATHS
def test_threat_29_a_closed_channel_hides_behind_its_secret_too(open_v2: V2) -> None:
    """Only a caller with the secret gets 410."""
    assert open_v2.close(open_v2.payer.payment(120_000)).status_code == 200
    open_v2.secret = "ab" * 32
    assert open_v2.pay(open_v2.payer.payment(130_000)).status_code == 404
    assert open_v2.close(open_v2.payer.payment(130_000)).status_code == 404


FIXED_SECONDS = 0.005
"""The time between reading a request and sending its 404."""

TOLERANCE_SECONDS = 0.00015
"""The server answers from memory for a channel that is awake, and reads the store twice in a thread for an unknown one.
Before the fixed time, some of the four lower deciles differed by 0.13 to 0.5 ms. The server sends answers at whole
milliseconds of its clock, so the deciles of 200 answers vary by 0.06 ms. Another test checks that work does not change
the time."""


def _late_body(content: bytes) -> Iterator[bytes]:
    """A body that arrives long after the head; it must not use up the fixed time."""
    time.sleep(0.008)
    yield content


def _seconds_alone(url: str, content: bytes) -> float:
    """Measure the time of an answer on a new connection, without the time to connect."""
    with connect(url) as connection:
        began = time.perf_counter()
        connection.sendall(content)
        assert connection.recv(65536).startswith(b"HTTP/1.1 404 ")
        return time.perf_counter() - began


def _seconds(send: Callable[[], httpx.Response]) -> float:
    began = time.perf_counter()
    assert send().status_code == 404
    return time.perf_counter() - began


@pytest.mark.timeout(300)
def test_threat_30_the_time_of_a_404_does_not_reveal_a_channel(system: System, http: httpx.Client) -> None:
    """200 interleaved requests with a wrong secret and for an unknown channel take the same time.

    Noise only adds time, so the test compares the lower deciles; on a busy machine it tries fifteen times.
    """
    known, unknown = (V2(system.url, Payer(), http) for _ in range(2))
    assert known.open(known.payer.payment(100_000)).status_code == 201
    known.secret = unknown.secret = "ab" * 32
    body = known.body(known.payer.payment(120_000))

    puts = [
        f"PUT {v2.resource().removeprefix(v2.url)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
        for v2 in (known, unknown)
    ]

    def difference() -> float:
        pairs = [[_seconds_alone(system.url, put) for put in puts] for _ in range(200)]
        assert min(map(min, pairs)) > FIXED_SECONDS
        of_known, of_unknown = (statistics.quantiles(sample, n=10)[:4] for sample in zip(*pairs, strict=True))
        return max(abs(known - unknown) for known, unknown in zip(of_known, of_unknown, strict=True))

    assert any(difference() < TOLERANCE_SECONDS for _ in range(15))


def test_fault_83_the_moment_of_a_404_does_not_depend_on_work_in_its_turn() -> None:
    """A 404 leaves a whole number of 5 ms after its request was read: the shortest number that the lookup leaves."""

    async def moments() -> None:
        loop = asyncio.get_running_loop()
        for busy_seconds in (0.0, 0.0021, 0.004, 0.02):
            await asyncio.sleep(0.001)
            begun = loop.time()
            _work(busy_seconds)  # a lookup without a cache hit
            least = 1 + (loop.time() - begun) // 0.005
            steps = (when_404s_leave(begun) - begun) / 0.005
            most = 1 + (loop.time() - begun) // 0.005
            assert steps == pytest.approx(round(steps))
            assert least <= round(steps) <= most
        leaves = when_404s_leave(begun)
        await until_404s_leave(begun)
        assert loop.time() > leaves - 0.0015  # timers count whole milliseconds; a busy machine may only delay them

    uvloop.run(moments())


def test_fault_82_a_client_that_leaves_in_the_turn_of_its_404_is_no_error() -> None:
    """A client that disconnects cancels its delayed 404, also in the same turn in which the timer fires."""

    async def errors() -> list[dict[str, object]]:
        loop, seen = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda _, context: seen.append(context))
        waiting = asyncio.create_task(until_404s_leave(loop.time()))
        loop.call_later(0.001, waiting.cancel)
        await asyncio.sleep(0)
        _work(0.02)  # now both timers have expired
        await asyncio.wait([waiting])
        await asyncio.sleep(0.01)
        return seen

    assert uvloop.run(errors()) == []


def _work(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@BOTH_PATHS
def test_threat_30_a_404_of_v1_leaves_at_the_fixed_moment_too(open_v2: V2) -> None:
    """A request under /v1 does not reveal a v2 channel either."""
    stranger = V1(open_v2.url, Payer(), open_v2.http)
    hidden = V1(open_v2.url, open_v2.payer, open_v2.http)
    for _ in range(20):
        for v1 in (hidden, stranger):
            assert _seconds(partial(v1.pay, v1.payer.payment(120_000))) > FIXED_SECONDS


@BOTH_PATHS
def test_threat_30_a_late_body_does_not_use_up_the_time_of_a_404(system: System, http: httpx.Client) -> None:
    """The time counts from the complete request: a slow body does not reveal the time of the lookup."""
    known = V2(system.url, Payer(), http)
    assert known.open(known.payer.payment(100_000)).status_code == 201
    known.secret = "ab" * 32
    body = known.body(known.payer.payment(120_000))
    for _ in range(20):
        assert _seconds(partial(http.put, known.resource(), content=_late_body(body))) > 0.008 + FIXED_SECONDS
