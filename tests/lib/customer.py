"""Customers of a paychan on a real regtest node: channels funded on the chain, requests as clients send them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import httpx
import msgspec
from coincurve import PrivateKey

from paychan.protocol.address import encode_address, key_script, p2sh_script
from paychan.protocol.kinds.base import ChannelKind, ChannelTerms, make_terms
from paychan.protocol.kinds.p2sh import P2SH
from paychan.protocol.kinds.refund import Refund, sign_refund
from paychan.protocol.payment import Payment, encode_v1, sign_payment
from paychan.protocol.types import Network, OutPoint, Sat
from paychan.protocol.wire.rbpcp import Dialect, opening_secret, payment_data
from tests.lib.node import Node
from tests.lib.system import System

FUNDING_SAT = 1_000_000
OPENING_SAT = 100_000
LIFE_SECONDS = 40 * 3600


@contextmanager
def market(directory: Path, sections: dict[str, str] | None = None) -> Iterator[tuple[System, Node]]:
    """A paychan and its node, for one or several tests."""
    with Node(directory / "node") as node, System(directory / "system", sections=sections, node=node) as system:
        yield system, node


class OddTerms(NamedTuple):
    """Properties of a script that signing needs."""

    redeem_script: bytes

    @property
    def kind(self) -> ChannelKind:
        return OddKind()


class OddKind(type(P2SH)):
    """RBPCP's kind with any script."""

    def redeem_script(self, terms: ChannelTerms) -> bytes:
        return terms.redeem_script


class Customer:
    """A v1 client with a channel funded on the chain; amounts are sums of all its payments."""

    def __init__(self, system: System, node: Node, expiry: int | None = None) -> None:
        self.system, self.node = system, node
        self.key = PrivateKey()
        self.change_script = key_script(self.key.public_key.format())
        self.change_address = encode_address(self.change_script, Network.REGTEST)
        self.query = {
            "client_pubkey": self.key.public_key.format().hex(),
            "exp_time": str(expiry or max(int(time.time()), node.median_time) + LIFE_SECONDS),
        }
        answer = self.ask("GET", "/v1/fundingInfo", **self.query)
        assert answer.status_code == 200, answer.text
        info = answer.json()
        self.terms: ChannelTerms = make_terms(
            bytes.fromhex(info["server_pubkey"]), self.key.public_key.format(), int(self.query["exp_time"])
        )
        self.address: str = info["funding_address_copy"]
        assert self.address == self.terms.funding_address(Network.REGTEST)

    def fund(self, sat: int = FUNDING_SAT) -> OutPoint:
        self.outpoint = self.node.fund(self.address, sat)
        return self.outpoint

    def fund_odd(self, redeem_script: bytes) -> OutPoint:
        """Fund a script that no server would hand out, and continue as if it were the channel's."""
        self.terms = cast("ChannelTerms", OddTerms(redeem_script))
        self.address = encode_address(p2sh_script(redeem_script), Network.REGTEST)
        return self.fund()

    def ask(self, method: str, path: str, content: bytes = b"", /, **query: str) -> httpx.Response:
        return httpx.request(method, self.system.url + path, params=query, content=content, timeout=30, verify=False)

    def payment(self, paid_sat: int) -> Payment:
        return sign_payment(
            self.key, self.terms, self.outpoint, FUNDING_SAT, self.change_script, Sat(FUNDING_SAT - paid_sat)
        )

    def refund(self, fee_sat: int = 10_000) -> Refund:
        """Build the refund of the whole channel, valid after its expiry."""
        return sign_refund(self.key, self.terms, self.outpoint, Sat(FUNDING_SAT), self.change_script, Sat(fee_sat))

    def open(self, paid_sat: int = OPENING_SAT) -> httpx.Response:
        return self.open_with(self.payment(paid_sat))

    def pay(self, paid_sat: int) -> httpx.Response:
        return self.pay_with(self.payment(paid_sat))

    def close(self, paid_sat: int) -> httpx.Response:
        return self.close_with(self.payment(paid_sat))

    def open_with(self, payment: Payment) -> httpx.Response:
        """Send a payment unchanged, good or bad; so do the next two methods."""
        terms = self.query | {"change_address": self.change_address, "payment": encode_v1(payment)}
        return self.ask("POST", "/v1/channels/new", **terms)

    def pay_with(self, payment: Payment) -> httpx.Response:
        return self.ask("PUT", self.path, payment=encode_v1(payment))

    def close_with(self, payment: Payment) -> httpx.Response:
        return self.ask("DELETE", self.path, payment=encode_v1(payment))

    @property
    def path(self) -> str:
        return f"/v1/channels/{self.outpoint.txid_hex}/{self.outpoint.vout}"

    @property
    def record(self) -> dict[str, Any]:
        return self.system.channel(self.outpoint)

    def opened(self) -> None:
        self.fund()
        self.node.mine()
        wait_for(lambda: self.open().status_code == 201, "opened")

    def ends(self, status: str) -> None:
        """Wait until the operator's view of the channel shows this."""
        wait_for(lambda: self.record["status"] == status, status)


