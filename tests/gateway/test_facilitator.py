"""The facilitator over real actors and a real store: read-only `/verify`, one charge for each request, refusals as 200."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from msgspec.structs import replace

from paychan.protocol.types import Sat
from paychan.protocol.wire import x402
from paychan.protocol.wire.offers import Close, Offer, Voucher
from paychan.protocol.wire.x402_json import PaymentPayload, Resource, SettleResponse, VerifyResponse
from paychan.protocol.wire.x402_outcomes import read_settled, read_state
from tests.gateway.merchants import OPENING_SAT, PAYER, Desk, desk

LEASE_SECONDS, REPEATS, PRICE_SAT = 100, 2, 25
URL = "http://shop.example/tile/5"
PREFIX = "invalid_batch_settlement_bitcoin_"


class Counter:
    """A facilitator, and what a seller's program sends to it."""

    def __init__(self, found: Desk) -> None:
        from paychan.gateway.facilitator import Facilitator

        self.desk, self.now = found, 1_000.0
        cashier, offering = found.merchant._cashier, found.merchant._offering
        self.terms = offering.terms
        self.facilitator = Facilitator(
            cashier,
            offering,
            found.server.context.view,
            lease_seconds=LEASE_SECONDS,
            repeats=REPEATS,
            steady=lambda: self.now,
        )

    @property
    def offer(self) -> Offer:
        return replace(self.terms, amount_sat=Sat(PRICE_SAT))

    def body(self, paid_sat: int, name: str = "", url: str = URL, **changes: Any) -> dict[str, Any]:
        """Return a request of an SDK; `paid_sat` is the sum of the payment after the opening."""
        own = x402.requirements(self.offer)
        payload = PaymentPayload(
            2,
            replace(own, extra={**own.extra, "paymentFlow": "upfront"}),
            x402.payload_of(self.desk.voucher(OPENING_SAT + paid_sat)),
            Resource(url),
            {x402.IDENTIFIER: {"info": {"required": False, "id": name}}} if name else None,
        )
        whole = {"x402Version": 2, "paymentPayload": payload, "paymentRequirements": own} | changes
        found = msgspec.json.decode(msgspec.json.encode(whole))
        assert isinstance(found, dict)
        return found

    async def verify(self, body: Any) -> VerifyResponse:
        return await self.facilitator.verify(body)

    async def settle(self, body: Any) -> SettleResponse:
        return await self.facilitator.settle(body)


@asynccontextmanager
async def counter(directory: Path) -> AsyncIterator[Counter]:
    async with desk(directory) as found:
        yield Counter(found)


async def test_verify_changes_nothing_and_settle_charges(tmp_path: Path) -> None:
    """A valid payment is valid as often as it is asked, and is booked with the price by the settlement alone."""
    async with counter(tmp_path) as found:
        body = found.body(40)
        for _ in range(2):
            verified = await found.verify(body)
            assert (verified.is_valid, verified.payer) == (True, PAYER.terms.client_key.hex())
        assert await found.desk.credit() == (0, 0)

        settled = await found.settle(body)
        assert read_settled(settled).charged_sat == PRICE_SAT
        assert (settled.success, settled.extra and settled.extra["creditSat"]) == (True, "15")
        assert await found.desk.credit() == (40, 25)
        assert not (await found.verify(found.body(40, "another-request-of-it"))).is_valid


async def test_the_same_request_is_settled_once(tmp_path: Path) -> None:
    """During the lease a repetition is busy; then it is a success without a charge, at most `repeats` times."""
    async with counter(tmp_path) as found:
        body = found.body(25)
        assert (await found.settle(body)).success
        assert (await found.settle(body)).error_reason == PREFIX + "channel_busy"
        for _ in range(REPEATS):
            found.now += LEASE_SECONDS
            assert (await found.settle(body)).success
        found.now += LEASE_SECONDS
        assert (await found.settle(body)).error_reason == PREFIX + "already_settled"
        assert await found.desk.credit() == (25, 25)


async def test_a_payment_is_settled_again_after_a_restart(tmp_path: Path) -> None:
    """The server is killed between booking and answer: the channel's record knows the request, which costs nothing more."""
    async with counter(tmp_path) as found:
        body = found.body(25, "an-identifier-of-the-payer")
        assert (await found.settle(body)).success
        restarted = Counter(found.desk)
        assert (await restarted.settle(body)).success
        assert not (await restarted.settle(body)).success
        assert not (await restarted.facilitator.unsettle(body)).success
        assert await found.desk.credit() == (25, 25)


async def test_a_name_or_the_resource_makes_another_request(tmp_path: Path) -> None:
    """A payment of two prices pays two requests: another identifier or another resource, and no third one."""
    async with counter(tmp_path) as found:
        assert (await found.settle(found.body(50, "the-first-identifier"))).success
        assert (await found.settle(found.body(50, "the-first-identifier", url=URL + "/other"))).success
        third = await found.settle(found.body(50, "the-third-identifier"))
        assert third.error_reason == "insufficient_funds"
        assert await found.desk.credit() == (50, 50)


