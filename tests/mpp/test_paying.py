"""Unmodified pympp as a payer's client, with the plug-in, against a seller that verifies by the core."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from paychan.client import errors
from paychan.client.paying.account import Unpaid
from paychan.client.paying.budget import Budget
from paychan.client.paying.exchange import Bill, Purse
from paychan.client.record import State
from paychan.protocol.payment import Payment
from paychan.protocol.types import Sat
from tests.client.paying.seller import Lie, Seller


def purse_of(wallet: Path, budget: Budget | None = None, **settings: Any) -> Purse:
    return Purse(budget or Budget(total=1000), wallet, **settings)


def client_of(purse: Purse, **settings: Any) -> httpx.AsyncClient:
    from paychan.mpp import pay_with

    return httpx.AsyncClient(transport=pay_with(purse, **settings))


async def test_requests_are_paid_over_one_channel(seller: Seller, wallet: Path) -> None:
    """The SDK pays; the wallet's mark moves with each receipt, and its log counts the price for the host."""
    purse = purse_of(wallet)
    async with client_of(purse) as client:
        answers = [await client.get(seller.url + "tile") for _ in range(3)]

    assert [(answer.status_code, answer.content) for answer in answers] == [(200, b"goods")] * 3
    bills = [answer.extensions["paychan"] for answer in answers]
    assert [(type(bill), bill.charged_sat, bill.signed_sat) for bill in bills] == [(Bill, 25, 25)] * 3
    assert (seller.signed_sat, seller.channel.credit_sat) == (75, 0)
    account = purse.log.account()
    assert (account.by_host, account.open) == ({seller.host: 75}, {})
    record = purse.wallet.read_all()[0][0]
    assert (record.left_sat, record.agreed_sat) == (989_925, 989_925)


async def test_the_mark_moves_on_a_receipt_alone(seller: Seller, wallet: Path) -> None:
    """Before the event `payment.response` the payment is signed and not acknowledged; after it, it is."""
    from paychan.mpp import pay_with

    purse, seen = purse_of(wallet), []
    transport = pay_with(purse)
    transport.on_credential_created(lambda _: seen.append(purse.wallet.read_all()[0][0]))
    async with httpx.AsyncClient(transport=transport) as client:
        await client.get(seller.url)
    assert [(record.left_sat, record.agreed_sat) for record in seen] == [(989_975, 990_000)]
    assert purse.wallet.read_all()[0][0].agreed_sat == 989_975


async def test_the_sdks_own_client_pays_a_post(seller: Seller, wallet: Path) -> None:
    """`Mpp` of the SDK pays by the same method; the key of the request is gone from it afterwards."""
    from mpp.client import Mpp

    from paychan.mpp import ChannelPayments

    payments = ChannelPayments(purse_of(wallet))
    async with payments.watch(Mpp([payments.method])) as mpp:
        answer = await mpp.fetch(seller.url, method="POST", content=b"abc")
    assert (answer.status_code, seller.bodies) == (200, [b"abc", b"abc"])
    assert ["idempotency-key" in headers for headers in seller.seen] == [False, True]
    assert "Idempotency-Key" not in answer.request.headers


async def test_twenty_requests_at_once_pay_twenty_prices(seller: Seller, wallet: Path) -> None:
    """Requests over one channel wait for each other: none is refused, none pays twice."""
    async with client_of(purse_of(wallet)) as client:
        answers = await asyncio.gather(*(client.get(f"{seller.url}{number}") for number in range(20)))
    assert [answer.status_code for answer in answers] == [200] * 20
    assert (seller.signed_sat, len(seller.paid), seller.channel.credit_sat) == (500, 20, 0)


async def test_a_payer_that_is_behind_adopts_the_proven_state_and_tries_once_more(seller: Seller, wallet: Path) -> None:
    """Another copy of the wallet has paid: the corrective challenge shows its payment, signed by this wallet's key."""
    purse = purse_of(wallet)
    behind = (wallet / "spending.log", *wallet.glob("*.json"))  # noqa: ASYNC240 - nothing else runs on the loop
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
    true = seller.channel.payment
    forged = Payment(Sat(true.change_sat - 25), true.signature, true.flag)
    seller.lies.append(Lie(state=seller.state(forged)))
    async with client_of(purse_of(wallet)) as client:
        with pytest.raises(errors.FalseProof):
            await client.get(seller.url)
    assert seller.signed_sat == 0


