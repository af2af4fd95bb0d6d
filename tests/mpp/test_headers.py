"""One 402 with both protocols, as curl, Node's fetch and pympp get it: several challenges may come joined in one field."""

from __future__ import annotations

import json
import shutil
import subprocess

import httpx
import pytest

from paychan.client import Purse, paid_async_client
from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.x402_json import read_required
from tests.gateway.shop import Shop

BEARER = 'Bearer realm="a, b", error="invalid_token"'


class Joining(httpx.AsyncHTTPTransport):
    """Joins all challenges with one of another scheme, as Node's fetch shows them."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if shown := response.headers.get_list("WWW-Authenticate"):
            response.headers["WWW-Authenticate"] = ", ".join([BEARER, *shown, 'Basic realm="c"'])
        return response


@pytest.mark.parametrize("kind", ["own", "sdk"])
async def test_joined_challenges_are_paid(gateway: Shop, purse: Purse, kind: str) -> None:
    """Our own client and the SDK's find the challenge among others in one field."""
    from paychan.mpp import pay_with

    purse.prefer = "mpp"
    client = paid_async_client(purse, transport=Joining())
    if kind == "sdk":
        client = httpx.AsyncClient(transport=pay_with(purse, inner=Joining()))
    async with client:
        answer = await client.get(gateway.url + "/v1/a")
    assert (answer.status_code, answer.extensions["paychan"].charged_sat) == (200, 25)
    assert "Payment-Receipt" in answer.headers


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl (tests/system-packages)")
def test_curl_gets_both_offers(gateway: Shop) -> None:
    """Both headers and the problem are in the answer that curl prints."""
    printed = subprocess.run(["curl", "-si", gateway.url + "/v1/a"], capture_output=True, text=True, check=True).stdout
    head, _, body = printed.replace("\r\n", "\n").partition("\n\n")
    fields = [line.partition(": ") for line in head.splitlines()[1:]]
    (challenge,) = mpp.offers([value for name, _, value in fields if name.lower() == "www-authenticate"])
    (required,) = [value for name, _, value in fields if name.lower() == "payment-required"]
    assert challenge.offer.amount_sat == x402.offers(read_required(required))[0].offer.amount_sat == 25
    assert json.loads(body)["status"] == 402


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node 20 (tests/system-packages)")
def test_nodes_fetch_gets_both_offers(gateway: Shop) -> None:
    """Node's fetch shows both headers, and a page of another site may read them."""
    script = """
    const answer = await fetch(process.argv[1], {headers: {Origin: "https://elsewhere.example"}});
    const names = ["www-authenticate", "payment-required", "access-control-expose-headers"];
    console.log(JSON.stringify([answer.status, ...names.map(name => answer.headers.get(name))]));
    """
    command = ["node", "--input-type=module", "-e", script, gateway.url + "/v1/a"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    status, challenges, required, exposed = json.loads(printed)
    assert status == 402
    assert mpp.offers([f"{BEARER}, {challenges}"])[0].offer.amount_sat == 25
    assert x402.offers(read_required(required))[0].offer.amount_sat == 25
    assert {"www-authenticate", "payment-required", "payment-response", "payment-receipt"} <= {
        name.strip().lower() for name in exposed.split(",")
    }
