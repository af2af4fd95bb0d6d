"""The long-lived tasks of a server, and its start while some parts are not available.

Node and signer may start in any order, even hours later. Until then the server answers 503 to requests that need them,
and settles the channels that it can. When one becomes available, a scan starts at once. The first contact with each
part shows whether the configuration is right: another network, or limits that contradict the server's, end the process,
because waiting does not help. If a part is later replaced by one that does not fit, the server refuses to use it and
keeps running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic

import structlog

from paychan.api.service import Service
from paychan.callback.outbox import OUTBOX_PATIENCE_SECONDS
from paychan.chain.base import ChainFailed, WrongNetwork
from paychan.parts import StartError
from paychan.signer_client.base import SignerAbsent, SignerRefused, SignerUnfit
from paychan.supervisor import Supervised

log = structlog.get_logger("server")

_FIRST_LOOK_SECONDS = 5.0
"""Longest time for which the first scan, which begins to settle overdue channels, keeps the ports closed."""

_LOOK_SECONDS = 600.0
"""A scan of many channels with a slow signer may take minutes; a longer one raises an alarm."""

_FIRST_CONTACT_SECONDS, _CONTACT_SECONDS = 0.1, 1.0
"""Pause between two attempts, while the ports are closed and afterwards."""

_NOT_LOOKED_YET = "the server has just started and has not yet read the chain"


class Work:
    """The watcher and the other tasks that run as long as the process; they start with the object."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._wrong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._missing = {"signer", "chain"}
        self._tasks: list[Supervised] = []
        self._watching: Supervised | None = None
        self._first_end = monotonic() + _FIRST_LOOK_SECONDS
        service.context.chain_view.problem = _NOT_LOOKED_YET
        self._watch()
        contacts: tuple[tuple[str, Callable[[], Awaitable[object]]], ...] = (
            ("signer", service.context.signer.health),
            ("chain", service.context.chain.check),
        )
        for name, ask in contacts:
            self._run(f"{name} contact", partial(self._contact, name, ask), endless=False)
        self._run("missing channels", service.missing.run)
        if service.outbox is not None:
            outbox = service.supervisor.run("messages", service.outbox.run, patience_seconds=OUTBOX_PATIENCE_SECONDS)
            self._tasks.append(outbox)
        if service.settling is not None and service.settling.showing is not None:
            self._run("payments shown", service.settling.showing.run)

    async def first_look(self) -> None:
        """Let overdue channels begin to close before the ports open; an unavailable part delays this only briefly.

        Raises:
            StartError: the configuration is wrong.
        """
        while monotonic() < self._first_end and (self._missing or not self._has_looked):
            if self._wrong.done():
                break
            await asyncio.sleep(0.01)
        if self._wrong.done():
            self._wrong.result()
        if self._missing:
            log.warning("serving although parts are missing", missing=sorted(self._missing))

    @property
    def _has_looked(self) -> bool:
        return self._watching is None or bool(self._watching.last_success)

    @property
    def wrong(self) -> asyncio.Future[None]:
        """Gets a `StartError` when a first contact shows that the configuration is wrong, and else stays pending."""
        return self._wrong

    async def stop(self) -> None:
        """Stop all tasks, the youngest first."""
        for task in reversed(self._tasks):
            await task.stop()

    def _run(self, name: str, work: Callable[[Supervised], Awaitable[None]], *, endless: bool = True) -> None:
        self._tasks.append(self._service.supervisor.run(name, work, endless=endless))  # type: ignore[arg-type]

    def _watch(self) -> None:
        """Start the watcher, in a process that settles."""
        service = self._service
        if service.settling is None:
            return
        patience = 2 * service.config.watcher.interval_seconds + _LOOK_SECONDS
        self._watching = service.supervisor.run("watcher", service.settling.watcher.run, patience_seconds=patience)
        self._tasks.insert(0, self._watching)

    async def _contact(self, name: str, ask: Callable[[], Awaitable[object]], task: Supervised) -> None:
        """Call the part until it answers; then scan at once for the work that waited for it."""
        reason, service = "", self._service
        while True:
            try:
                await ask()
                break
            except (SignerUnfit, WrongNetwork) as error:
                if not self._wrong.done():
                    self._wrong.set_exception(StartError(str(error)))
                return
            except (SignerAbsent, SignerRefused, ChainFailed) as error:
                if not reason:
                    log.warning("waiting for a part", part=name, reason=str(error))
                reason = reason or str(error)
                service.context.observers.report_health(name, reason)
            await asyncio.sleep(_FIRST_CONTACT_SECONDS if monotonic() < self._first_end else _CONTACT_SECONDS)
        self._missing.discard(name)
        task.succeeded()
        if reason:
            service.context.observers.report_health(name)
            if self._watching is not None:
                await self._watching.stop()
                self._tasks.remove(self._watching)
            self._watch()