async def test_a_402_loop_does_not_raise_the_signed_sum(seller: Seller, wallet: Path) -> None:
    """A server that books each payment and answers 402 again and again gets one price for one request."""
    purse = purse_of(wallet)
    seller.lies.extend([Lie(refuse=True)] * 5)
    async with client_of(purse) as client:
        for _ in range(5):
            with pytest.raises(errors.StillUnpaid):
                await client.get(seller.url)
        assert (await client.get(seller.url)).status_code == 200
    assert seller.signed_sat == 25
    assert purse.log.account().total_sat == 25
    assert len([line for line in purse.log.lines() if isinstance(line, Unpaid)]) == 5


async def test_a_lost_answer_is_asked_for_with_the_same_payment(seller: Seller, wallet: Path) -> None:
    """The connection ends after the booking: the repeated request, in another task too, costs nothing more."""
    from mpp.errors import PaymentOutcomeUnknownError

    seller.lies.append(Lie(drop="after"))
    async with client_of(purse_of(wallet)) as client:
        with pytest.raises(PaymentOutcomeUnknownError):
            await asyncio.create_task(client.get(seller.url + "x"))
        assert (await client.get(seller.url + "x")).status_code == 200
    assert seller.signed_sat == 25


async def test_an_upstream_that_fails_leaves_credit(seller: Seller, wallet: Path) -> None:
    """A 502 with a receipt gives the price back: the next request signs nothing more."""
    seller.lies.append(Lie(release=True))
    async with client_of(purse_of(wallet)) as client:
        assert (await client.get(seller.url + "x")).status_code == 502
        answer = await client.get(seller.url + "y")
    assert (answer.status_code, answer.extensions["paychan"].signed_sat) == (200, 0)
    assert seller.signed_sat == 25


async def test_an_answer_without_an_event_unlocks_the_channel(seller: Seller, wallet: Path) -> None:
    """The SDK reports no 404: the task's next request unlocks the channel; the first payment stays open in the log."""
    purse = purse_of(wallet)
    seller.lies.append(Lie(status=404))
    async with client_of(purse) as client:
        assert (await client.get(seller.url + "x")).status_code == 404
        assert (await client.get(seller.url + "y")).status_code == 200
        assert (await client.get(seller.url + "x")).status_code == 200
    assert purse.log.account().open == {}
    assert seller.signed_sat == 50


async def test_the_lease_unlocks_the_channel(seller: Seller, wallet: Path) -> None:
    """A task that lives on after a 404 holds the channel no longer than the lease."""
    purse = purse_of(wallet)
    seller.lies.append(Lie(status=404))
    async with client_of(purse, lease_seconds=0.05) as client:
        assert (await client.get(seller.url + "x")).status_code == 404
        assert (await asyncio.create_task(client.get(seller.url + "y"))).status_code == 200


async def test_the_budget_is_the_wallets(seller: Seller, wallet: Path) -> None:
    """A price or a host outside the budget is declined before anything is signed."""
    for budget, kind in (
        (Budget(total=24), errors.OverBudget),
        (Budget(total=100, hosts=["elsewhere.example"]), errors.HostNotAllowed),
    ):
        async with client_of(purse_of(wallet, budget)) as client:
            with pytest.raises(kind):
                await client.get(seller.url)
    assert seller.signed_sat == 0


async def test_the_sdks_origins_are_respected(seller: Seller, wallet: Path) -> None:
    """`allowed_origins` of the SDK holds beside the budget."""
    from mpp.errors import PaymentError

    async with client_of(purse_of(wallet), allowed_origins=["https://elsewhere.example"]) as client:
        with pytest.raises(PaymentError, match="origin"):
            await client.get(seller.url)
    assert seller.signed_sat == 0


async def test_a_method_that_nobody_watches_signs_nothing(
    seller: Seller, wallet: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the SDK's events no answer would be noted: the error names the missing call."""
    from mpp.client import PaymentTransport

    from paychan.mpp import ChannelPayments

    caplog.set_level(logging.CRITICAL)
    payments = ChannelPayments(purse_of(wallet))
    async with httpx.AsyncClient(transport=PaymentTransport([payments.method])) as client:
        with pytest.raises(RuntimeError, match="watch"):
            await client.get(seller.url)
    assert seller.signed_sat == 0


async def test_an_ended_channel_is_found_out(seller: Seller, wallet: Path) -> None:
    """The SDK hides the reason of a 402; the wallet asks the channel's own server, and knows that it has ended."""
    from paychan.client import Payer

    purse = purse_of(wallet)
    before = purse.wallet.read_all()[0][0]
    with Payer(wallet=wallet) as payer:
        payer.channel(before.name).close()
    file = purse.wallet.lock(before.name)
    file.save(before)
    file.release()
    async with client_of(purse) as client:
        with pytest.raises(errors.StillUnpaid):
            await client.get(seller.url)
    assert purse.wallet.read(before.name).state is not State.OPEN
