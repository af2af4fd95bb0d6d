"""What strangers may read: no socket path, URL, limit or exception of the server's inside leaves by the public port."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path

import httpx
import pytest

from paychan.api.responses import refusal
from paychan.protocol.errors import Failed, PaychanError, TooMuchUnconfirmed, Unavailable
from tests.api.test_wire import CLEAR, CORPUS
from tests.api.wire import connect
from tests.lib.customer import OPENING_SAT, Customer, wait_for
from tests.lib.node import Node
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System

INSIDE = "/run/paychan/signer.sock http://user:pass@10.1.2.3:8332 Traceback 10000"
CODES = sorted(code for code, kind in PaychanError.table.items() if issubclass(kind, Failed | Unavailable))


@pytest.mark.parametrize("code", CODES)
def test_fault_77_no_reason_reaches_a_stranger(code: str) -> None:
    """Whatever a 500 or 503 has for a reason or a number, its answer to clients holds none; the operator reads it."""
    kind = PaychanError.table[code]
    names = re.findall(r"{(\w+)", kind.text)
    error = kind(**dict.fromkeys(names, INSIDE))
    told = refusal(error, quiet_404=False)
    shown = told.body.decode() + str(told.reason) + repr(told.headers)
    if code not in OWN:
        assert not any(word in shown for word in INSIDE.split()), shown
    assert code in shown
    assert not names or INSIDE[:20] in refusal(error, quiet_404=False, to_operator=True).body.decode()


OWN = {"payment_pending", "stream_replaced", "search_too_long"}
"""Their numbers are the client's own, or only the operator gets them."""


def test_fault_77_the_limit_of_unconfirmed_value_stays_inside() -> None:
    """How much is at risk, and how much may be, is not a stranger's to know."""
    told = refusal(TooMuchUnconfirmed(got_sat=1_234_567, need_sat=7_654_321), quiet_404=False)
    assert not re.search(rb"1234567|7654321", told.body)


def test_fault_77_a_signer_that_is_away_is_not_described(tmp_path: Path) -> None:
    """Without a signer every door answers 503 with a code and a number; the log has the reason beside the number, once."""
    with System(tmp_path) as system, httpx.Client(trust_env=False, timeout=30) as http:
        v1 = V1(system.url, Payer(), http)
        assert v1.open(v1.payer.payment(100_000)).status_code == 201
        assert system.signer is not None
        assert system.server is not None
        system.signer.stop(signal.SIGKILL)
        answers = []
        for _ in range(5):
            stranger = Payer()
            fresh = V1(system.url, stranger, http)
            answers += [fresh.funding_info(), fresh.open(stranger.payment(100_000))]
        answers.append(v1.close(v1.payer.payment(100_000)))
        refused = [answer for answer in answers if answer.status_code >= 500]

        assert len(refused) >= 10
        for answer in refused:
            text = answer.text + answer.reason_phrase
            assert str(tmp_path) not in text
            assert not re.search(r"socket|sock\b|Errno|No such file|Connection refused", text)
            assert answer.headers["Retry-After"]
        numbers = {number for answer in refused for number in re.findall(r"incident ([0-9a-f]{8})", answer.text)}
        assert numbers
        log = system.server.text()
        for number in numbers:
            assert log.count(f"incident={number}") == 1
        assert str(system.state) in "".join(line for line in log.splitlines() if "event=refused" in line)


def test_fault_77_health_has_reasons_for_the_operator_alone(tmp_path: Path) -> None:
    """Without signer and node a monitor without the token reads codes: no path, URL, limit or channel, whatever it sends."""
    sections = {"watcher": "unsigned_minutes = 0"}
    with Node(tmp_path / "node") as node, System(tmp_path / "system", sections=sections, node=node) as system:
        customer = Customer(system, node)
        customer.opened()
        assert system.signer is not None
        system.signer.stop(signal.SIGKILL)
        assert customer.close(OPENING_SAT).status_code == 503
        node.stop()
        told = lambda: {each["kind"] for each in system.manage("GET", "/health").json()["alarms"]}  # noqa: E731
        wait_for(lambda: told() >= {"chain", "signer", "unsigned"}, "all that is missing")
        operators = system.manage("GET", "/health")
        assert str(system.state) in operators.json()["signer"]
        assert str(customer.outpoint) in operators.text
        for headers in ({}, {"Authorization": f"Bearer {system.token[:-1]}"}, {"Authorization": system.token}):
            answer = httpx.get(f"{system.management_url}/health", headers=headers, timeout=30, trust_env=False)
            health = answer.json()

            assert (answer.status_code, health["signer"], health["frozen"]) == (503, "absent", ["chain_unavailable"])
            assert {"kind": "unsigned"} in health["alarms"]
            for inside in (str(tmp_path), str(customer.outpoint), "127.0.0.1", "Errno", "minutes", "can't"):
                assert inside not in answer.text


def test_fault_77_bugs_show_nothing(tmp_path: Path) -> None:
    """Requests of all kinds, well-formed or not, never show a path of the server's disk or a line of its code."""
    with System(tmp_path) as system, httpx.Client(trust_env=False, timeout=30) as http:
        for method in ("GET", "PUT", "POST", "DELETE", "PATCH", "BREW"):
            for where in (
                "/",
                "/v1/fundingInfo?client_pubkey=%00",
                "/v2/funding/1/2/outputs",
                f"/v2/channels/{'0' * 64}/0",
            ):
                with contextlib.suppress(httpx.TransportError):
                    answer = http.request(method, system.url + where, content=b"{")
                    assert not re.search(r"Traceback|\.py|/tmp|/work|/usr|tornado|0x[0-9a-f]{8}", answer.text)


def test_fault_70_strangers_fill_no_log(tmp_path: Path) -> None:
    """However odd the requests of a stranger are, they write less than one line for twenty of them."""
    with System(tmp_path) as system:
        assert system.server is not None
        before, sent = system.server.text().count("\n"), 0
        for _ in range(4):
            for content in [
                *CORPUS.values(),
                *(clear[0] for clear in CLEAR.values()),
                b"\xff" * 100,
                b"GET / HTTP/9.9\r\n\r\n",
            ]:
                with connect(system.url) as connection, contextlib.suppress(OSError):
                    connection.sendall(content)
                    connection.settimeout(0.02)
                    connection.recv(4096)
                sent += 1
        assert system.server.text().count("\n") - before < sent / 20, system.server.text()[-3000:]


def test_fault_70_a_crowd_of_pages_fills_no_log(tmp_path: Path) -> None:
    """More pages than the operator's listener has places, which come and leave, write no traceback and no line each."""
    with System(tmp_path) as system:
        assert system.server is not None
        for _ in range(10):
            with contextlib.ExitStack() as stack:
                for _ in range(40):
                    connection = stack.enter_context(connect(system.management_url))
                    with contextlib.suppress(OSError):
                        connection.sendall(b"GET /channels HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert httpx.get(f"{system.management_url}/health", trust_env=False).status_code == 200
        assert "Traceback" not in system.server.text()
        assert system.server.text().count("\n") < 20
