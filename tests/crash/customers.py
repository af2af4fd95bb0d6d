"""Customers that open, pay and close channels of a server that is killed meanwhile, and remember its answers.

Each is a thread with one connection and one channel at a time, like a v1 client. It repeats a request without an answer
when the server is back, as a client would do.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

from paychan.protocol.address import encode_address
from paychan.protocol.payment import encode_v1
from paychan.protocol.types import Network, UnixTime
from tests.lib.system import System
from tests.lib.world import DebugPayer

OPENING_SAT = 100_000


@dataclass
class History:
    """One channel from the view of its customer; change values in satoshi."""

    payer: DebugPayer
    opened: bool = False
    answered: int | None = None
    """Change of the newest payment with an answer."""
    asked: int | None = None
    """Change of the payment that is in flight, or was when the server died."""
    closing: bool = False
    closed: bool = False

    @property
    def path(self) -> str:
        return f"/v1/channels/{self.payer.outpoint.txid_hex}/{self.payer.outpoint.vout}"

    def problem(self, found: dict[str, Any] | None) -> str | None:
        """Return the problem of the server's record after a restart, or None."""
        if found is None:
            return "an opened channel is gone" if self.opened else None
        status, left = found["status"], found["value_left"]
        if left not in (self.answered, self.asked):
            return f"change is {left}, answered was {self.answered}, in flight {self.asked}"
        if status not in ("open", "closed"):
            return f"is {status} although the watcher has scanned"
        if status == "closed" and not self.closing:
            return "was closed without a request"
        if status == "open" and self.closed:
            return "was closed and is open again"
        if status == "closed" and not found["settlement_txid"]:
            return "was closed without a settlement"
        return None


class Customer(threading.Thread):
    """Opens, pays and closes until it is stopped."""

    def __init__(self, name: str, system: System, serving: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self.histories: list[History] = []
        self.stopping = False
        self.resting = threading.Event()
        """Set while it waits for the server."""
        self.problems: list[str] = []
        self.answers = 0
        self._system = system
        self._serving = serving
        self._chance = random.Random(name)
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        try:
            while not self.stopping:
                self._live(self._new_history())
        except Exception as error:  # noqa: BLE001 - reported to the test
            self.problems.append(f"{self.name}: {error!r}")

    def _new_history(self) -> History:
        expiry = UnixTime(int(time.time()) + 30 * 86_400)
        history = History(DebugPayer(f"{self.name} {len(self.histories)} {self._system.directory}", expiry))
        self.histories.append(history)
        return history

    def _live(self, history: History) -> None:
        payer = history.payer
        history.asked = payer.funding_sat - OPENING_SAT
        query = {
            "client_pubkey": payer.key.public_key.format().hex(),
            "exp_time": payer.expiry,
            "change_address": encode_address(payer.change_script, Network.TEST),
            "payment": encode_v1(payer.payment(history.asked)),
        }
        if not self._send("POST", f"/v1/channels/new?{urlencode(query)}", (201, 409)):
            return
        history.opened, history.answered = True, history.asked
        for _ in range(self._chance.randrange(3, 40)):
            history.asked = history.answered - self._chance.randrange(1, 50)
            if not self._send("PUT", f"{history.path}?payment={encode_v1(payer.payment(history.asked))}", (200,)):
                return
            history.answered = history.asked
        history.closing = True
        if self._send("DELETE", f"{history.path}?payment={encode_v1(payer.payment(history.answered))}", (202,)):
            history.closed = True

    def _send(self, method: str, target: str, wanted: tuple[int, ...]) -> bool:
        """Send a request until it is answered; return false if the test ends before."""
        while not self.stopping:
            try:
                status, body = self._request(method, target)
            except (OSError, http.client.HTTPException):
                self._wait_for_server()
                continue
            if status not in wanted:
                self.problems.append(f"{method} {target}: {status} {body}")
            self.answers += 1
            return True
        return False

    def _request(self, method: str, target: str) -> tuple[int, Any]:
        if self._connection is None:
            address = urlsplit(self._system.url)
            self._connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
        self._connection.request(method, target, headers={"Content-Length": "0"})
        answer = self._connection.getresponse()
        body = answer.read()
        return answer.status, json.loads(body)

    def _wait_for_server(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        while not self.stopping:
            self.resting.set()
            self._serving.wait(0.2)
            self.resting.clear()
            if (
                self._serving.is_set()
            ):  # checked last: `pause` waits for every customer that was not resting at its check
                return


@dataclass
class Crowd:
    """Some customers of one system; they rest while its server is away."""

    system: System
    customers: list[Customer] = field(default_factory=list)
    serving: threading.Event = field(default_factory=threading.Event)

    def start(self, count: int) -> None:
        self.customers = [Customer(f"customer {n}", self.system, self.serving) for n in range(count)]
        self.serving.set()
        for customer in self.customers:
            customer.start()

    def wait_for_answers(self, count: int) -> None:
        """Wait until this many more requests have been answered."""
        enough, deadline = self.answers + count, time.monotonic() + 30
        while self.answers < enough:
            assert time.monotonic() < deadline, [customer.problems for customer in self.customers]
            time.sleep(0.001)

    def pause(self) -> None:
        """Wait until every customer has noticed that the server is gone."""
        self.serving.clear()
        for customer in self.customers:
            assert customer.resting.wait(30) or customer.problems, f"{customer.name} still waits for an answer"

    def resume(self) -> None:
        self.serving.set()

    def stop(self) -> None:
        """Stop all customers; a request in flight is answered before, if the server is running."""
        for customer in self.customers:
            customer.stopping = True
        for customer in self.customers:
            customer.join(30)
            assert not customer.is_alive(), customer.name

    @property
    def answers(self) -> int:
        return sum(customer.answers for customer in self.customers)

    def check(self, *, all_histories: bool = False) -> None:
        """Compare the server's records with the answers to each customer for its newest channels, or for all."""
        problems = [problem for customer in self.customers for problem in customer.problems]
        for customer in self.customers:
            for history in customer.histories if all_histories else customer.histories[-2:]:
                found = self.record(history)
                if problem := history.problem(found):
                    problems.append(f"{history.payer.seed}: {problem}: {found}")
        assert problems == []

    def record(self, history: History) -> dict[str, Any] | None:
        """Return the operator's view of a channel, None if there is none."""
        return self._ask(f"/channels/{history.payer.outpoint.txid_hex}/{history.payer.outpoint.vout}")

    def check_totals(self) -> None:
        """Check that the server has exactly the channels that it has confirmed to a customer, each once."""
        known = sum(self.record(history) is not None for customer in self.customers for history in customer.histories)
        totals = self._ask("/totals")
        assert totals is not None
        assert sum(totals["channels"].values()) == known

    def _ask(self, path: str) -> dict[str, Any] | None:
        """Send a request to the management interface; None for 404."""
        address = urlsplit(self.system.management_url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.system.token}"})
            answer = connection.getresponse()
            body: dict[str, Any] = json.loads(answer.read())
        finally:
            connection.close()
        assert answer.status in (200, 404), body
        return body if answer.status == 200 else None
