"""The same seller's program in three frameworks, with a handler for each kind of price and each way to fail."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from paychan.sell import Request, charge, priced, sold
from tests.sell.shop import serve_asgi, serve_tornado, serve_wsgi


class Controls:
    """Switches that a test turns while the program runs."""

    def __init__(self) -> None:
        self.price_sat = 25
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.calls = 0

    def price(self, request: Request) -> int:
        """Return the price of `/by`: that of the test for each unit of `n`."""
        return self.price_sat * int(request.query.get("n", ["1"])[0])

    def enter(self) -> None:
        self.calls += 1
        self.entered.release()


def shown(headers: Any) -> dict[str, Any]:
    """Return what a handler sees."""
    names = sorted(name.lower() for name in headers if name.lower() not in ("host", "accept", "accept-encoding"))
    found = sold()
    return {"headers": names, "channel": found.channel, "charged": found.charged_sat, "credit": found.credit_sat}


@contextmanager
def starlette(controls: Controls, merchant: str, **settings: Any) -> Iterator[str]:
    """Serve the program by Starlette; `/slow` and `/fail` are no coroutine functions."""
    from starlette.applications import Starlette
    from starlette.requests import Request as Asked
    from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket

    from paychan.sell.asgi import Paywall

    @priced(25)
    async def tile(asked: Asked) -> Any:
        controls.calls += 1
        assert asked.scope["paychan"].charged_sat == 25
        return JSONResponse(shown(asked.headers), headers={"Payment-Receipt": "forged", "Cache-Control": "public"})

    @priced(25)
    def fail(_: Asked) -> Any:
        raise _Broken

    @priced(25)
    async def status(asked: Asked) -> Any:
        return PlainTextResponse("as asked", int(asked.path_params["code"]))

    @priced(ceiling=500, unit="token")
    async def chat(_: Asked) -> Any:
        charge(37)
        return PlainTextResponse("words")

    @priced(ceiling=500)
    async def told(asked: Asked) -> Any:
        return PlainTextResponse("work", headers={"Settlement-Overrides": asked.query_params["say"]})

    @priced(25)
    async def echo(asked: Asked) -> Any:
        return PlainTextResponse(await asked.body())

    @priced(controls.price)
    async def by(_: Asked) -> Any:
        return PlainTextResponse("by")

    @priced(25)
    def slow(_: Asked) -> Any:
        controls.enter()
        controls.gate.wait(30)
        return PlainTextResponse("slow")

    @priced(25)
    async def stream(_: Asked) -> Any:
        async def parts() -> Any:
            yield b"first"
            while not controls.gate.is_set():  # noqa: ASYNC110 - another thread opens it
                await asyncio.sleep(0.01)
            yield b"second"

        return StreamingResponse(parts())

    async def free(asked: Asked) -> Any:
        return JSONResponse(shown(asked.headers))

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(sorted(websocket.headers.keys()))
        await websocket.close()

    handlers = (tile, fail, chat, told, by, slow, stream, free)
    routes: list[Any] = [Route(f"/{handler.__name__}", handler) for handler in handlers]
    routes += [Route("/status/{code}", status), Route("/echo", echo, methods=["POST"]), WebSocketRoute("/ws", socket)]
    application = Starlette(routes=routes)
    application.add_middleware(Paywall, merchant=merchant, **settings)  # type: ignore[arg-type] # as its page says
    with serve_asgi(application) as url:
        yield url


@contextmanager
def flask(controls: Controls, merchant: str, **settings: Any) -> Iterator[str]:
    """Serve the program by Flask."""
    from flask import Flask, Response, request

    from paychan.sell.wsgi import Paywall

    app = Flask("seller")
    app.logger.disabled = True
    wall = Paywall(app.wsgi_app, merchant, **settings)
    app.wsgi_app = wall  # type: ignore[method-assign]

    @app.get("/tile")
    @priced(25)
    def tile() -> Any:
        controls.calls += 1
        assert request.environ["paychan"].charged_sat == 25
        names = [name for name, _ in request.headers.items()]
        return shown(names), 200, {"Payment-Receipt": "forged", "Cache-Control": "public"}

    @app.get("/fail")
    @priced(25)
    def fail() -> Any:
        raise _Broken

    @app.get("/status/<int:code>")
    @priced(25)
    def status(code: int) -> Any:
        return "as asked", code

    @app.get("/chat")
    @priced(ceiling=500, unit="token")
    def chat() -> Any:
        charge(37)
        return "words"

    @app.get("/told")
    @priced(ceiling=500)
    def told() -> Any:
        return "work", 200, {"Settlement-Overrides": request.args["say"]}

    @app.post("/echo")
    @priced(25)
    def echo() -> Any:
        return request.get_data()

    @app.get("/by")
    @priced(controls.price)
    def by() -> Any:
        return "by"

    @app.get("/slow")
    @priced(25)
    def slow() -> Any:
        controls.enter()
        controls.gate.wait(30)
        return "slow"

    @app.get("/stream")
    @priced(25)
    def stream() -> Any:
        def parts() -> Iterator[bytes]:
            yield b"first"
            controls.gate.wait(30)
            yield b"second"

        return Response(parts())

    @app.get("/free")
    def free() -> Any:
        return shown([name for name, _ in request.headers.items()])

    with closing(wall), serve_wsgi(app) as url:
        yield url


@contextmanager
def tornado(controls: Controls, merchant: str, **settings: Any) -> Iterator[str]:
    """Serve the program by Tornado."""
    from tornado.web import Application, RequestHandler

    from paychan.sell.tornado import Paywall

    wall = Paywall(merchant, **settings)

    def handler(price: Any, method: Callable[..., Any], verb: str = "get") -> type[RequestHandler]:
        work = method if price is None else wall.priced(**price)(method)
        return type(method.__name__, (RequestHandler,), {verb: work, "log_exception": lambda *_: None})

    def tile(self: Any) -> None:
        controls.calls += 1
        assert self.paychan.charged_sat == 25
        self.set_header("Payment-Receipt", "forged")
        self.set_header("Cache-Control", "public")
        self.finish(shown(self.request.headers))

    async def fail(_: Any) -> None:
        raise _Broken

    async def status(self: Any, code: str) -> None:
        self.set_status(int(code))

    async def chat(self: Any) -> None:
        charge(37)
        self.write("words")

    async def told(self: Any) -> None:
        self.set_header("Settlement-Overrides", self.get_argument("say"))
        self.write("work")

    async def echo(self: Any) -> None:
        self.write(self.request.body)

    async def by(self: Any) -> None:
        self.write("by")

    async def slow(self: Any) -> None:
        controls.enter()
        while not controls.gate.is_set():  # noqa: ASYNC110 - another thread opens it
            await asyncio.sleep(0.01)
        self.write("slow")

    async def stream(self: Any) -> None:
        self.write("first")
        await self.flush()
        while not controls.gate.is_set():  # noqa: ASYNC110 - another thread opens it
            await asyncio.sleep(0.01)
        self.write("second")

    def free(self: Any) -> None:
        names = sorted(name.lower() for name in self.request.headers)
        self.write({"headers": names, "channel": "", "charged": 0, "credit": 0})

    fixed, ceiling = {"price": 25}, {"ceiling": 500}
    routes = [
        ("/tile", handler(fixed, tile)),
        ("/fail", handler(fixed, fail)),
        (r"/status/(\d+)", handler(fixed, status)),
        ("/chat", handler({**ceiling, "unit": "token"}, chat)),
        ("/told", handler(ceiling, told)),
        ("/echo", handler(fixed, echo, "post")),
        ("/by", handler({"price": controls.price}, by)),
        ("/slow", handler(fixed, slow)),
        ("/stream", handler(fixed, stream)),
        ("/free", handler(None, free)),
    ]
    with serve_tornado(Application(routes, log_function=lambda _: None), wall) as url:
        yield url


class _Broken(Exception):
    """The seller's program has a fault."""


PROGRAMS = {"starlette": starlette, "flask": flask, "tornado": tornado}


def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
