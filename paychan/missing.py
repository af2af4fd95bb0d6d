"""Channels that the signer was shown and the store does not have: an empty or shortened store starts without an error.

A disk that is not mounted, a deleted log or an old copy of the store look like a good store with fewer channels, and
the store itself can not show the difference. The signer remembers each channel whose payments it was shown. So at each start, and then
once an hour, the server asks for those that have not expired, and looks each of them up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from actors.alarm import Alarm, Kind
from actors.context import Context
from paychan.protocol.errors import DamagedRecord
from paychan.protocol.types import OutPoint
from paychan.signer_client.base import SignerAbsent, SignerRefused
from paychan.supervisor import Supervised

log = structlog.get_logger("store")

_LIST, _ACCEPTED = "store.missing", "store.missing.accepted"
"""Files in the state directory: the missing channels, a line each; the same after the operator has renamed it."""

_INTERVAL_SECONDS = 3600.0
_RETRY_SECONDS = 1.0
_PAUSE_SECONDS = 0.1
"""Pause between two pages, so that settlements come first in the signer."""


class MissingChannels:
    """Compares the store with the signer."""

    def __init__(self, context: Context, state_dir: Path) -> None:
        self._context = context
        self._state_dir = state_dir
        self._found: tuple[OutPoint, ...] = ()

    async def run(self, task: Supervised) -> None:
        """Compare now, and then regularly. A signer that is not available is asked again soon."""
        while True:
            pause = _INTERVAL_SECONDS
            try:
                self._note(tuple([outpoint async for outpoint in self._shown() if not await self._has(outpoint)]))
                task.succeeded()
            except SignerAbsent:
                pause = _RETRY_SECONDS
            except SignerRefused as error:
                log.warning("the signer does not tell which channels it was shown", reason=str(error))
            await asyncio.sleep(pause)

    async def _shown(self) -> AsyncIterator[OutPoint]:
        after: OutPoint | None = None
        while True:
            outpoints, after = await self._context.signer.shown(self._context.now(), after)
            for outpoint in outpoints:
                yield outpoint
            if after is None:
                return
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _has(self, outpoint: OutPoint) -> bool:
        try:
            return await self._context.store.get(outpoint) is not None
        except DamagedRecord:  # it has an alarm of its own
            return True

    def _note(self, found: tuple[OutPoint, ...]) -> None:
        self._found = found
        missing = self._not_accepted()
        if not missing:
            return
        log.error("the store lacks channels that the signer was shown", count=len(missing), first=missing[0])
        try:
            (self._state_dir / _LIST).write_text("".join(f"{outpoint}\n" for outpoint in map(str, found)))
        except OSError as error:
            log.error("the list of missing channels can't be written", reason=error.strerror)  # noqa: TRY400

    def _not_accepted(self) -> list[str]:
        if not self._found:
            return []
        try:
            accepted = set((self._state_dir / _ACCEPTED).read_text(errors="replace").split())
        except OSError:
            accepted = set()
        return [outpoint for outpoint in map(str, self._found) if outpoint not in accepted]

    @property
    def alarms(self) -> list[Alarm]:
        """One alarm about all missing channels, until the operator accepts the list."""
        missing = self._not_accepted()
        if not missing:
            return []
        listed = self._state_dir / _LIST
        text = (
            f"the signer was shown channels that the store does not have: {len(missing):,}, the first is {missing[0]}, "
            f"all are in {listed}. Stop the server; if the store's disk is not mounted, mount it, else restore the newest "
            f"backup. If the store is new on purpose, or nothing better exists, rename that file to {_ACCEPTED}"
        )
        return [Alarm(Kind.STORE, text, missing[0])]
