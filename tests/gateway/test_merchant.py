"""The merchant interface over a real socket: what a seller's program may ask, and what payer and seller are left with."""

from __future__ import annotations

import hashlib
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from paychan.protocol.settings import SettingsError
from paychan.protocol.wire import merchant as wire
from paychan.protocol.wire.mpp_outcomes import read_receipt
from paychan.protocol.wire.offers import Settled
from paychan.protocol.wire.x402_json import read_response
from paychan.protocol.wire.x402_outcomes import read_settled
from tests.gateway.merchants import LEASE_SECONDS, REPEATS, Desk, by_socket, desk

URL = "http://shop.example/v1/tile/5?z=3"
NO_BODY = hashlib.sha256(b"").hexdigest()


@asynccontextmanager
async def shop(tmp_path: Path) -> AsyncIterator[tuple[Desk, httpx.AsyncClient]]:
    async with desk(tmp_path) as found, by_socket(found) as http:
        yield found, http


def ask(headers: Any = (), **changes: Any) -> dict[str, Any]:
    """Write a request of a seller's program for a payer's GET."""
    return {
        "method": "GET",
        "url": URL,
        "price_sat": 25,
        "headers": list(headers),
        "body_sha256": NO_BODY,
        **changes,
    }


async def send(http: httpx.AsyncClient, path: str, message: Any) -> wire.Reply:
    answer = await http.post(path, json=message)
    return msgspec.json.decode(answer.content, type=wire.Reply)


async def charged(http: httpx.AsyncClient, message: Any) -> wire.Charged:
    reply = await send(http, "/charge", message)
    assert isinstance(reply, wire.Charged), reply
    return reply


async def refused(http: httpx.AsyncClient, message: Any) -> tuple[int, str]:
    """Return status and code of a refusal."""
    reply = await send(http, "/charge", message)
    assert isinstance(reply, wire.Refused), reply
    assert "cache-control" in {name.lower() for name, _ in reply.headers}
    return reply.status, msgspec.json.decode(reply.body)["code"]


def settled(reply: wire.Charged) -> Settled:
    ((name, value),) = reply.headers
    return read_settled(read_response(value)) if name == "PAYMENT-RESPONSE" else read_receipt(value).settled


def place(reply: wire.Charged) -> dict[str, str]:
    return {"channel": reply.channel, "request": reply.request}


@pytest.mark.parametrize("way", ["x402", "mpp"])
async def test_an_offer_is_paid_charged_and_released(tmp_path: Path, way: str) -> None:
    """A charge is on disk with its header; a release makes it credit again, and the header says the new sums."""
    async with shop(tmp_path) as (found, http):
        offered = await send(http, "/offer", ask())
        assert isinstance(offered, wire.Offered)
        assert (offered.status, msgspec.json.decode(offered.body)["priceSat"]) == (402, 25)

        paid = await charged(http, ask(found.payment(offered.headers, 40, way)))
        assert (paid.charged_sat, paid.credit_sat, settled(paid).charged_sat) == (25, 15, 25)
        assert await found.credit() == (40, 25)

        less = await send(http, "/release", {**place(paid), "to_sat": 10, "way": paid.way, "challenge": paid.challenge})
        assert isinstance(less, wire.Charged)
        assert (less.charged_sat, settled(less).charged_sat, settled(less).state.credit_sat) == (10, 10, 30)
        await send(http, "/release", place(paid))
        assert await found.credit() == (40, 0)


async def test_a_request_without_a_payment_gets_the_offer_of_its_price(tmp_path: Path) -> None:
    """`/charge` answers as `/offer` then; a ceiling, a unit and a text are in the 402, and a browser gets the page."""
    async with shop(tmp_path) as (found, http):
        for path in ("/offer", "/charge"):
            message = ask(price_sat=500, is_ceiling=True, unit="token", realm="Tiles", description="One answer")
            offered = await send(http, path, message)
            assert isinstance(offered, wire.Offered)
            shown = msgspec.json.decode(offered.body)
            assert (shown["priceSat"], shown["unit"], shown["isCeiling"]) == (500, "token", True)
            page = await send(http, path, ask([("accept", "text/html")]))
            assert isinstance(page, wire.Offered)
            assert page.body.startswith("<!doctype html>")
        assert await found.credit() == (0, 0)


