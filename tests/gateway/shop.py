"""A seller's service behind the real server's gateway, and a payer that answers offers as the wire pages say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.mpp_outcomes import read_receipt
from paychan.protocol.wire.offers import ChannelState, Close, Settled, Voucher
from paychan.protocol.wire.x402_json import read_required, read_response
from paychan.protocol.wire.x402_outcomes import read_settled
from tests.lib.rbpcp import V2, Payer
from tests.lib.system import System

if TYPE_CHECKING:
    from tests.gateway.upstream import Upstream

OPENING_SAT = 100_000
PRICE_SAT = 25

PRICES = """
upstream = "{upstream}"
realm = "shop.example"
free = ["/free/**"]
[timeouts]
connect_seconds = 2
first_byte_seconds = 2
idle_seconds = 2
[[route]]
path = "/v1/**"
price_sat = 25
[[route]]
path = "/told/**"
ceiling_sat = 40
[[route]]
path = "/events/**"
unit = "event"
price_sat = 5
pause_seconds = 1.5
[[route]]
path = "/patient/**"
unit = "event"
price_sat = 5
[[route]]
path = "/kilobytes/**"
unit = "kilobyte"
price_sat = 3
[[route]]
path = "/bytes/**"
unit = "byte"
price_sat = 1
[[route]]
path = "/short-kilobytes/**"
unit = "kilobyte"
price_sat = 3
pause_seconds = 1.5
[[route]]
path = "/short-bytes/**"
unit = "byte"
price_sat = 1
pause_seconds = 1.5
[[route]]
path = "/seconds/**"
unit = "second"
price_sat = 2
"""


class Bill:
    """The gateway's word about a paid request."""

    def __init__(self, response: httpx.Response) -> None:
        self.settled: Settled
        if "PAYMENT-RESPONSE" in response.headers:
            self.settled = read_settled(read_response(response.headers["PAYMENT-RESPONSE"]))
        else:
            self.settled = read_receipt(response.headers["Payment-Receipt"]).settled

    @property
    def charged_sat(self) -> int:
        return self.settled.charged_sat

    @property
    def state(self) -> ChannelState:
        return self.settled.state


class Customer:
    """A payer with one open channel; `paid_sat` is the sum of its newest payment."""

    def __init__(self, shop: Shop) -> None:
        self.shop, self.payer = shop, Payer()
        self.paid_sat = OPENING_SAT
        v2 = V2(shop.system.url, self.payer, shop.http)
        opened = v2.open(self.payer.payment(OPENING_SAT))
        assert opened.status_code == 201, opened.text

    def voucher(self, paid_sat: int | None = None) -> Voucher:
        paid_sat = self.paid_sat if paid_sat is None else paid_sat
        return Voucher.of(self.payer.outpoint, self.payer.funding_sat, self.payer.payment(paid_sat))

    def headers(
        self, path: str, more_sat: int = 0, *, way: str = "x402", close: bool = False, name: str = ""
    ) -> dict[str, str]:
        """Answer the offer of a path with the payment that gives `more_sat` more than the last one."""
        offered = self.shop.get(path)
        assert offered.status_code == 402, (offered.status_code, offered.text)
        self.paid_sat += more_sat
        voucher = self.voucher()
        action = Close(voucher) if close else voucher
        if way == "x402":
            found = x402.offers(read_required(offered.headers["PAYMENT-REQUIRED"]))[0]
            return {"PAYMENT-SIGNATURE": x402.payment_header(found, action, identifier=name)}
        challenge = mpp.offers(offered.headers.get_list("WWW-Authenticate"))[0].challenge
        return {"Authorization": mpp.credential_header(challenge, action)}

    def get(self, path: str, more_sat: int = PRICE_SAT, way: str = "x402", **headers: str) -> httpx.Response:
        """Pay for a path and get it."""
        return self.shop.get(path, headers={**self.headers(path, more_sat, way=way), **headers})

    def record(self) -> tuple[int, int]:
        """Sums that the server has on disk or in memory: accepted and spent; by a voucher of no value."""
        answer = self.shop.http.head(self.shop.url + "/events/sse/0", headers=self.headers("/events/sse/0"))
        assert answer.status_code == 204, answer.status_code
        state = Bill(answer).state
        return state.accepted_sat, state.spent_sat


class Shop:
    """Upstream and server."""

    def __init__(self, system: System, upstream: Upstream, http: httpx.Client) -> None:
        self.system, self.upstream, self.http = system, upstream, http

    @property
    def url(self) -> str:
        assert self.system.running is not None
        return self.system.running.gateway_url

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.http.get(self.url + path, **more)

    def seen(self) -> dict[str, list[str]]:
        """Headers of the last request that reached the upstream."""
        return {name.lower(): values for name, values in self.upstream.calls[-1][2].items()}


@contextmanager
def open_shop(
    directory: Path,
    prices: str = PRICES,
    sections: dict[str, str] | None = None,
    limits: dict[int, int] | None = None,
) -> Iterator[Shop]:
    from tests.gateway.upstream import Upstream

    upstream = Upstream()
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "prices.toml"
    file.write_text(prices.format(upstream=upstream.url))
    settings = {"gateway": f'port = 0\nprices = "{file}"', **(sections or {})}
    try:
        with System(directory, sections=settings, limits=limits) as system, httpx.Client(timeout=30) as http:
            yield Shop(system, upstream, http)
    finally:
        upstream.stop()
