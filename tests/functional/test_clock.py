"""A machine with a wrong clock, on a real node: the server process itself reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lib.customer import OPENING_SAT, Customer, code, wait_for
from tests.lib.node import Node
from tests.lib.system import System

HOUR, DAY = 3_600, 86_400

_WRONG = """
import time
_right = time.time
def _wrong():
    try:
        return _right() + int(open({offset!r}).read() or 0)
    except OSError:
        return _right()
time.time = _wrong
"""


@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("ahead", [20 * HOUR, 7 * DAY, 30 * DAY])
def test_fault_06_a_clock_that_is_ahead_closes_no_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int, at_start: bool
) -> None:
    """Payments stop, the alarm names the clock, nothing is published; once the clock is right, the payer continues."""
    offset = tmp_path / "offset"
    (tmp_path / "sitecustomize.py").write_text(_WRONG.format(offset=str(offset)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Node(tmp_path / "node") as node:
        system = System(tmp_path / "system", node=node)
        text = system.server_file.read_text().replace(
            "stale_tip_minutes = 0\n", ""
        )  # the default, as on all networks but regtest
        system.server_file.write_text(text)
        with system:
            see(system, node, offset, ahead, at_start=at_start)


def health(system: System) -> dict[str, Any]:
    output: dict[str, Any] = system.manage("GET", "/health").json()
    return output


def see(system: System, node: Node, offset: Path, ahead: int, *, at_start: bool) -> None:
    """Open a channel, set a wrong clock, then the right one again."""
    customer = Customer(system, node)
    customer.opened()
    offset.write_text(str(ahead))
    if at_start:
        system.restart_server()
    wait_for(lambda: [alarm["kind"] for alarm in health(system)["alarms"]] == ["clock"], "one alarm, of the clock")
    wait_for(
        lambda: "the newest block" in "".join(health(system)["frozen"]), "frozen, at the scan after the alarm at most"
    )
    assert system.manage("GET", "/health").status_code == 503
    assert code(customer.pay(OPENING_SAT + 1)) == (503, "chain_unavailable")
    seen = health(system)["watcher_last_look"]
    wait_for(lambda: health(system)["watcher_last_look"] > seen + 1, "more looks")
    assert customer.record["status"] == "open"
    assert node.rpc("getrawmempool") == []

    offset.write_text("0")
    wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code == 200, "paying again")
    wait_for(lambda: health(system)["alarms"] == [], "no alarm")