async def test_a_program_that_is_lost_leaves_the_charge_for_a_repetition(tmp_path: Path) -> None:
    """Without `/done` the payer repeats the request after the lease, and is not charged again. Before, it gets 409."""
    async with shop(tmp_path) as (found, http):
        offered = await charge_offer(http)
        headers = found.payment(offered.headers)
        first = await charged(http, ask(headers, visit="a"))
        assert place(await charged(http, ask(headers, visit="a"))) == place(first)  # the program lost the answer
        assert await refused(http, ask(headers, visit="b")) == (409, "request_under_way")
        found.steady += LEASE_SECONDS
        again = await charged(http, ask(headers, visit="b"))
        assert (place(again), again.charged_sat) == (place(first), 25)
        assert await found.credit() == (25, 25)


async def test_an_answered_request_is_repeated_a_few_times_and_never_given_back(tmp_path: Path) -> None:
    """After `/done` a repetition is served without a charge, at most `repeats` times; its failure gives nothing back."""
    async with shop(tmp_path) as (found, http):
        headers = found.payment((await charge_offer(http)).headers)
        for repeats in range(REPEATS + 1):
            failed = await charged(http, ask(headers))
            await send(http, "/release", place(failed))
            assert await found.credit() == (25, 25 if repeats else 0)
            served = await charged(http, ask(headers))
            assert (await http.post("/done", json=place(served))).status_code == 204
        assert await refused(http, ask(headers)) == (409, "already_delivered")
        assert await found.credit() == (25, 25)


async def test_a_repetition_at_a_ceiling_costs_no_more(tmp_path: Path) -> None:
    """A refused repetition of a request that cost less than its ceiling leaves the cost as it was."""
    async with shop(tmp_path) as (found, http):
        offered = await send(http, "/offer", ask(price_sat=500, is_ceiling=True))
        assert isinstance(offered, wire.Offered)
        message = ask(found.payment(offered.headers, 500), price_sat=500, is_ceiling=True)
        for _ in range(REPEATS + 1):
            paid = await charged(http, message)
            assert paid.charged_sat == 500
            await send(http, "/release", {**place(paid), "to_sat": 37})
            assert await refused(http, message) == (409, "request_under_way")
            await http.post("/done", json=place(paid))
            assert await found.credit() == (500, 37)
        assert await refused(http, message) == (409, "already_delivered")
        assert await found.credit() == (500, 37)


async def test_bad_payments_change_nothing(tmp_path: Path) -> None:
    """Both ways at once, garbage, another route, another price: each has its status and code."""
    async with shop(tmp_path) as (found, http):
        offered = await charge_offer(http)
        x402 = found.payment(offered.headers)
        mpp = found.payment(offered.headers, 0, "mpp")
        for message, want in (
            (ask([*x402, *mpp]), (400, "two_payments")),
            (ask([("PAYMENT-SIGNATURE", "????")]), (402, "malformed_payment")),
            (ask([("PAYMENT-SIGNATURE", "A" * 20_000)]), (402, "payment_too_large")),
            (ask([("Authorization", "Payment ????")]), (402, "malformed_payment")),
            (ask(x402, price_sat=26), (402, "offer_mismatch")),
            (ask(mpp, realm="another"), (402, "offer_mismatch")),
            (ask(x402, url="http://bad host/"), (400, "malformed")),
            (ask(x402, url="/v1/tile"), (400, "malformed")),
        ):
            assert await refused(http, message) == want
        assert await found.credit() == (0, 0)
        assert (await charged(http, ask(x402))).charged_sat == 25
        assert await refused(http, ask(x402, url=URL + "&other")) == (402, "credit_too_low")
        assert await found.credit() == (25, 25)


