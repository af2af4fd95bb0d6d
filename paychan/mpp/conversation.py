"""One paid request of the SDK as an exchange of the wallet, which runs in a task of its own.

`paychan.client.paying.exchange` decides which payment to send. The SDK reports each answer, and gets the next payment. The
channel stays locked from the payment to its answer, or until `Conversation.end`.
"""

from __future__ import annotations

import asyncio
from typing import TypeAlias

from paychan.client.paying.demands import Headers
from paychan.client.paying.drive import drive_async
from paychan.client.paying.exchange import Answer, Bill, Exchange, Purse, exchange
from paychan.client.paying.paying import Request

Said: TypeAlias = "Headers | Bill | None"


class Conversation:
    """The exchange of one request. It begins on the running event loop."""

    def __init__(self, purse: Purse, request: Request) -> None:
        self._told: asyncio.Queue[Answer] = asyncio.Queue()
        self._said: asyncio.Queue[Said | Exception] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._run(exchange(purse, request)))

    async def tell(self, answer: Answer) -> Said:
        """Tell an answer: the 402 at first, then the answer to each payment.

        Returns:
            The headers of the payment to send next; or, at the end, the bill. None: nothing was to be paid, or `end` came first.

        Raises:
            ClientError: as `exchange`; the conversation has ended.
        """
        if self._task.done() and self._said.empty():
            return None
        self._told.put_nowait(answer)
        said = await self._said.get()
        if isinstance(said, Exception):
            raise said
        return said

    def end(self) -> None:
        """Unlock the channel. A payment without an answer stays open in the log: the same request sends it again."""
        self._task.cancel()

    async def _run(self, flow: Exchange) -> None:
        try:
            _, bill = await drive_async(flow, self._send, _keep)
        except asyncio.CancelledError:
            self._said.put_nowait(None)
            raise
        except Exception as error:  # noqa: BLE001 - `tell` raises it in the task of the request
            self._said.put_nowait(error)
        else:
            self._said.put_nowait(bill)

    async def _send(self, headers: Headers) -> tuple[Answer, Answer]:
        if headers:
            self._said.put_nowait(headers)
        answer = await self._told.get()
        return answer, answer


async def _keep(_: Answer) -> None:
    """Leave a response to the SDK, which closes it."""
