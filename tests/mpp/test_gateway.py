"""Unmodified pympp pays the real gateway, whose 402 has offers of x402 and of MPP at once."""

from __future__ import annotations

import asyncio

import httpx

from paychan.client import Budget, Purse
from tests.gateway.shop import PRICE_SAT, Shop


def paid_sat(purse: Purse) -> int:
    record = purse.wallet.read(purse.wallet.names()[0])
    return record.paid_sat - record.open_price_sat


async def test_the_sdk_opens_pays_and_repeats(gateway: Shop, purse: Purse) -> None:
    """The first request opens a channel; the same request twice is two requests, and a body is sent again."""
    from paychan.mpp import pay_with

    calls = len(gateway.upstream.calls)
    async with httpx.AsyncClient(transport=pay_with(purse)) as client:
        answers = [await client.get(gateway.url + "/v1/now") for _ in range(2)]
        answers.append(await client.post(gateway.url + "/v1/draw", content=b"abc"))

    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[2].json() == {"path": "/v1/draw", "method": "POST", "body": "abc"}
    assert [answer.extensions["paychan"].charged_sat for answer in answers] == [PRICE_SAT] * 3
    assert len(gateway.upstream.calls) - calls == 3
    assert paid_sat(purse) == purse.log.account().total_sat == 3 * PRICE_SAT
    assert "authorization" not in gateway.seen()


async def test_what_was_not_delivered_pays_the_next_request(gateway: Shop, purse: Purse) -> None:
    """The upstream fails: the SDK sees the 5xx, the wallet its receipt, and the price is credit."""
    from paychan.mpp import pay_with

    async with httpx.AsyncClient(transport=pay_with(purse)) as client:
        assert (await client.get(gateway.url + "/v1/status/503")).status_code >= 500
        assert (await client.get(gateway.url + "/v1/good")).extensions["paychan"].signed_sat == 0
    assert paid_sat(purse) == PRICE_SAT


async def test_a_body_priced_by_the_upstream_costs_what_it_says(gateway: Shop, purse: Purse) -> None:
    """The ceiling is signed; the rest pays the next request."""
    from paychan.mpp import pay_with

    async with httpx.AsyncClient(transport=pay_with(purse)) as client:
        told = (await client.get(gateway.url + "/told/price/10")).extensions["paychan"]
        assert (told.charged_sat, told.signed_sat) == (10, 40)
        assert (await client.get(gateway.url + "/v1/cheap")).extensions["paychan"].signed_sat == 0


async def test_an_old_copy_catches_up(gateway: Shop, purse: Purse) -> None:
    """A wallet that lost its newest payments and its log pays after one correction by the gateway."""
    from paychan.mpp import pay_with

    async with httpx.AsyncClient(transport=pay_with(purse)) as client:
        await client.get(gateway.url + "/v1/0")
        old = purse.wallet.read(purse.wallet.names()[0])
        for number in range(2):
            await client.get(gateway.url + f"/v1/{number}")
    file = purse.wallet.lock(old.name)
    file.save(old)
    file.release()
    purse.log.path.unlink()
    async with httpx.AsyncClient(transport=pay_with(Purse(Budget(per_request=25), purse.wallet.directory))) as client:
        assert (await client.get(gateway.url + "/v1/after")).status_code == 200
    assert paid_sat(purse) == 4 * PRICE_SAT


async def test_tasks_share_a_channel(gateway: Shop, purse: Purse) -> None:
    """Eight requests at once cost eight prices, and none is refused."""
    from paychan.mpp import pay_with

    async with httpx.AsyncClient(transport=pay_with(purse)) as client:
        answers = [await client.get(gateway.url + "/v1/first")]
        answers += await asyncio.gather(*(client.get(gateway.url + f"/v1/{number}") for number in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert paid_sat(purse) == 9 * PRICE_SAT
