"""The payer's clients against the real gateway, server and signer, over channels of debug funding."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from paychan.client import Budget, ChannelRecord, Need, Payer, Purse, State, errors, paid_async_client, paid_client
from tests.gateway.shop import PRICE_SAT, Shop, open_shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(tmp_path_factory.mktemp("shop")) as opened:
        yield opened


@pytest.fixture
def purse(tmp_path: Path) -> Purse:
    """An empty wallet that opens a channel if it has none."""
    wallet = tmp_path / "wallet"

    def open_channel(need: Need) -> None:
        with Payer(need.pay_url, wallet=wallet) as payer:
            payer.channel_for(room_sat=need.room_sat)

    return Purse(Budget(total=10_000), wallet, open_channel=open_channel)


def record_of(purse: Purse) -> ChannelRecord:
    return purse.wallet.read(purse.wallet.names()[0])


def paid_sat(purse: Purse) -> int:
    """Return the sum of all payments after the opening."""
    record = record_of(purse)
    return record.paid_sat - record.open_price_sat


class Lossy(httpx.HTTPTransport):
    """Loses the answers to the paid requests that a test names."""

    losses = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if "PAYMENT-SIGNATURE" in request.headers and self.losses:
            self.losses -= 1
            response.close()
            msg = "lost"
            raise httpx.ReadError(msg)
        return response


@pytest.mark.parametrize("prefer", ["x402", "mpp"])
def test_a_first_request_opens_and_pays(shop: Shop, purse: Purse, prefer: str) -> None:
    """A wallet without a channel opens one by `open_channel`, and pays three requests, one of them with a body."""
    purse.prefer = prefer  # type: ignore[assignment]
    with paid_client(purse) as client:
        answers = [client.get(shop.url + f"/v1/tile/{number}?z=3") for number in range(2)]
        answers.append(client.post(shop.url + "/v1/draw", content=b"abc"))

    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[2].json() == {"path": "/v1/draw", "method": "POST", "body": "abc"}
    assert [answer.extensions["paychan"].charged_sat for answer in answers] == [PRICE_SAT] * 3
    assert paid_sat(purse) == purse.log.account().total_sat == 3 * PRICE_SAT


def test_the_same_request_twice_is_two_requests(shop: Shop, purse: Purse) -> None:
    """A repetition after an answer is paid by itself, and the service works again."""
    with paid_client(purse) as client:
        calls = len(shop.upstream.calls)
        for _ in range(2):
            client.get(shop.url + "/v1/now").raise_for_status()

    assert len(shop.upstream.calls) - calls == 2
    assert paid_sat(purse) == 2 * PRICE_SAT


def test_a_lost_answer_is_charged_once(shop: Shop, purse: Purse) -> None:
    """The gateway sends its stored answer, and the service does not work again."""
    lossy = Lossy()
    with paid_client(purse, transport=lossy) as client:
        client.get(shop.url + "/v1/first").raise_for_status()
        calls, lossy.losses = len(shop.upstream.calls), 1
        with pytest.raises(httpx.ReadError):
            client.get(shop.url + "/v1/lost")
        client.get(shop.url + "/v1/other").raise_for_status()
        assert client.get(shop.url + "/v1/lost").json()["path"] == "/v1/lost"

    assert len(shop.upstream.calls) - calls == 2
    assert paid_sat(purse) == purse.log.account().total_sat == 3 * PRICE_SAT


def test_what_was_not_delivered_pays_the_next_request(shop: Shop, purse: Purse) -> None:
    """The service fails, or tells a lower price: the rest is credit, and the next request signs the difference alone."""
    with paid_client(purse) as client:
        assert client.get(shop.url + "/v1/status/503").status_code >= 500
        assert client.get(shop.url + "/v1/good").extensions["paychan"].signed_sat == 0
        told = client.get(shop.url + "/told/price/10")
        assert (told.status_code, told.extensions["paychan"].signed_sat) == (200, 40)
        assert client.get(shop.url + "/v1/cheap").extensions["paychan"].signed_sat == 0

    assert paid_sat(purse) == PRICE_SAT + 40


@pytest.mark.parametrize("prefer", ["x402", "mpp"])
def test_units_of_an_answer_are_paid_before(shop: Shop, purse: Purse, prefer: str) -> None:
    """Ten events of 5 sat fit ten units, and the units that an answer does not use pay the next one."""
    purse.prefer, purse.units = prefer, 10  # type: ignore[assignment]
    with paid_client(purse) as client:
        full = client.get(shop.url + "/events/sse/10")
        assert "data: 9\n" in full.text
        assert full.extensions["paychan"].price_sat == 50
        client.get(shop.url + "/events/sse/4").raise_for_status()
        assert "data: 8\n" in client.get(shop.url + "/events/sse/9").text

    assert paid_sat(purse) <= purse.log.account().total_sat == 150


def test_an_old_copy_catches_up(shop: Shop, purse: Purse) -> None:
    """A wallet that lost its newest payments and its log pays after one correction by the gateway."""
    with paid_client(purse) as client:
        client.get(shop.url + "/v1/0").raise_for_status()
        old = record_of(purse)
        for number in range(2):
            client.get(shop.url + f"/v1/{number}").raise_for_status()
    file = purse.wallet.lock(old.name)
    file.save(old)
    file.release()
    purse.log.path.unlink()
    with paid_client(Purse(Budget(per_request=PRICE_SAT), purse.wallet.directory)) as client:
        assert client.get(shop.url + "/v1/after").status_code == 200

    assert paid_sat(purse) == 4 * PRICE_SAT
    assert purse.log.account().total_sat == PRICE_SAT


def test_payments_and_paid_requests_share_a_channel(shop: Shop, purse: Purse) -> None:
    """A payment to the server itself is credit for requests, and the channel's own methods go on after them."""
    with paid_client(purse) as client:
        client.get(shop.url + "/v1/one").raise_for_status()
        with Payer(wallet=purse.wallet.directory) as payer:
            receipt = payer.channel(record_of(purse).name).pay(2 * PRICE_SAT)
            assert (receipt.paid_sat, receipt.earlier) == (2 * PRICE_SAT, None)
        signed = [client.get(shop.url + f"/v1/{n}").extensions["paychan"].signed_sat for n in range(3)]
        assert signed == [0, 0, PRICE_SAT]
        with Payer(wallet=purse.wallet.directory) as payer:
            assert payer.channel(record_of(purse).name).status().pending_sat == 0


def test_a_closed_channel_is_replaced(shop: Shop, purse: Purse) -> None:
    """An old copy of a closed channel is asked about once; then the program opens another one."""
    with paid_client(purse) as client:
        client.get(shop.url + "/v1/one").raise_for_status()
        before = record_of(purse)
        with Payer(wallet=purse.wallet.directory) as payer:
            payer.channel(before.name).close()
        file = purse.wallet.lock(before.name)
        file.save(before)
        file.release()
        with pytest.raises(errors.StillUnpaid):
            client.get(shop.url + "/v1/two")
        assert purse.wallet.read(before.name).state is not State.OPEN
        assert client.get(shop.url + "/v1/two").status_code == 200

    assert len(purse.wallet.names()) == 2


async def test_tasks_share_a_channel(shop: Shop, purse: Purse) -> None:
    """Twelve requests at once cost twelve prices, and none is refused."""
    async with paid_async_client(purse) as client:
        answers = [await client.get(shop.url + "/v1/first")]
        answers += await asyncio.gather(*(client.get(shop.url + f"/v1/{number}") for number in range(12)))

    assert {answer.status_code for answer in answers} == {200}
    assert paid_sat(purse) == 13 * PRICE_SAT
