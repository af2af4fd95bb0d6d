"""Answers that are paid while they are read: each client library against the real gateway, over a channel of debug funding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paychan.client import Budget, Payer, Purse, errors, paid_async_client, paid_client
from paychan.client.paying.errors import BodyUnpaid
from paychan.client.paying.exchange import Need as ChannelNeed
from paychan.client.paying.metering import EventFilter, Need
from tests.gateway.shop import Shop, open_shop

EVENT_SAT, KILOBYTE_SAT = 5, 3

Get: TypeAlias = Callable[[Purse, str], bytes]


def by_httpx(purse: Purse, url: str) -> bytes:
    with paid_client(purse) as client, client.stream("GET", url) as answer:
        return b"".join(answer.iter_raw())


def by_httpx_async(purse: Purse, url: str) -> bytes:
    async def get() -> bytes:
        async with paid_async_client(purse) as client:
            return (await client.get(url)).content

    return asyncio.run(get())


def by_requests(purse: Purse, url: str) -> bytes:
    import requests

    from paychan.client.paying.requests import PaidAdapter

    with requests.Session() as session:
        session.mount("http://", PaidAdapter(purse))
        return session.get(url).content


def by_aiohttp(purse: Purse, url: str) -> bytes:
    import aiohttp

    from paychan.client.paying.aiohttp import PaidMiddleware

    async def get() -> bytes:
        try:
            async with (
                aiohttp.ClientSession(middlewares=[PaidMiddleware(purse)]) as session,
                session.get(url) as answer,
            ):
                return await answer.read()
        finally:
            await asyncio.sleep(0.05)  # the loop closes the connection of an answer that ended early

    return asyncio.run(get())


LIBRARIES = pytest.mark.parametrize("get", [by_httpx, by_httpx_async, by_requests, by_aiohttp])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(tmp_path_factory.mktemp("shop")) as opened:
        yield opened


@pytest.fixture
def purse(tmp_path: Path) -> Purse:
    """An empty wallet that opens a channel if it has none."""
    wallet = tmp_path / "wallet"

    def open_channel(need: ChannelNeed) -> None:
        with Payer(need.pay_url, wallet=wallet) as payer:
            payer.channel_for(room_sat=need.room_sat)

    return Purse(Budget(total=10_000), wallet, open_channel=open_channel)


def paid_sat(purse: Purse) -> int:
    """Return the sum of all payments after the opening."""
    record = purse.wallet.read(purse.wallet.names()[0])
    return record.paid_sat - record.open_price_sat


def events(count: int) -> bytes:
    return b"".join(b"data: %d\n\n" % number for number in range(count))


@LIBRARIES
@pytest.mark.parametrize("prefer", ["x402", "mpp"])
def test_an_event_stream_is_paid_while_it_is_read(shop: Shop, purse: Purse, get: Get, prefer: str) -> None:
    """The program reads all events and none about the payment; each step is counted, and no event is paid twice."""
    purse.units, purse.prefer = 3, prefer  # type: ignore[assignment]

    assert get(purse, shop.url + "/patient/sse/8") == events(8)
    assert paid_sat(purse) == purse.log.account().total_sat == 9 * EVENT_SAT
    assert get(purse, shop.url + "/patient/sse/1") == events(1)
    assert paid_sat(purse) == 3 * 3 * EVENT_SAT + 2 * EVENT_SAT


@LIBRARIES
def test_a_body_is_paid_ahead_by_its_size(shop: Shop, purse: Purse, get: Get) -> None:
    """A million bytes by the kilobyte, 300 at a time: the client knows where the server waits."""
    purse.units = 300

    assert len(get(purse, shop.url + "/kilobytes/big/1")) == 1_000_000
    assert paid_sat(purse) == 4 * 300 * KILOBYTE_SAT


def test_bytes_and_lines_are_counted(shop: Shop, purse: Purse) -> None:
    """A text by the byte, and lines of a route by the event."""
    purse.units = 4

    assert by_httpx(purse, shop.url + "/bytes/lines/5") == b"0\n1\n2\n3\n4\n"
    assert paid_sat(purse) == 12
    assert by_requests(purse, shop.url + "/patient/lines/5") == b"0\n1\n2\n3\n4\n"


@pytest.mark.parametrize("get", [by_httpx, by_aiohttp])
def test_seconds_are_paid_while_a_read_waits(shop: Shop, purse: Purse, get: Get) -> None:
    """An answer of more than two seconds is read whole, although the first payment was for one."""
    assert get(purse, shop.url + "/seconds/drip/5") == b"xxxxx"
    assert 3 * 2 <= paid_sat(purse) <= 6 * 2


@LIBRARIES
def test_the_budget_ends_the_body(shop: Shop, purse: Purse, get: Get) -> None:
    """The error says what was paid and delivered; nothing beyond the budget was signed."""
    purse.units, purse.budget = 2, Budget(per_request=4 * EVENT_SAT)

    with pytest.raises(BodyUnpaid) as caught:
        get(purse, shop.url + "/patient/sse/50")

    fields = caught.value.fields
    assert (fields["delivered"], fields["paid_sat"], fields["cause"]) == (4, 4 * EVENT_SAT, "over_budget")
    assert paid_sat(purse) == purse.log.account().total_sat == 4 * EVENT_SAT


def test_what_was_read_before_the_budget_ended_is_the_programs(shop: Shop, purse: Purse) -> None:
    """The events that were paid come before the error."""
    purse.budget = Budget(per_request=2 * EVENT_SAT)
    with paid_client(purse) as client, client.stream("GET", shop.url + "/patient/sse/9") as answer:
        got = answer.iter_raw()
        assert next(got) + next(got) == events(2)
        with pytest.raises(BodyUnpaid):
            next(got)
        assert answer.extensions["paychan"].price_sat == 2 * EVENT_SAT


def test_approve_sees_the_sum_of_the_answer(shop: Shop, purse: Purse) -> None:
    """A human is asked for each step, with the sum so far and the step."""
    asked: list[int] = []
    purse.budget = Budget(total=1000, approve=lambda question: asked.append(question.price_sat) or len(asked) < 3)

    with pytest.raises(BodyUnpaid) as caught:
        by_httpx(purse, shop.url + "/patient/sse/9")

    assert asked == [5, 10, 15]
    assert caught.value.fields["cause"] == errors.NotApproved.code
    assert paid_sat(purse) == 10


class Losing(httpx.HTTPTransport):
    """Loses the answer to the first payment that goes by a second request."""

    losses = 1

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.method == "HEAD" and self.losses:
            self.losses -= 1
            response.close()
            msg = "lost"
            raise httpx.ReadError(msg)
        return response


def test_a_step_whose_answer_was_lost_is_paid_once(shop: Shop, purse: Purse) -> None:
    """The same payment is sent again."""
    purse.units = 4
    with paid_client(purse, transport=Losing()) as client:
        assert client.get(shop.url + "/patient/sse/8").content == events(8)

    assert paid_sat(purse) == purse.log.account().total_sat == 8 * EVENT_SAT


async def test_streams_share_a_channel(shop: Shop, purse: Purse) -> None:
    """Six streams at once are read whole, and cost what they are worth or the rest of a step."""
    purse.units = 3
    async with paid_async_client(purse) as client:
        await client.get(shop.url + "/v1/open")
        answers = await asyncio.gather(*(client.get(shop.url + f"/patient/sse/7?{number}") for number in range(6)))

    assert [answer.content for answer in answers] == [events(7)] * 6
    assert 25 + 6 * 7 * EVENT_SAT <= paid_sat(purse) <= purse.log.account().total_sat


class Begging(httpx.HTTPTransport):
    """Replaces a paid body by requests for payments."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.method == "HEAD" or response.status_code != 200:
            return response
        response.close()
        begging = b"event: payment-need-voucher\ndata: {}\n\n" * 50
        return httpx.Response(200, headers=response.headers, stream=httpx.ByteStream(begging))


