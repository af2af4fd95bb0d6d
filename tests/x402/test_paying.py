"""The unmodified x402 SDK as a payer's client, with the plug-in, against a seller that verifies by the core."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from paychan.client import errors
from paychan.client.paying.account import Unpaid
from paychan.client.paying.budget import Budget
from paychan.client.paying.exchange import Purse
from paychan.protocol.payment import Payment
from paychan.protocol.types import Sat
from tests.client.paying.seller import Lie, Seller


def purse_of(wallet: Path, budget: Budget | None = None, **settings: Any) -> Purse:
    return Purse(budget or Budget(total=1000), wallet, **settings)


def client_of(purse: Purse, *, max_sat: int = 100, **settings: Any) -> httpx.AsyncClient:
    from x402 import x402Client
    from x402.http.clients.httpx import x402AsyncTransport

    from paychan.x402 import pay_with

    paying = pay_with(x402Client(), purse, max_sat=max_sat, **settings)
    return httpx.AsyncClient(transport=x402AsyncTransport(paying))


async def test_the_first_and_the_second_request_are_paid_over_one_channel(seller: Seller, wallet: Path) -> None:
    """The SDK pays; the wallet's mark moves with each success, and its log counts the price for the host."""
    purse = purse_of(wallet)
    async with client_of(purse) as client:
        answers = [await client.get(seller.url + "tile") for _ in range(3)]

    assert [(answer.status_code, answer.content) for answer in answers] == [(200, b"goods")] * 3
    assert (seller.signed_sat, seller.channel.credit_sat) == (75, 0)
    account = purse.log.account()
    assert (account.by_host, account.open) == ({seller.host: 75}, {})
    record = purse.wallet.read_all()[0][0]
    assert (record.left_sat, record.agreed_sat) == (989_925, 989_925)


def test_the_adapter_for_requests_pays(seller: Seller, wallet: Path) -> None:
    """The SDK's blocking client pays by the same scheme."""
    import requests
    from x402 import x402ClientSync
    from x402.http.clients.requests import x402_requests

    from paychan.x402 import pay_with

    purse = purse_of(wallet)
    with x402_requests(pay_with(x402ClientSync(), purse, max_sat=100)) as session:
        answers = [session.get(seller.url + "tile") for _ in range(2)]
    assert [answer.content for answer in answers] == [b"goods"] * 2
    assert purse.log.account().by_host == {seller.host: 50}
    assert isinstance(answers[0], requests.Response)


async def test_twenty_requests_at_once_pay_twenty_prices(seller: Seller, wallet: Path) -> None:
    """Requests over one channel wait for each other: none is refused, none pays twice."""
    async with client_of(purse_of(wallet)) as client:
        answers = await asyncio.gather(*(client.get(f"{seller.url}{number}") for number in range(20)))
    assert [answer.status_code for answer in answers] == [200] * 20
    assert (seller.signed_sat, len(seller.paid), seller.channel.credit_sat) == (500, 20, 0)


async def test_a_payer_that_is_behind_adopts_the_proven_state_and_tries_once_more(seller: Seller, wallet: Path) -> None:
    """Another copy of the wallet has paid: the corrective 402 shows its payment, which this wallet's key has signed."""
    purse = purse_of(wallet)
    behind = (wallet / "spending.log", *wallet.glob("*.json"))  # noqa: ASYNC240
    before = {path: path.read_bytes() for path in behind if path.exists()}
    async with client_of(purse) as client:
        await client.get(seller.url + "a")
        await client.get(seller.url + "b")
    for path in behind:
        path.write_bytes(before[path]) if path in before else path.unlink(missing_ok=True)

    asked = len(seller.seen)
    async with client_of(purse_of(wallet)) as client:
        answer = await client.get(seller.url + "c")
    assert (answer.status_code, len(seller.seen) - asked) == (200, 3)
    assert (seller.signed_sat, seller.channel.credit_sat) == (75, 0)


async def test_a_false_proof_stops_the_payer(seller: Seller, wallet: Path) -> None:
    """A newest payment that this wallet did not sign is no correction: the error says so, and nothing more is signed."""
    from x402.http.clients.httpx import PaymentError

    true = seller.channel.payment
    forged = Payment(Sat(true.change_sat - 25), true.signature, true.flag)
    seller.lies.append(Lie(state=seller.state(forged)))
    async with client_of(purse_of(wallet)) as client:
        with pytest.raises(PaymentError) as caught:
            await client.get(seller.url)
    assert isinstance(caught.value.__cause__, errors.FalseProof)
    assert seller.signed_sat == 0


async def test_a_402_loop_does_not_raise_the_signed_sum(seller: Seller, wallet: Path) -> None:
    """A server that books each payment and answers 402 again and again gets one price for one request."""
    purse = purse_of(wallet)
    seller.lies.extend([Lie(refuse=True)] * 5)
    async with client_of(purse) as client:
        statuses = [(await client.get(seller.url)).status_code for _ in range(6)]
    assert statuses == [402] * 5 + [200]
    assert seller.signed_sat == 25
    assert purse.log.account().total_sat == 25
    assert len([line for line in purse.log.lines() if isinstance(line, Unpaid)]) == 5


