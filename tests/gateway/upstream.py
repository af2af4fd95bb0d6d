"""A seller's service on aiohttp. It is a module of its own: only the test that starts the service loads aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from aiohttp import WSMsgType, web


class Upstream:
    """The seller's service, on a thread of its own. `calls` are the requests that reached it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, dict[str, list[str]], bytes]] = []
        self.fails: set[str] = set()
        """Targets that are answered with 500."""
        self.gate = threading.Event()
        self.gate.set()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.gate.set()
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._ending = asyncio.Event()
        self._ready.set()
        await self._ending.wait()
        await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        kind, _, argument = request.path.partition("/")[2].partition("/")[2].partition("/")
        body = b"" if kind == "upload" else await request.read()
        headers = {name: request.headers.getall(name) for name in request.headers}
        self.calls.append((request.method, request.raw_path, headers, body))
        while not self.gate.is_set():  # noqa: ASYNC110 - another thread opens it
            await asyncio.sleep(0.01)
        if request.raw_path in self.fails:
            return web.Response(status=500)
        work = getattr(self, f"_{kind}", None)
        if work is not None:
            return await work(request, argument)
        answer = {"path": request.raw_path, "method": request.method, "body": body.decode("latin1")}
        return web.json_response(answer, headers={"X-Shop": "yes", "Payment-Receipt": "forged"})

    async def _upload(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
        return web.json_response({"size": size})

    async def _status(self, _request: web.BaseRequest, argument: str) -> web.StreamResponse:
        return web.Response(status=int(argument), text="as asked")

    async def _hang(self, _request: web.BaseRequest, _: str) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async def _drop(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        """End the connection before the head, or in the middle of the body."""
        response = web.StreamResponse(headers={"Content-Length": "100000"})
        if argument == "body":
            await response.prepare(request)
            await response.write(b"a part of it")
            await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.close()
        return response

    async def _garbage(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"this is no HTTP\r\n\r\n")
        request.transport.close()
        return web.Response()

    async def _price(self, _request: web.BaseRequest, argument: str) -> web.StreamResponse:
        return web.Response(text="work", headers={"X-Paychan-Price": argument})

    async def _big(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(int(argument)):
                await response.write(bytes(1_000_000))
        return response

    async def _sse(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for number in range(int(argument)):
                await response.write(b"data: %d\n\n" % number)
        return response

    async def _drip(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        """Send a number of bytes, one each half second."""
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(int(argument)):
                await response.write(b"x")
                await asyncio.sleep(0.5)
        return response

    async def _lines(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for number in range(int(argument)):
                await response.write(b"%d\n" % number)
        return response

    async def _ws(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=["chat"])
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                for number in range(int(argument or 1)):
                    await socket.send_str(f"{number} {message.data}")
        return socket
