"""A proxy in front of a real Electrum server, which changes answers as the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

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

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_LONGEST_LINE)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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

        with suppress(OSError):
            await asyncio.wait(
                [asyncio.create_task(forth()), asyncio.create_task(back())], return_when=asyncio.FIRST_COMPLETED
            )
        for each in (writer, up_writer):
            each.close()

    def _altered(self, answer: dict[str, Any], method: str, params: list[Any]) -> dict[str, Any]:
        try:
            return {**answer, "result": self.alter(method, params, answer["result"])}
        except Refuse as refusal:
            return {"id": answer["id"], "error": {"code": refusal.code, "message": "made up by the test"}}
