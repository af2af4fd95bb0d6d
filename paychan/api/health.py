"""What `/health` says: who serves, what is missing, which tasks live, and what needs the operator."""

from __future__ import annotations

from typing import Any

import msgspec

from actors.alarm import Alarm, Kind
from paychan.api.service import Service
from paychan.logs import lost_lines
from paychan.signing.base import SignerAbsent, SignerRefused


async def health(service: Service) -> tuple[int, dict[str, Any]]:
    """Return status and content; 503 while payments are not accepted."""
    try:
        answer = await service.world.signer.health()
        signer, problem = answer.key_mode, answer.problem
    except (SignerAbsent, SignerRefused) as error:
        signer = problem = f"absent: {error}"
    seen = service.world.chain_view
    frozen = [seen.problem] if seen.problem else []
    content = {
        "network": service.config.network_name,
        "signer": signer,
        "frozen": frozen,
        "chain": msgspec.to_builtins(seen.tip) if seen.tip else {},
        "all_channels_seen": seen.is_whole,
        "channels_in_danger": {str(outpoint): reason for outpoint, reason in seen.in_danger.items()},
        "watcher_last_look": service.watcher.last_look,
        "alarms": [alarm.shown for alarm in (*service.watcher.alarms, *_own_alarms(service, problem))],
        "tasks": msgspec.to_builtins(service.supervisor.tasks),
        "log_lines_lost": lost_lines()[0],
        "awake": service.registry.awake,
    }
    return 503 if frozen else 200, content


def _own_alarms(service: Service, signer_problem: str) -> list[Alarm]:
    alarms = [Alarm(Kind.SIGNER, signer_problem)] if signer_problem else []
    alarms += [Alarm(Kind.TASK, problem) for problem in service.supervisor.alarms]
    lost, failing = lost_lines()
    if failing:
        alarms.append(Alarm(Kind.LOG, f"the log can't be written; {lost} lines were lost"))
    return alarms
