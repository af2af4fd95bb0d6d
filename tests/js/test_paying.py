"""The ES module under the unmodified SDKs `@x402/fetch` and `mppx` in Node, which pay the real gateway and lying sellers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paychan import client
from tests.gateway.shop import OPENING_SAT, PRICE_SAT, Customer, Shop, open_shop
from tests.js.node import MODULE, NODE, Program, running
from tests.lib.readme import ROOT

TILE = "/v1/tile"
both = pytest.mark.parametrize("way", ["x402", "mpp"])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(tmp_path_factory.mktemp("shop")) as opened:
        yield opened


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with running(tmp_path_factory.mktemp("js"), "pay.mjs") as started:
        yield started


@pytest.fixture
def customer(shop: Shop) -> Customer:
    return Customer(shop)


class Payer:
    """A channel of the gateway in the module's JSON, and the program that pays over it."""

    def __init__(self, program: Program, customer: Customer, way: str) -> None:
        self.program, self.customer, self.way = program, customer, way
        payer = customer.payer
        self.channel = {
            "privateKey": payer.key.to_hex(),
            "serverKey": payer.terms.server_key.hex(),
            "expiry": payer.expiry,
            "outpoint": str(payer.outpoint),
            "fundingSat": payer.funding_sat,
            "changeScript": payer.change_script.hex(),
            "dustSat": 700,
            "payUrl": customer.shop.system.url,
            "network": "test",
            "settlementPeriodSeconds": 21_600,
            "changeSat": payer.funding_sat - OPENING_SAT,
        }

    def run(self, scenario: str, **given: Any) -> Any:
        url = self.customer.shop.url + TILE
        done = self.program.ask(scenario=scenario, way=self.way, channel=self.channel, url=url, **given)
        self.channel = done["channel"]
        return done

    def get(self, *paths: str, **given: Any) -> Any:
        return self.run("sequence", paths=paths, **given)

    @property
    def signed_sat(self) -> int:
        """Sum that the channel signed after its opening."""
        return self.customer.payer.funding_sat - int(self.channel["changeSat"]) - OPENING_SAT

    def server_has(self) -> tuple[int, int]:
        """Return sum and charges that the server has, after the opening."""
        self.customer.paid_sat = OPENING_SAT + self.signed_sat
        accepted_sat, spent_sat = self.customer.record()
        return accepted_sat - OPENING_SAT, spent_sat - OPENING_SAT


def statuses(done: Any) -> list[int]:
    return [answer.get("status") for answer in done["answers"]]


@both
def test_requests_are_paid_one_after_the_other(program: Program, customer: Customer, way: str) -> None:
    """The first request and the next ones pay the price each, and each payment was stored before it left."""
    payer = Payer(program, customer, way)
    done = payer.get("/v1/a", "/v1/b?c=d", "/free/e", "/v1/a")

    assert statuses(done) == [200] * 4
    assert '"path": "/v1/b?c=d"' in done["answers"][1]["body"]
    assert payer.signed_sat == 75
    assert payer.server_has() == (75, 75)
    first = payer.customer.payer.funding_sat - OPENING_SAT - PRICE_SAT
    assert (done["saved"][0]["changeSat"], done["saved"][0]["acceptedSat"]) == (first, OPENING_SAT)


@both
def test_a_body_is_sent_with_the_payment(program: Program, customer: Customer, way: str) -> None:
    """The paid try has the method and the body of the request."""
    done = Payer(program, customer, way).get("/v1/echo", init={"method": "POST", "body": "hello"})

    assert '"method": "POST", "body": "hello"' in done["answers"][0]["body"]


@both
def test_a_channel_that_is_behind_catches_up(program: Program, customer: Customer, way: str) -> None:
    """An old copy of the channel adopts the newest payment, which the server proves, and pays in the same request."""
    payer = Payer(program, customer, way)
    for _ in range(3):
        assert customer.get("/v1/elsewhere").status_code == 200
    calls = len(customer.shop.upstream.calls)
    done = payer.get("/v1/a", "/v1/b")

    assert statuses(done) == [200, 200]
    assert len(customer.shop.upstream.calls) == calls + 2
    assert payer.signed_sat == 125
    assert payer.server_has() == (125, 125)


@both
def test_requests_at_the_same_time_are_paid_once_each(program: Program, customer: Customer, way: str) -> None:
    """Requests over one channel wait for each other: five are served for five prices."""
    payer = Payer(program, customer, way)
    done = payer.run("together", paths=[f"/v1/{number}" for number in range(5)])

    assert statuses(done) == [200] * 5
    assert payer.server_has() == (125, 125)


@both
def test_credit_pays_the_next_requests(program: Program, customer: Customer, way: str) -> None:
    """The price of a request that the service failed to serve pays the next one; a further one pays anew."""
    payer = Payer(program, customer, way)
    done = payer.get("/v1/drop", "/v1/drop", "/v1/a", "/v1/a")

    assert statuses(done) == [502, 502, 200, 200]
    assert payer.signed_sat == 50
    assert payer.server_has() == (50, 50)


@both
def test_a_request_that_credit_pays_is_a_new_one(program: Program, customer: Customer, way: str) -> None:
    """The same URL twice with the same change value, paid from credit: the service is asked twice."""
    payer = Payer(program, customer, way)
    calls = len(customer.shop.upstream.calls)
    done = payer.get("/told/price/0", "/told/price/0")

    assert statuses(done) == [200, 200]
    assert len(customer.shop.upstream.calls) == calls + 2
    assert payer.signed_sat == 40
    assert payer.server_has() == (40, 0)


