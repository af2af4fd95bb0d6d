"""The lines of the log about a part that is away."""

from __future__ import annotations

from structlog.testing import capture_logs

from actors.event_log import EventLog
from actors.observing import PartHealth
from tests.lib.world import until


def away(lines: list[dict[str, object]]) -> list[tuple[object, object]]:
    return [(line["log_level"], line.get("reason")) for line in lines if line["event"] == "a part is not usable"]


async def test_only_a_part_that_stays_away_is_an_error() -> None:
    """A part that is late at a start is no error; once one is, each other reason is said at once."""
    log = EventLog(patience_seconds=0.02)
    with capture_logs() as lines:
        log.observe(PartHealth("signer", "starts"))
        log.observe(PartHealth("signer"))
        log.observe(PartHealth("chain", "starts"))
        log.observe(PartHealth("chain", "syncs"))
        assert away(lines) == []
        await until(lambda: away(lines))
        log.observe(PartHealth("chain", "stopped"))

    assert away(lines) == [("error", "syncs"), ("error", "stopped")]
