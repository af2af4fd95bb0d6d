"""RBPCP §5.6 and §5.7: web pages may call every route, and may read every answer, also errors."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from paychan.protocol.payment import encode_v1
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.both_paths import BOTH_PATHS
from tests.lib.rbpcp import V1, V2, refusal
from tests.lib.system import System

pytestmark = BOTH_PATHS

CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET,POST,PUT,DELETE",
    "Access-Control-Allow-Headers": "Origin,Accept,Content-Type",
    "Access-Control-Expose-Headers": "Location,Retry-After,Date",
}

CHANNEL = "0" * 64 + "/0"

PATHS = [
    "/v1/fundingInfo",
    "/v1/channels/new",
    f"/v1/channels/{CHANNEL}",
    f"/v1/channels/{CHANNEL}/pay",
    f"/v2/funding/1500000000/{'02' + '11' * 32}/info",
    f"/v2/funding/1500000000/{'02' + '11' * 32}/outputs",
    f"/v2/channels/{CHANNEL}",
    f"/v2/channels/{CHANNEL}/close",
]


def _cors(answer: httpx.Response) -> dict[str, str]:
    return {name: answer.headers.get(name, "") for name in CORS}


@pytest.mark.parametrize("path", PATHS)
def test_a_preflight_is_answered_on_every_route(system: System, http: httpx.Client, path: str) -> None:
    """OPTIONS is 200 with headers and no body."""
    answer = http.options(system.url + path, headers={"Origin": "https://shop.example"})
    assert (answer.status_code, answer.content, _cors(answer)) == (200, b"", CORS)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "BREW"])
@pytest.mark.parametrize("path", [*PATHS, "/nowhere"])
def test_errors_of_every_route_can_be_read_by_a_page(
    system: System, http: httpx.Client, method: str, path: str
) -> None:
    """Every 4xx has the CORS headers, and a JSON body except where v2 requires an empty one."""
    answer = http.request(method, system.url + path)
    assert 400 <= answer.status_code < 500
    assert _cors(answer) == CORS
    if answer.content:
        refusal(answer)
    else:
        assert (answer.status_code, path[:4]) == (404, "/v2/")


def test_successes_can_be_read_by_a_page(system: System, v1: V1, new_v2: Callable[[Dialect], V2]) -> None:
    """Every successful answer of both versions has the CORS headers."""
    first, second = v1.payer.payment(100_000), v1.payer.payment(200_000)
    v2 = new_v2(Dialect.S)
    answers = [
        v1.funding_info(),
        v1.open(first),
        v1.pay(second),
        v1.close(second),
        v1.http.get(f"{system.url}/v2/funding/{v2.payer.expiry}/{v2.payer.public_key.hex()}/info"),
        v2.open(v2.payer.payment(100_000)),
        v2.pay(v2.payer.payment(200_000)),
        v2.close(v2.payer.payment(250_000)),
    ]
    assert [answer.status_code for answer in answers] == [200, 201, 200, 202, 200, 201, 200, 200]
    assert [_cors(answer) for answer in answers] == [CORS] * len(answers)


def test_a_413_can_be_read_by_a_page(open_v1: V1) -> None:
    """A body over the limit is refused before the request is parsed, with the headers and body of an error."""
    payment = encode_v1(open_v1.payer.payment(150_000))
    answer = open_v1.http.put(f"{open_v1.resource}?payment={payment}", content=b"x" * 4097)
    assert refusal(answer) == (413, "body_too_large")
    assert (answer.json()["got_bytes"], answer.json()["limit_bytes"]) == (4097, 4096)
    assert _cors(answer) == CORS
    assert open_v1.pay(open_v1.payer.payment(150_000)).json()["value_received"] == 50_000