@both
@pytest.mark.parametrize(
    "other",
    [{"payUrl": "http://127.0.0.1:1"}, {"network": "live"}, {"expiry": int(time.time()) + 21_600}],
    ids=["server", "network", "expiry"],
)
def test_a_channel_that_does_not_fit_the_offer_pays_nothing(
    program: Program, customer: Customer, way: str, other: dict[str, Any]
) -> None:
    """A channel to another server, on another network, or in its settlement period makes no payment."""
    payer = Payer(program, customer, way)
    payer.channel |= other
    done = payer.get("/v1/a")

    assert f"no channel pays {customer.shop.system.url}" in done["answers"][0]["error"]
    assert done["saved"] == []


@both
@pytest.mark.parametrize(("lie", "code"), [("nothing", None), ("spent", None), ("forged", "false_proof")])
def test_a_seller_that_asks_again_gets_one_price(
    program: Program, customer: Customer, way: str, lie: str, code: str | None
) -> None:
    """Neither a repeated 402, nor a claim that the payment is used up already, raises the signed sum above one price."""
    payer = Payer(program, customer, way)
    done = payer.run("loop", lie=lie, times=1)

    assert len({payment["signature"] for payment in done["seen"]}) == 1
    assert payer.signed_sat == PRICE_SAT
    assert [answer.get("code") for answer in done["answers"]] == [code]
    assert all(answer.get("status", 402) == 402 for answer in done["answers"])


@both
@pytest.mark.parametrize("own", [True, False])
def test_an_offer_of_another_binding_is_skipped(program: Program, customer: Customer, way: str, own: bool) -> None:
    """An offer of another binding with the same scheme and network is not paid; the own one behind it is."""
    payer = Payer(program, customer, way)
    done = payer.run("foreign", own=own)

    assert len(done["seen"]) == int(own)
    assert payer.signed_sat == PRICE_SAT * own
    if own:
        assert done["answer"] == {"status": 200, "body": "paid"}
    else:
        assert done["answer"]["error"]


@pytest.mark.parametrize(
    ("way", "text"), [("x402", "rejected by spendControls"), ("mpp", "price 25 sat, the limit is 24 sat")]
)
def test_a_price_above_the_limit_is_not_paid(program: Program, customer: Customer, way: str, text: str) -> None:
    """The SDK of x402 refuses by its spend controls, the method of MPP by its own limit; nothing is signed."""
    payer = Payer(program, customer, way)
    done = payer.get("/v1/a", options={"maxSat": PRICE_SAT - 1})

    assert text in done["answers"][0]["error"]
    assert (done["saved"], payer.signed_sat) == ([], 0)
    assert payer.server_has() == (0, 0)


@both
def test_no_payment_leaves_before_it_is_stored(program: Program, customer: Customer, way: str) -> None:
    """If the channel can't be stored, the request fails, the server gets no payment, and the channel is not locked."""
    payer = Payer(program, customer, way)
    done = payer.get("/v1/a", "/v1/b", disk_is_full=True)

    assert ["disk is full" in answer["error"] for answer in done["answers"]] == [True, True]
    assert payer.signed_sat == 0
    assert payer.server_has() == (0, 0)


@both
def test_a_lost_answer_costs_no_second_price(program: Program, customer: Customer, way: str) -> None:
    """After a payment without an answer, the next request sends the same payment, and the channel is not locked."""
    payer = Payer(program, customer, way)
    done = payer.run("lost")

    assert statuses(done) == [None, 200]
    assert len(done["seen"]) == 1
    assert payer.signed_sat == PRICE_SAT
    assert payer.server_has() == (25, 25)


@both
def test_a_channel_without_room_says_so(program: Program, customer: Customer, way: str) -> None:
    """Change between 0 and the dust limit, and a price above the rest, are refused before a payment is made."""
    codes = {}
    for left_sat in (724, 24, 25):
        payer = Payer(program, customer, way)
        payer.channel["changeSat"] = left_sat
        codes[left_sat] = payer.get("/v1/a")["answers"][0].get("error", "")

    assert "change 699 sat, need 0 or at least 700 sat" in codes[724]
    assert "price 25 sat, but the channel has 24 sat left" in codes[24]
    assert codes[25] == ""


def test_the_examples_of_the_page_pay(shop: Shop, program: Program, tmp_path: Path) -> None:
    """A channel of a wallet, written by the page's Python, pays one price by each of the page's programs."""
    page = (MODULE / "README.md").read_text()
    (python,) = re.findall(r"(?ms)^```python\n(.*?)^```", page)
    examples = re.findall(r"(?ms)^```js\n(.*?)^```", page)
    with client.Payer(shop.system.url, wallet=tmp_path) as payer:
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        channel.open()
        name, left_sat = channel.name, channel.record.left_sat
    told = subprocess.run(
        [sys.executable, "-c", python, tmp_path, name], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (program.folder / "channel.json").write_text(told.stdout)
    for example in examples:
        assert "https://api.example/v1/tile" in example
        (program.folder / "example.mjs").write_text(example.replace("https://api.example", shop.url))
        said = subprocess.run(
            [NODE, "example.mjs"], cwd=program.folder, capture_output=True, text=True, check=True, timeout=60
        )
        assert (said.stdout.split()[0], said.stderr) == ("200", "")

    assert len(examples) == 2
    assert json.loads((program.folder / "channel.json").read_text())["changeSat"] == left_sat - 2 * PRICE_SAT