def test_a_server_that_only_asks_gets_three_steps(shop: Shop, purse: Purse) -> None:
    """Payments without a unit between them end the answer."""
    with paid_client(purse, transport=Begging()) as client, pytest.raises(BodyUnpaid) as caught:
        client.get(shop.url + "/patient/sse/3")

    assert (caught.value.fields["cause"], caught.value.fields["delivered"]) == ("nothing_delivered", 0)
    assert paid_sat(purse) == 4 * EVENT_SAT


# --- the events of a stream -------------------------------------------------------------------------------------------

NEED = b"event: payment-need-voucher\ndata: {}\n\n"


@given(
    st.lists(st.sampled_from([b"data: a\n\n", b"id: 1\r\ndata: b\r\n\r\n", b": comment\r\r", NEED]), max_size=8),
    st.binary(max_size=3).filter(lambda rest: b"\n" not in rest and b"\r" not in rest),
    st.lists(st.integers(0, 300), max_size=6),
)
def test_events_pass_whole_however_they_are_cut(found: list[bytes], rest: bytes, cuts: list[int]) -> None:
    """The seller's bytes are unchanged and in order, and each request for a payment is found once."""
    raw, events, got = b"".join(found) + rest, EventFilter(), list[object]()
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    for start, end in pairwise(edges):
        got += events.feed(raw[start:end])

    assert b"".join(each for each in got if isinstance(each, bytes)) + events.rest() == raw.replace(NEED, b"")
    assert sum(isinstance(each, Need) for each in got) == found.count(NEED)
    assert events.events == len(found) - found.count(NEED)
