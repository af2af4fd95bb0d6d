"""A settlement that the signer does not sign for some minutes is an alarm and a 503 of `/health`, until it is signed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.functional.test_start import fill, payer
from tests.lib.customer import wait_for
from tests.lib.system import System


def test_fault_63_a_settlement_that_can_not_be_signed_shows_in_health(tmp_path: Path) -> None:
    """While the signer is stopped, an alarm names the channel and the reason and /health is 503; both end with the signature."""
    system = System(tmp_path, sections={"watcher": "interval_seconds = 0.2\nunsigned_minutes = 0"})
    due = payer("due", 5)
    asyncio.run(fill(system.state / "store", [due.channel()]))

    def alarms() -> list[tuple[str, str]]:
        shown = system.manage("GET", "/health").json()["alarms"]
        return [(each["kind"], each["channel"]) for each in shown]

    try:
        system.start_server()
        wait_for(lambda: ("unsigned", str(due.outpoint)) in alarms(), "alarm")
        health = system.manage("GET", "/health")
        assert health.status_code == 503
        assert health.json()["frozen"] == []
        assert any("could not be signed" in each["text"] for each in health.json()["alarms"])
        system.start_signer()
        wait_for(lambda: system.channel(due.outpoint)["status"] == "closed", "settled")
        assert [kind for kind, _ in alarms() if kind == "unsigned"] == []
        assert system.manage("GET", "/health").status_code == 200
    finally:
        system.__exit__(None, None, None)
