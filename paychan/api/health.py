"""What `/health` says: who serves, what is missing, which tasks live, and what needs the operator."""

from __future__ import annotations

from typing import Any

import msgspec

from actors.alarm import Alarm, Kind, about
from paychan.api.service import Service
from paychan.logs import lost_lines
from paychan.protocol.channel import State
from paychan.protocol.errors import StorageFull
from paychan.signing.base import SignerAbsent, SignerRefused


async def health(service: Service) -> tuple[int, dict[str, Any]]:
    """Return status and content; 503 while payments are not accepted, or settlements not signed."""
    try:
        answer = await service.world.signer.health()
        signer, problem = answer.key_mode, answer.problem
    except (SignerAbsent, SignerRefused) as error:
        signer = problem = f"absent: {error}"
    seen = service.world.chain_view
    refusal = service.world.commits.overload()
    frozen = [seen.problem] if seen.problem else []
    frozen += [str(refusal)] if isinstance(refusal, StorageFull) else []
    unsigned = await _unsigned(service)
    content = {
        "network": service.config.network_name,
        "signer": signer,
        "frozen": frozen,
        "chain": msgspec.to_builtins(seen.tip) if seen.tip else {},
        "all_channels_seen": seen.is_whole,
        "channels_in_danger": {str(outpoint): reason for outpoint, reason in seen.in_danger.items()},
        "watcher_last_look": service.watcher.last_look,
        "alarms": [alarm.shown for alarm in (*service.watcher.alarms, *unsigned, *_own_alarms(service, problem))],
        "tasks": msgspec.to_builtins(service.supervisor.tasks),
        "log_lines_lost": lost_lines()[0],
        "awake": service.registry.awake,
    }
    return 503 if frozen or unsigned else 200, content


async def _unsigned(service: Service) -> list[Alarm]:
    """Name the closing channels whose settlement could not be signed for too long."""
    minutes = service.config.watcher.unsigned_minutes
    waiting = service.world.unsigned.longer_than(60 * minutes)
    records = [await service.registry.read(outpoint) for outpoint in waiting]
    text = f"its settlement could not be signed for {minutes} minutes or longer: "
    return [
        about(Kind.UNSIGNED, outpoint, text + reason)
        for (outpoint, reason), record in zip(waiting.items(), records, strict=True)
        if record is not None and record.state is State.CLOSING
    ]


def _own_alarms(service: Service, signer_problem: str) -> list[Alarm]:
    alarms = [Alarm(Kind.SIGNER, signer_problem)] if signer_problem else []
    alarms += [Alarm(Kind.TASK, problem) for problem in service.supervisor.alarms]
    full = service.world.storage_problem()
    if full is not None:
        alarms.append(Alarm(Kind.DISK, str(full)))
    lost, failing = lost_lines()
    if failing:
        alarms.append(Alarm(Kind.LOG, f"the log can't be written; {lost} lines were lost"))
    return alarms