class CustomerV2(Customer):
    """A customer of version 2, whose requests name the outpoint."""

    def open_with(self, payment: Payment) -> httpx.Response:
        self.secret = opening_secret(payment).hex()
        return self.ask("POST", self.path, msgspec.json.encode(self.opening(payment)), secret=self.secret)

    def opening(self, payment: Payment) -> dict[str, Any]:
        """Build the body of the opening request."""
        return _data(payment) | {
            "redeem_script": self.terms.redeem_script.hex(),
            "funding_txid": self.outpoint.txid_hex,
            "funding_vout": self.outpoint.vout,
            "change_address": self.change_address,
        }

    def pay_with(self, payment: Payment) -> httpx.Response:
        return self.ask("PUT", self.path, _body(payment), secret=self.secret)

    def close_with(self, payment: Payment) -> httpx.Response:
        return self.ask("PUT", f"{self.path}/close", _body(payment), secret=self.secret)

    @property
    def path(self) -> str:
        return f"/v2/channels/{self.outpoint.txid_hex}/{self.outpoint.vout}"


class Mover(CustomerV2):
    """A customer with a movable channel: its change funds the channel again. It follows the server's moves."""

    def __init__(self, system: System, node: Node) -> None:
        super().__init__(system, node)
        self.change_script, self.change_address = self.terms.funding_script, self.address
        self.went: list[OutPoint] = []

    def withdrawn(self) -> None:
        """Let the operator withdraw, and continue at the change output."""
        txid, vout = str(self.outpoint).split(":")
        assert self.system.manage("POST", f"/channels/{txid}/{vout}/withdraw").status_code == 200
        self.node.mine(1)
        wait_for(lambda: self.moved_to is not None, "moved")
        self.go_on()

    @property
    def moved_to(self) -> str | None:
        moved: str | None = self.record.get("moved_to")
        return moved

    def go_on(self) -> None:
        """Follow the server to the output that the channel moved to."""
        txid, vout = str(self.moved_to).split(":")
        self.went.append(self.outpoint)
        self.outpoint = OutPoint.parse(txid, int(vout))


def settled(*customers: Customer) -> list[dict[str, int]]:
    """Mine the settlements of channels; return the satoshi that each script received (by hex)."""
    node = customers[0].node
    inputs = [{"txid": each.outpoint.txid_hex, "vout": each.outpoint.vout} for each in customers]

    def published() -> bool:
        return all("spendingtxid" in each for each in node.rpc("gettxspendingprevout", inputs))

    wait_for(published, "settlements in the mempool")
    block = node.rpc("getblock", node.mine(2)[0], 2)
    spenders = {(each["vin"][0].get("txid"), each["vin"][0].get("vout")): each for each in block["tx"]}
    found = [spenders[customer.outpoint.txid_hex, customer.outpoint.vout] for customer in customers]
    for customer, transaction in zip(customers, found, strict=True):
        customer.ends("closed")
        assert customer.record["settlement_txid"] == transaction["txid"]
    return [
        {out["scriptPubKey"]["hex"]: int(out["value"].scaleb(8)) for out in transaction["vout"]}
        for transaction in found
    ]


def wait_for(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait for something that the server does on its own."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(pause)
        pause = min(0.1, 1.3 * pause)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


def _body(payment: Payment) -> bytes:
    return msgspec.json.encode({"payment_data": _data(payment), "application_data": ""})


def _data(payment: Payment) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.to_builtins(payment_data(payment, Dialect.S))
    return {name: value for name, value in data.items() if value is not None}