async def test_a_lost_answer_is_asked_for_with_the_same_payment(seller: Seller, wallet: Path) -> None:
    """The connection ends after the booking: the repeated request, in another task too, costs nothing more."""
    from x402.http.clients.httpx import PaymentError

    seller.lies.append(Lie(drop="after"))
    async with client_of(purse_of(wallet)) as client:
        with pytest.raises(PaymentError):
            await asyncio.create_task(client.get(seller.url + "x"))
        assert (await client.get(seller.url + "x")).status_code == 200
    assert seller.signed_sat == 25


async def test_the_lease_unlocks_the_channel_of_a_task_that_goes_on(seller: Seller, wallet: Path) -> None:
    """A task that lost an answer and does not end holds the channel for the lease alone; then other tasks pay."""
    from x402.http.clients.httpx import PaymentError

    seller.lies.append(Lie(drop="after"))
    lost, go_on = asyncio.Event(), asyncio.Event()
    async with client_of(purse_of(wallet, time_limit_seconds=20), lease_seconds=0.2) as client:

        async def lose() -> None:
            with pytest.raises(PaymentError):
                await client.get(seller.url + "x")
            lost.set()
            await go_on.wait()

        task = asyncio.create_task(lose())
        await lost.wait()
        assert (await client.get(seller.url + "y")).status_code == 200
        assert not task.done()
        go_on.set()
        await task
    assert seller.signed_sat == 50


async def test_without_our_controls_the_sdk_refuses_the_asset(seller: Seller, wallet: Path) -> None:
    """The SDK names the missing setting to a client that registers the scheme alone."""
    from x402 import x402Client
    from x402.http.clients.httpx import PaymentError, x402AsyncTransport

    from paychan.x402 import ChannelScheme

    client = x402Client()
    client.register("bip122:*", ChannelScheme(purse_of(wallet)))
    async with httpx.AsyncClient(transport=x402AsyncTransport(client)) as http:
        with pytest.raises(PaymentError, match=r"rejected by spend_controls: only default assets"):
            await http.get(seller.url)
    assert seller.signed_sat == 0


async def test_the_cap_is_in_satoshi(seller: Seller, wallet: Path) -> None:
    """A price above the cap is refused by the SDK, before the wallet is asked."""
    from x402.http.clients.httpx import PaymentError

    async with client_of(purse_of(wallet), max_sat=24) as client:
        with pytest.raises(PaymentError, match="max_amount_per_payment"):
            await client.get(seller.url)
    async with client_of(purse_of(wallet), max_sat=25) as client:
        assert (await client.get(seller.url)).status_code == 200


async def test_the_wallets_budget_counts_too(seller: Seller, wallet: Path) -> None:
    """The budget declines what the SDK's cap allows; its hosts are those of the request, not of the offer."""
    from x402 import x402Client
    from x402.http.clients.httpx import PaymentError, x402AsyncTransport

    from paychan.x402 import pay_with

    for budget, kind in (
        (Budget(total=24), errors.OverBudget),
        (Budget(total=100, hosts=["elsewhere.example"]), errors.HostNotAllowed),
    ):
        async with client_of(purse_of(wallet, budget)) as client:
            with pytest.raises(PaymentError) as caught:
                await client.get(seller.url)
        assert isinstance(caught.value.__cause__, kind)
    assert seller.signed_sat == 0
    known = purse_of(wallet, Budget(total=100, hosts=[seller.host]))
    bare = x402Client()
    pay_with(bare, known, max_sat=100)
    async with httpx.AsyncClient(transport=x402AsyncTransport(bare)) as client:
        with pytest.raises(PaymentError, match="unknown:0"):
            await client.get(seller.url)
    async with client_of(known) as client:
        assert (await client.get(seller.url)).status_code == 200


async def test_a_foreign_offer_is_skipped(seller: Seller, wallet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offer of the same scheme and network by another binding is passed over, wherever it stands in the list."""
    from msgspec.structs import replace
    from x402 import x402Client
    from x402.http.clients.httpx import PaymentError, x402AsyncTransport

    from paychan.protocol.wire import x402
    from paychan.x402 import ChannelScheme, own_binding

    true = x402.payment_required

    def with_foreign(*args: Any, **more: Any) -> Any:
        required = true(*args, **more)
        own = required.accepts[0]
        foreign = replace(own, amount="1", extra={"assetTransferMethod": "gobtc-rails-preauthorized-psbt"})
        return replace(required, accepts=[foreign, own])

    monkeypatch.setattr(x402, "payment_required", with_foreign)
    async with client_of(purse_of(wallet)) as client:
        assert (await client.get(seller.url)).status_code == 200
    assert seller.signed_sat == 25

    client = x402Client().register("bip122:*", ChannelScheme(purse_of(wallet))).set_spend_controls(False)
    async with httpx.AsyncClient(transport=x402AsyncTransport(client)) as http:
        with pytest.raises(PaymentError, match="bitcoin-channel-v1"):
            await http.get(seller.url)
    client.register_policy(own_binding)
    async with httpx.AsyncClient(transport=x402AsyncTransport(client)) as http:
        assert (await http.get(seller.url)).status_code == 200
