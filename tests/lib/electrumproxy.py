"""A proxy in front of a real Electrum server, which changes answers as the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self, cast

_LONGEST_LINE = 16 * 1024 * 1024


class Refuse(Exception):
    """Raised by `alter`: answer with an error of this code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class ElectrumProxy:
    """Forwards every request, and answers with the result of `alter(method, params, result)`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.alter: Callable[[str, list[Any], Any], Any] = lambda _method, _params, result: result
        self._serving = set[asyncio.Task[None]]()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_LONGEST_LINE)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every connection: Python 3.11's server closes only its listener."""
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._serving.add(task)
        try:
            await self._forward(reader, writer)
        finally:
            self._serving.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked: dict[int, tuple[str, list[Any]]] = {}
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port, limit=_LONGEST_LINE)

        async def forth() -> None:
            while line := await reader.readline():
                request = json.loads(line)
                asked[request["id"]] = (request["method"], request["params"])
                up_writer.write(line)

        async def back() -> None:
            while line := await up_reader.readline():
                answer = json.loads(line)
                if "result" in answer:
                    answer = self._altered(answer, *asked.pop(answer["id"]))
                writer.write(json.dumps(answer).encode() + b"\n")

        both = [asyncio.create_task(forth()), asyncio.create_task(back())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in both:
                direction.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            for each in (writer, up_writer):
                each.close()
                with suppress(OSError, TimeoutError):
                    async with asyncio.timeout(1):
                        await each.wait_closed()
                each.transport.abort()

    def _altered(self, answer: dict[str, Any], method: str, params: list[Any]) -> dict[str, Any]:
        try:
            return {**answer, "result": self.alter(method, params, answer["result"])}
        except Refuse as refusal:
            return {"id": answer["id"], "error": {"code": refusal.code, "message": "made up by the test"}}
