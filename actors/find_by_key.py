"""Search for a client's channel by its key, for the operator: the store has no index of keys, nothing else needs one.

A search reads all channels, the open ones first. One search runs at a time, in small pages with longer pauses between
them, so that payments keep the store and the processor; it ends after a bounded time. The finder remembers its results:
a repeated search reads one record.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from time import monotonic

from paychan.protocol.channel import Channel, State
from paychan.protocol.errors import SearchTooLong
from paychan.protocol.types import OutPoint
from paychan.store.base import Store

_PAGE = 200
_REST = 4
"""Length of the pause after each page, as a multiple of the time that the page took."""
_MOST_SECONDS = 20.0
_REMEMBERED = 1000


class Finder:
    """Runs one search at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._turn = asyncio.Lock()
        self._found: OrderedDict[bytes, OutPoint] = OrderedDict()

    async def find(self, client_key: bytes) -> Channel | None:
        """Return a client's channel, preferably an open one; None if it has none.

        Raises:
            SearchTooLong: the store has too many channels to read in the time limit.
        """
        async with self._turn:
            known = self._found.get(client_key)
            channel = None if known is None else await self._store.get(known)
            if channel is not None and channel.state is State.OPEN:
                return channel
            found = await self._search(client_key)
        if found is not None:
            self._found[client_key] = found.outpoint
            if len(self._found) > _REMEMBERED:
                self._found.popitem(last=False)
        return found

    async def _search(self, client_key: bytes) -> Channel | None:
        ends, looked_at = monotonic() + _MOST_SECONDS, 0
        for state in State:
            after: tuple[int, OutPoint] | None = None
            while True:
                begun = monotonic()
                page = await self._store.scan(state, after=after, limit=_PAGE)
                if not page:
                    break
                looked_at += len(page)
                for channel in page:
                    if channel.terms.client_key == client_key:
                        return channel
                after = (page[-1].terms.expiry.lock_time, page[-1].outpoint)
                if monotonic() > ends:
                    raise SearchTooLong(looked_at=looked_at)
                await asyncio.sleep(_REST * (monotonic() - begun))
        return None