async def test_a_refusal_shows_the_newest_payment_to_its_payer(tmp_path: Path) -> None:
    """A payer that is behind gets the state with the proof in `extra`, as a corrective 402 has it."""
    async with counter(tmp_path) as found:
        await found.settle(found.body(75))
        refused = await found.settle(found.body(25))
        assert (refused.success, refused.error_reason) == (False, PREFIX + "value_backwards")
        state = read_state(refused.extra or {})
        assert state is not None
        assert (state.newest, state.credit_sat) == (found.desk.voucher(OPENING_SAT + 75).payment, 50)
        forged = found.body(25)
        forged["paymentPayload"]["payload"]["changeSat"] = str(PAYER.funding_sat - OPENING_SAT - 26)
        forged["paymentPayload"]["payload"]["cumulativeSat"] = str(OPENING_SAT + 26)
        stranger = await found.settle(forged)
        assert (stranger.error_reason, stranger.extra) == (PREFIX + "signature", None)


async def test_a_failed_handler_gives_the_price_back_once(tmp_path: Path) -> None:
    """Unsettled, the same payment may be settled again; a request that was settled twice keeps its charge."""
    async with counter(tmp_path) as found:
        body = found.body(25)
        assert (await found.settle(body)).success
        assert (await found.facilitator.unsettle(body)).success
        assert await found.desk.credit() == (25, 0)
        assert (await found.settle(body)).success
        found.now += LEASE_SECONDS
        assert (await found.settle(body)).success
        assert not (await found.facilitator.unsettle(body)).success
        assert await found.desk.credit() == (25, 25)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"paymentPayload": {}}, "invalid_payload"),
        ({"paymentPayload": 5}, "invalid_payload"),
        ({"paymentRequirements": None}, "invalid_payload"),
        (
            {"payTo": "02c6047f9441ed7d6d3045406e95c07cd85c778e4b8cef3ca7abac09b95c709ee5"},
            "invalid_payment_requirements",
        ),
        ({"amount": "24"}, "invalid_payment_requirements"),
        ({"scheme": "exact"}, "unsupported_scheme"),
        ({"type": "close"}, "unsupported_scheme"),
        ({"cumulativeSat": "1"}, PREFIX + "cumulative_mismatch"),
        ({"channel": "11" * 32 + ":0"}, PREFIX + "channel_not_found"),
    ],
)
async def test_what_is_wrong_is_refused_by_both(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    """A payment of another form, server, price or channel, and a close, are no success and charge nothing."""
    async with counter(tmp_path) as found:
        body = found.body(25)
        for name, value in change.items():
            if name in body:
                body[name] = value
            elif name in body["paymentRequirements"]:
                body["paymentRequirements"][name] = value
            else:
                body["paymentPayload"]["payload"][name] = value
        verified, settled = await found.verify(body), await found.settle(body)
        assert (verified.is_valid, verified.invalid_reason) == (False, reason)
        assert (settled.success, settled.error_reason) == (False, reason)
        assert await found.desk.credit() == (0, 0)


async def test_the_routes_hang_on_the_merchant_listener(tmp_path: Path) -> None:
    """Refusals have status 200; `/supported` names one exact network; what is no JSON gets 400."""
    from paychan.gateway.facilitator import add_routes
    from paychan.gateway.merchant_listener import start_merchant

    async with counter(tmp_path) as found:
        config = found.desk.config
        config = replace(config, merchant=replace(config.merchant, socket=str(tmp_path / "second.sock")))
        listeners = await start_merchant(
            config, "server.toml", found.desk.merchant, (lambda router: add_routes(router, found.facilitator),)
        )
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "second.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://merchant") as http:
            supported = (await http.get("/supported")).json()
            settled = await http.post("/settle", json=found.body(25))
            unsettled = await http.post("/unsettle", json=found.body(25))
            refused = await http.post("/verify", json={})
            broken = await http.post("/settle", content=b"{", headers={"Content-Type": "application/json"})
        await listeners.close()
        (kind,) = supported["kinds"]
        assert (kind["x402Version"], kind["scheme"], kind["network"]) == (2, x402.SCHEME, found.terms.chain)
        assert supported["signers"] == {"bip122:*": [found.terms.identity.hex()]}
        assert (settled.status_code, settled.json()["success"]) == (200, True)
        assert (unsettled.status_code, unsettled.json()["success"]) == (200, True)
        assert (refused.status_code, refused.json()["isValid"]) == (200, False)
        assert broken.status_code == 400


async def test_a_close_is_never_a_success(tmp_path: Path) -> None:
    """A success makes the seller serve the request, so a close is refused, and the channel stays open."""
    async with counter(tmp_path) as found:
        body = found.body(0)
        voucher = found.desk.voucher(OPENING_SAT)
        assert isinstance(voucher, Voucher)
        body["paymentPayload"]["payload"] = x402.payload_of(Close(voucher))
        assert not (await found.settle(body)).success
        assert (await found.settle(found.body(25))).success