@pytest.mark.parametrize(
    ("path", "content", "status", "code"),
    [
        ("/charge", "{", 400, "malformed"),
        ("/charge", '{"method":"GET"}', 400, "malformed"),
        ("/charge", '{"method":"get","url":"http://a/","price_sat":1}', 400, "malformed"),
        ("/charge", '{"method":"GET","url":"http://a/","price_sat":0}', 400, "malformed"),
        ("/charge", '{"method":"GET","url":"http://a/","price_sat":1.5}', 400, "malformed"),
        ("/charge", '{"method":"GET","url":"http://a/","price_sat":1,"more":1}', 400, "malformed"),
        ("/charge", '{"method":"GET","url":"http://a/","price_sat":1,"description":"a\\nb"}', 400, "malformed"),
        ("/charge", " " * (wire.MAX_BODY_BYTES + 1), 413, "body_too_large"),
        ("/release", '{"channel":"x","request":"y"}', 400, "malformed"),
        ("/release", f'{{"channel":"{"0" * 64}:9999999999","request":"{"0" * 32}"}}', 400, "malformed"),
        ("/release", f'{{"channel":"{"0" * 64}:0","request":"{"0" * 32}"}}', 404, "unknown_channel"),
        ("/done", "[]", 400, "malformed"),
        ("/other", "{}", 404, "no_such_route"),
    ],
)
async def test_wrong_requests_have_codes(tmp_path: Path, path: str, content: str, status: int, code: str) -> None:
    """A program's wrong request is refused strictly, with a stable code."""
    async with shop(tmp_path) as (_found, http):
        answer = await http.post(path, content=content, headers={"Content-Type": "application/json"})
        reply = msgspec.json.decode(answer.content, type=wire.Reply)
        assert isinstance(reply, wire.Failure)
        assert (answer.status_code, reply.code) == (status, code)


async def test_other_methods_and_types_are_refused(tmp_path: Path) -> None:
    """A form of a page of another site reaches nothing."""
    async with shop(tmp_path) as (_found, http):
        assert (await http.get("/offer")).status_code == 405
        answer = await http.post("/offer", content="{}", headers={"Content-Type": "text/plain"})
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


async def test_the_socket_is_the_servers_alone(tmp_path: Path) -> None:
    """Its mode keeps other users out; a stale socket is replaced, and a listening one is an error."""
    from paychan.gateway.merchant_listener import start_merchant

    async with shop(tmp_path) as (found, http):
        path = tmp_path / "merchant.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(SettingsError, match="another process answers there"):
            await start_merchant(found.config, "server.toml", found.merchant)
        stale = tmp_path / "stale.sock"
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(stale))
        settings = msgspec.structs.replace(found.config.merchant, socket=str(stale))
        listeners = await start_merchant(
            msgspec.structs.replace(found.config, merchant=settings), "server.toml", found.merchant
        )
        await listeners.close()
        assert not stale.exists()
        assert (await http.get("/")).status_code == 404  # the listening one goes on


async def test_the_port_needs_the_token(tmp_path: Path) -> None:
    """Only a program that can read the token's file is answered by the port."""
    from paychan.gateway.merchant_listener import load_token

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with desk(tmp_path, port=port) as found:
        token = load_token(found.config.merchant_token, "server.toml")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            for authorization in ("", token, f"Bearer {token}x", "Bearer"):
                answer = await http.post("/offer", json=ask(), headers={"Authorization": authorization})
                assert (answer.status_code, answer.json()["code"]) == (401, "merchant_token_wrong")
            answer = await http.post("/offer", json=ask(), headers={"Authorization": f"Bearer {token}"})
            assert answer.json()["outcome"] == "offered"
        found.config.merchant_token.chmod(0o644)
        with pytest.raises(SettingsError, match="other users can read it"):
            load_token(found.config.merchant_token, "server.toml")


async def charge_offer(http: httpx.AsyncClient) -> wire.Offered:
    offered = await send(http, "/offer", ask())
    assert isinstance(offered, wire.Offered)
    return offered
