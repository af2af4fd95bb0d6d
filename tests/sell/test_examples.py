"""The page's examples run as printed, in the real frameworks, behind a real server, and are paid by the real library."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.lib.readme import ROOT
from tests.sell.shop import Shop, raw, serve_asgi, serve_tornado, serve_wsgi, settled

MOST_LINES = 10
PAGE = (ROOT / "paychan/sell/README.md").read_text()
ASGI = ("FastAPI", "Starlette", "Litestar")
FRAMEWORKS = (*ASGI, "Flask", "Django", "Tornado")


def example(name: str) -> str:
    """Return the program below a heading of the page."""
    return re.findall(r"(?ms)^```python\n(.*?)^```", PAGE.partition(f"### {name}\n")[2])[0]


@pytest.fixture(params=FRAMEWORKS)
def url(request: pytest.FixtureRequest, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example's program in a directory that has the server's state where the example looks for it."""
    (tmp_path / ".paychan").mkdir()
    (tmp_path / ".paychan/debug").symlink_to(shop.system.state)
    monkeypatch.chdir(tmp_path)
    module: Any = types.ModuleType("example")
    if request.param == "Django":
        from django.conf import settings
        from django.urls import path

        settings.configure(ROOT_URLCONF="example", ALLOWED_HOSTS=["127.0.0.1"], USE_TZ=True)
        module.urlpatterns = [path("tile/<int:number>", lambda request, number: module.tile(request, number=number))]
    monkeypatch.setitem(sys.modules, "example", module)
    exec(compile(example(request.param), "example", "exec"), module.__dict__)
    if request.param == "Tornado":
        with serve_tornado(module.app, module.wall) as found:
            yield found
    elif request.param in ASGI:
        with serve_asgi(module.app) as found:
            yield found
    else:
        app = module.app if request.param == "Flask" else module.application
        with closing(app.wsgi_app if request.param == "Flask" else app), serve_wsgi(app) as found:
            yield found


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_example_is_short(name: str) -> None:
    """It has at most ten lines that are not blank."""
    assert len([line for line in example(name).splitlines() if line.strip()]) <= MOST_LINES


def test_an_example_sells(shop: Shop, url: str) -> None:
    """Without a payment: 402 with the price. The library pays it, and the answer says what was charged."""
    offered = raw(url + "/tile/7")
    assert (offered.status_code, offered.json()["priceSat"]) == (402, 25)
    with shop.payer(url) as client:
        for number in (7, 8):
            answer = client.get(f"/tile/{number}")
            assert answer.status_code == 200, answer.text
            assert "tile" in answer.text
            assert settled(answer).charged_sat == 25
            assert answer.headers["Cache-Control"] == "private"
