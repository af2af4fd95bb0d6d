"""The content of `/health`: a status in one word, network, signer, chain, why payments are refused, alarms, and tasks."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from actors.alarm import Alarm, Kind, about
from paychan.api.service import Service
from paychan.logs import lost_lines
from paychan.protocol.channel import State
from paychan.protocol.errors import ChainUnavailable, MemoryLow, StorageFull
from paychan.shared.wording import moment
from paychan.signer_client.base import SignerAbsent, SignerRefused
from paychan.store.backup import create as backup
from paychan.store.backup.rebuild import set_aside

_MOST_SHOWN = 20
"""Most alarms about refused messages: one wrong program of the operator's can cause thousands."""


async def health(service: Service, *, to_operator: bool) -> tuple[int, dict[str, Any]]:
    """Return HTTP status and content; 503 while requests are refused, signing fails, or the store is not whole.

    Reasons name sockets, URLs, limits and channels, so only the operator gets them. Other callers, such as a monitor
    without the token, get codes, kinds of alarms, and times.
    """
    try:
        answer = await service.context.signer.health()
        signer, absent, problem, identity = answer.key_mode, "", answer.problem, answer.identity_key.hex()
    except (SignerAbsent, SignerRefused) as error:
        signer, absent, identity = "absent", f": {error}", ""
        problem = signer + absent
    seen, frozen, unsigned = service.context.chain_view, _frozen(service), await _unsigned(service)
    damaged = store_alarms(service)
    watcher = service.settling.watcher if service.settling else None
    alarms = (*damaged, *(watcher.alarms if watcher else ()), *unsigned, *_own_alarms(service, problem))
    tasks: list[dict[str, Any]] = msgspec.to_builtins(service.supervisor.tasks)
    content = {
        "status": _status(alarms, is_frozen=bool(frozen)),
        "network": service.config.network_name,
        "signer": signer,
        "identity": identity,
        "frozen": list(frozen),
        "chain": msgspec.to_builtins(seen.tip) if seen.tip else {},
        "all_channels_seen": seen.is_whole,
        "watcher_last_look": watcher.last_scan if watcher else None,
        "alarms": [{"kind": alarm.kind.value, "critical": _is_critical(alarm, frozen)} for alarm in alarms],
        "tasks": [{key: value for key, value in task.items() if key != "problem"} for task in tasks],
    }
    if to_operator:
        content |= {
            "signer": signer + absent,
            "frozen": list(frozen.values()),
            "channels_in_danger": {str(outpoint): reason for outpoint, reason in seen.in_danger.items()},
            "alarms": [alarm.shown | {"critical": _is_critical(alarm, frozen)} for alarm in alarms],
            "tasks": tasks,
            "disk": _disk(service),
            "backup": await _backup(service),
            "log_lines_lost": lost_lines()[0],
            "awake": service.registry.awake,
        }
    refuses = frozen or service.memory.new_work()
    return 503 if refuses or unsigned or damaged else 200, content


def _status(alarms: Sequence[Alarm], *, is_frozen: bool) -> str:
    """Return "critical" while payments are refused or coins are in danger, "warning" for other alarms, else "ok"."""
    if is_frozen or any(alarm.kind.is_critical for alarm in alarms):
        return "critical"
    return "warning" if alarms else "ok"


def _is_critical(alarm: Alarm, frozen: Mapping[str, str]) -> bool:
    """Say whether an alarm is critical: by its kind, or because this shortage of disk or memory stops payments now."""
    shortage = {Kind.DISK: StorageFull.code, Kind.MEMORY: MemoryLow.code}.get(alarm.kind)
    return alarm.kind.is_critical or shortage in frozen


def _disk(service: Service) -> dict[str, int]:
    """Return the free bytes of the store's disk, and those that are reserved for settling."""
    free = shutil.disk_usage(service.config.store_path).free
    return {"free_bytes": free, "reserve_bytes": service.config.store.reserve_mb * 1_000_000}


