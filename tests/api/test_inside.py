"""The public port reveals no socket path, URL, limit or exception of the server."""

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
    """The answer of a 500 or 503 to clients has no reason and no number; the operator gets both."""
    kind = PaychanError.table[code]
    names = re.findall(r"{(\w+)", kind.text)
    error = kind(**dict.fromkeys(names, INSIDE))
    answer = refusal(error, quiet_404=False)
    shown = answer.body.decode() + str(answer.reason) + repr(answer.headers)
    if code not in OWN:
        assert not any(word in shown for word in INSIDE.split()), shown
    assert code in shown
    assert not names or INSIDE[:20] in refusal(error, quiet_404=False, to_operator=True).body.decode()


OWN = {"payment_pending", "stream_replaced", "search_too_long"}
"""Codes whose numbers belong to the client, or that only the operator gets."""


def test_fault_77_the_limit_of_unconfirmed_value_stays_inside() -> None:
    """Clients get neither the unconfirmed value nor its limit."""
    answer = refusal(TooMuchUnconfirmed(got_sat=1_234_567, need_sat=7_654_321), quiet_404=False)
    assert not re.search(rb"1234567|7654321", answer.body)


def test_fault_77_a_signer_that_is_away_is_not_described(tmp_path: Path) -> None:
    """Without a signer every route answers 503 with a code and an incident number.

    The log has number and reason once.
    """
    with System(tmp_path) as system, httpx.Client(trust_env=False, timeout=30, verify=False) as http:
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
    """Without signer and node, a monitor without the token gets codes, but no path, URL, limit or channel."""
    sections = {"watcher": "unsigned_minutes = 0"}
    with Node(tmp_path / "node") as node, System(tmp_path / "system", sections=sections, node=node) as system:
        customer = Customer(system, node)
        customer.opened()
        assert system.signer is not None
        system.signer.stop(signal.SIGKILL)
        assert customer.close(OPENING_SAT).status_code == 503
        node.stop()
        alarms = lambda: {each["kind"] for each in system.manage("GET", "/health").json()["alarms"]}  # noqa: E731
        wait_for(lambda: alarms() >= {"chain", "signer", "unsigned"}, "all alarms")
        operators = system.manage("GET", "/health")
        assert str(system.state) in operators.json()["signer"]
        assert str(customer.outpoint) in operators.text
        for headers in ({}, {"Authorization": f"Bearer {system.token[:-1]}"}, {"Authorization": system.token}):
            answer = httpx.get(
                f"{system.management_url}/health", headers=headers, timeout=30, trust_env=False, verify=False
            )
            health = answer.json()

            assert (answer.status_code, health["signer"], health["frozen"]) == (503, "absent", ["chain_unavailable"])
            assert {"kind": "unsigned", "critical": True} in health["alarms"]
            for inside in (str(tmp_path), str(customer.outpoint), "127.0.0.1", "Errno", "minutes", "can't"):
                assert inside not in answer.text


def test_fault_77_bugs_show_nothing(tmp_path: Path) -> None:
    """No request, well-formed or not, makes an answer show a path of the server's disk or a line of its code."""
    with System(tmp_path) as system, httpx.Client(trust_env=False, timeout=30, verify=False) as http:
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


def test_fault_70_unusual_requests_fill_no_log(tmp_path: Path) -> None:
    """Twenty unusual requests cause less than one log line."""
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


def test_fault_70_many_page_connections_fill_no_log(tmp_path: Path) -> None:
    """More page connections than the operator's listener has slots cause no traceback, and no log line each."""
    with System(tmp_path) as system:
        assert system.server is not None
        for _ in range(10):
            with contextlib.ExitStack() as stack:
                for _ in range(40):
                    connection = stack.enter_context(connect(system.management_url))
                    with contextlib.suppress(OSError):
                        connection.sendall(b"GET /channels HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert httpx.get(f"{system.management_url}/health", trust_env=False, verify=False).status_code == 200
        assert "Traceback" not in system.server.text()
        assert system.server.text().count("\n") < 20
