"""Server, signer and node killed (SIGKILL) at each step of opening and closing: the step is paused, then one is killed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple

import httpx
import pytest

from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, settled, wait_for
from tests.lib.node import Node
from tests.lib.rpcproxy import RpcProxy
from tests.lib.system import System, dead_node, dead_server, dead_signer, write_chain

Place = tuple[System, Node, "Gate"]
Death = Callable[[System, Node], AbstractContextManager[None]]
Step = Callable[[Customer], bool]

PAID_SAT = OPENING_SAT + 5

_PATIENCE_SECONDS = 60.0

each_death = pytest.mark.parametrize("death", [dead_server, dead_signer, dead_node])


class Gate(RpcProxy):
    """A proxy in front of the node that can pause one method, before the node is asked or after it has answered."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._held, self._opened = threading.Semaphore(0), threading.Event()
        self._closed = ""
        self._answered = False

    def close(self, method: str, *, answered: bool) -> None:
        self._held, self._opened = threading.Semaphore(0), threading.Event()
        self._answered, self._closed = answered, method

    def wait(self) -> None:
        """Wait until a call is paused."""
        assert self._held.acquire(timeout=_PATIENCE_SECONDS), f"{self._closed} was not called"

    def open(self) -> None:
        self._closed = ""
        self._opened.set()

    def _hold(self) -> None:
        opened = self._opened
        self._held.release()
        opened.wait(_PATIENCE_SECONDS)

    def __exit__(self, *error: object) -> None:
        self.open()
        super().__exit__(*error)

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        asked = json.loads(body)
        held = self._closed in {each["method"] for each in (asked if isinstance(asked, list) else [asked])}
        if held and not self._answered:
            self._hold()
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type")}
        try:
            answer = self._client.post(self._node.url + request.path, content=body, headers=headers)
        except httpx.TransportError:  # the node is down, so the caller gets no answer either
            request.close_connection = True
            return
        if held and self._answered:
            self._hold()
        try:
            request.send_response(answer.status_code)
            request.send_header("Content-Type", answer.headers.get("Content-Type", ""))
            request.send_header("Content-Length", str(len(answer.content)))
            request.end_headers()
            request.wfile.write(answer.content)
        except OSError:  # the server was killed
            request.close_connection = True


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("steps")
    with Node(directory / "node") as node, Gate(node) as gate:
        system = System(directory / "system", node=node)
        system.server_file.write_text(system.server_file.read_text().replace(node.url, gate.url))
        write_chain(node)
        with system:
            yield system, node, gate


def once(step: Step, customer: Customer) -> bool:
    """Try a step, and say whether it is done; the server may not answer."""
    try:
        return step(customer)
    except httpx.TransportError:
        return False


def opened(customer: Customer) -> bool:
    return customer.open().status_code in (201, 409)


def paid(customer: Customer) -> bool:
    return customer.pay(PAID_SAT).status_code == 200


def closed(customer: Customer) -> bool:
    return customer.close(PAID_SAT).status_code in (200, 202, 410)


class Moment(NamedTuple):
    """A moment in a step: while the node is asked, or after it has answered and before the server knows."""

    method: str
    answered: bool = False
    at_once: int = 2
    """Number of calls at the same time, of two channels in the same step."""


OPENING = {
    "funding looked for": (opened, Moment("gettxout", at_once=1)),
    "funding found, nothing stored": (opened, Moment("gettxout", answered=True, at_once=1)),
    "address not followed yet": (opened, Moment("importdescriptors", at_once=1)),
    "address followed, nothing stored": (opened, Moment("importdescriptors", answered=True, at_once=1)),
}

CLOSING = {
    "closing stored, nothing signed": Moment("estimatesmartfee"),
    "signed and stored, not published": Moment("testmempoolaccept"),
    "published, not stored": Moment("sendrawtransaction", answered=True),
    "stored as published": Moment("gettxspendingprevout"),
}


def killed_at(place: Place, moment: Moment, death: Death, step: Step, customers: list[Customer]) -> None:
    """Pause a step at a moment, kill, let it continue, start again, and repeat the step until it is done."""
    system, node, gate = place
    gate.close(moment.method, answered=moment.answered)
    with ThreadPoolExecutor(len(customers)) as threads:
        for each in customers:
            threads.submit(once, step, each)
        for _ in range(moment.at_once):
            gate.wait()
        with death(system, node):
            gate.open()
    for each in customers:
        wait_for(partial(once, step, each), step.__name__)


def funded(place: Place) -> list[Customer]:
    """One payer of each version, whose funding is confirmed."""
    system, node, _ = place
    customers = [Customer(system, node), CustomerV2(system, node)]
    for each in customers:
        each.fund()
    node.mine()
    return customers


def check(customers: list[Customer]) -> None:
    for each, mined in zip(customers, settled(*customers), strict=True):
        assert mined[each.change_script.hex()] == FUNDING_SAT - PAID_SAT
        assert (each.record["value_received"], each.record["spent_by"]) == (PAID_SAT, None)


@each_death
@pytest.mark.parametrize("moment", OPENING)
def test_threat_11_killed_at_each_step_of_opening(place: Place, death: Death, moment: str) -> None:
    """The payer asks again: one channel, which takes payments and is settled."""
    customers = funded(place)
    step, at = OPENING[moment]
    killed_at(place, at, death, step, customers)
    for next_step in (opened, paid, closed):
        for each in customers:
            wait_for(partial(once, next_step, each), next_step.__name__)
    check(customers)


@each_death
@pytest.mark.parametrize("moment", CLOSING)
def test_threat_11_34_killed_at_each_step_of_closing(place: Place, death: Death, moment: str) -> None:
    """Whichever process died, one settlement is mined, with every acknowledged payment."""
    customers = funded(place)
    for step in (opened, paid):
        for each in customers:
            wait_for(partial(once, step, each), step.__name__)
    killed_at(place, CLOSING[moment], death, closed, customers)
    check(customers)