async def _backup(service: Service) -> dict[str, Any]:
    """Return directory, file, Unix time and channels of the newest backup in the backup directory; None for each without one."""
    found = await asyncio.to_thread(backup.newest, service.config.backup_dir, service.config.network_name)
    directory = str(service.config.backup_dir)
    if found is None:
        return {"directory": directory, "path": None, "created_at": None, "channels": None}
    path, manifest = found
    return {"directory": directory, "path": str(path), "created_at": manifest.created_at, "channels": manifest.records}


def _frozen(service: Service) -> dict[str, str]:
    """Return why payments are not accepted: the codes that clients get, with their reasons."""
    reasons = {ChainUnavailable.code: service.context.chain_view.problem} if service.context.chain_view.problem else {}
    refusal = service.context.commits.overload()
    return reasons | ({refusal.code: str(refusal)} if isinstance(refusal, StorageFull | MemoryLow) else {})


async def _unsigned(service: Service) -> list[Alarm]:
    """Return an alarm for each closing channel whose settlement could not be signed for `watcher.unsigned_minutes`."""
    minutes = service.config.watcher.unsigned_minutes
    waiting = service.context.unsigned.longer_than(60 * minutes)
    records = [await service.registry.read_readable(outpoint) for outpoint in waiting]
    text = f"its settlement could not be signed for {minutes} minutes or longer: "
    return [
        about(Kind.UNSIGNED, outpoint, text + reason)
        for (outpoint, reason), record in zip(waiting.items(), records, strict=True)
        if record is not None and record.state is State.CLOSING
    ]


def store_alarms(service: Service) -> list[Alarm]:
    """Return the alarms about records that can't be read, or were lost."""
    damage, found = service.context.store.damage, list[Alarm]()
    if damage.text:
        first = next(iter(damage.records), None)
        text = (
            f"{damage.text}. All other channels are settled. Restart the server: it then rebuilds the store from all "
            "records that can be read; `paychan backup salvage FILE` does so by hand while the server is stopped"
        )
        found.append(Alarm(Kind.STORE, text, "" if first is None else str(first)))
    found += [
        Alarm(
            Kind.STORE,
            f"the store was damaged and is rebuilt from what could be read ({summary}). The damaged files are in {aside}, "
            "with a list of the losses in its file SALVAGED; when you have read it, move that directory away to end this "
            "alarm",
        )
        for aside, summary in set_aside(service.config.store_path)
    ]
    return found + service.missing.alarms


def _own_alarms(service: Service, signer_problem: str) -> list[Alarm]:
    alarms = [Alarm(Kind.SIGNER, signer_problem)] if signer_problem else []
    alarms += [Alarm(Kind.TASK, problem) for problem in service.supervisor.alarms]
    full = service.context.storage_problem()
    if full is not None:
        alarms.append(Alarm(Kind.DISK, str(full)))
    low = service.memory.new_work()
    if low is not None:
        alarms.append(Alarm(Kind.MEMORY, str(low)))
    alarms += _silence(service)
    lost, failing = lost_lines()
    if failing:
        alarms.append(Alarm(Kind.LOG, f"the log can't be written; {lost} lines were lost"))
    return alarms


def _silence(service: Service) -> list[Alarm]:
    """Return the alarms about an application that does not answer.

    An unanswered question shows at once, since its payer has got 503; messages after `callback.alarm_minutes`, since they wait.
    """
    application, limit = service.context.application, 60 * service.config.callback.alarm_minutes
    if application is None:
        return []
    alarms, to_questions, to_messages = list[Alarm](), application.silence, application.silence_to_messages
    if to_questions is not None:
        text = (
            f"no question about a payment has got a valid answer of the application since {moment(to_questions.since)} "
            f"({to_questions.reason}). Payers get 503 payment_pending; the next valid answer ends this alarm"
        )
        alarms.append(Alarm(Kind.APPLICATION, text))
    if to_messages is not None and service.context.clock() - to_messages.since >= limit:
        text = f"the application has acknowledged no message since {moment(to_messages.since)} ({to_messages.reason}). Messages wait in the store"
        return [*alarms, Alarm(Kind.APPLICATION, text)]
    refused = service.outbox.refused_for(limit) if service.outbox is not None else {}
    return alarms + [
        about(Kind.APPLICATION, outpoint, f"the application refuses a message about this channel: {reason}")
        for outpoint, reason in list(refused.items())[:_MOST_SHOWN]
    ]
