"""Readiness: whether signer, chain and disk allow a new channel now. The server gives out an address only then.

Each of them is asked at most once a second; all callers share the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from actors.context import Context
from paychan.chain.base import ChainFailed
from paychan.protocol.errors import ChainUnavailable, PaychanError, SignerUnavailable
from paychan.signer_client.base import SignerAbsent, SignerRefused

_FRESH_SECONDS = 1.0

_CHAIN = "payments are frozen until the server has a reliable view of the chain"
_SIGNER = "it can't sign now"


class Readiness:
    """Asks signer, chain and disk."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._signer = _Shared(self._ask_signer)
        self._chain = _Shared(self._ask_chain)

    async def check(self) -> None:
        """Return if a channel can be opened now. The texts of the errors are for unauthenticated callers.

        Raises:
            ChainUnavailable, SignerUnavailable, StorageFull, MemoryLow: `open` would refuse now.
        """
        self.check_disk()
        if self._context.view().frozen:
            raise ChainUnavailable(reason=_CHAIN)
        for part in (self._chain, self._signer):
            problem = await part.answer()
            if problem is not None:
                raise problem

    def check_disk(self) -> None:
        """Raise `StorageFull` or `MemoryLow` if the free rest is reserved for payments and settlements."""
        problem = self._context.storage_problem() or self._context.memory_problem()
        if problem is not None:
            raise problem

    async def _ask_signer(self) -> PaychanError | None:
        try:
            health = await self._context.signer.health()
        except (SignerAbsent, SignerRefused):
            return SignerUnavailable(reason=_SIGNER)
        return SignerUnavailable(reason=_SIGNER) if health.problem else None

    async def _ask_chain(self) -> PaychanError | None:
        try:
            await self._context.chain.tip()
        except ChainFailed:
            return ChainUnavailable(reason=_CHAIN)
        return None


class _Shared:
    """Runs one request at a time and shares its answer for a second."""

    def __init__(self, ask: Callable[[], Awaitable[PaychanError | None]]) -> None:
        self._ask = ask
        self._asking: asyncio.Task[PaychanError | None] | None = None
        self._fresh_until = float("-inf")

    async def answer(self) -> PaychanError | None:
        loop = asyncio.get_running_loop()
        if self._asking is None or (self._asking.done() and loop.time() >= self._fresh_until):
            self._asking = asyncio.create_task(self._answer())
        return await asyncio.shield(self._asking)

    async def _answer(self) -> PaychanError | None:
        try:
            return await self._ask()
        finally:
            self._fresh_until = asyncio.get_running_loop().time() + _FRESH_SECONDS
