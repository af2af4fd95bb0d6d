"""WSGI alone: generators, `write`, coroutine handlers, and a server that closes an answer early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from paychan.sell import priced, sold
from paychan.sell.wsgi import Paywall
from tests.sell.shop import Customer, Shop, raw, serve_wsgi, settled

HEAD = ("200 OK", [("Content-Type", "text/plain")])


def lazily(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
    """Begin the answer with the first part, after empty ones."""
    yield b""
    if environ["PATH_INFO"] == "/fail":
        msg = "before the first byte"
        raise RuntimeError(msg)
    start_response(*HEAD)
    yield b"a"
    yield b"b"


def by_write(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Write the first part by the function of old programs."""
    start_response(*HEAD)(b"a")
    return [b"b"]


def empty(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Answer without a body."""
    start_response("204 No Content", [])
    return []


@pytest.mark.parametrize(("app", "body"), [(lazily, "ab"), (by_write, "ab"), (empty, "")])
def test_every_form_of_an_answer_is_paid(shop: Shop, customer: Customer, app: Callable[..., Any], body: str) -> None:
    """The charge is in the head, and final when the first byte has left."""
    with closing(Paywall(app, shop.socket, price=25)) as wall, serve_wsgi(wall) as url:
        answer = customer.get(url + "/")
        assert (answer.text, settled(answer).charged_sat) == (body, 25)
        assert customer.sums() == (25, 25)
        unpaid = raw(url + "/", method="HEAD")
        assert (unpaid.status_code, unpaid.content) == (402, b"")


@pytest.mark.parametrize("app", [lazily, by_write])
def test_an_answer_that_can_not_be_sent_is_credit(shop: Shop, customer: Customer, app: Callable[..., Any]) -> None:
    """A server closes the answer instead of asking for its second part: the payer was gone."""
    with closing(Paywall(app, shop.socket, price=25)) as wall, serve_wsgi(wall) as url:
        headers = customer.headers(raw(url + "/x"))
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/x",
            "HTTP_HOST": url.removeprefix("http://"),
            "wsgi.url_scheme": "http",
            "HTTP_PAYMENT_SIGNATURE": headers["PAYMENT-SIGNATURE"],
        }
        parts = wall(environ, lambda *_: None)
        assert next(iter(parts))
        assert customer.sums() == (25, 25)
        parts.close()  # type: ignore[attr-defined] # PEP 3333: "the server must call that method"
        assert customer.sums() == (25, 0)


def test_an_error_before_the_first_byte_is_credit(shop: Shop, customer: Customer, capsys: Any) -> None:
    """A generator that raises has delivered nothing."""
    with closing(Paywall(lazily, shop.socket, price=25)) as wall, serve_wsgi(wall) as url:
        assert customer.get(url + "/fail").status_code == 500
        assert customer.sums() == (25, 0)


def test_a_coroutine_handler_of_flask_is_paid(shop: Shop, customer: Customer) -> None:
    """Flask runs it on an event loop of its own."""
    from flask import Flask

    app = Flask("coroutines")
    wall = Paywall(app.wsgi_app, shop.socket)
    app.wsgi_app = wall  # type: ignore[method-assign]

    @app.get("/")
    @priced(25)
    async def handler() -> str:
        return str(sold().charged_sat)

    with closing(wall), serve_wsgi(app) as url:
        assert customer.get(url + "/").text == "25"
        assert customer.sums() == (25, 25)
