"""Both listeners while the server has no store: clients and web pages learn no reason, and the operator does."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from actors.alarm import Kind
from paychan.api.no_store import waiting_room
from paychan.config import load_server_config
from paychan.protocol.errors import StoreRebuilding
from tests.lib.ports import free_port
from tests.lib.rbpcp import refusal
from tests.lib.system import SERVER

SECRET = "rebuilds its damaged store"


@pytest.fixture
async def ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PORT", raising=False)
    first, second = free_port(), free_port()
    file = tmp_path / "server.toml"
    text = SERVER.format(state=tmp_path)
    for name, port in (("[http]", first), ("[management]", second)):
        text = text.replace(f"{name}\nport = 0", f"{name}\nport = {port}")
    file.write_text(text)
    async with waiting_room(load_server_config(file), StoreRebuilding(), Kind.STORE):
        yield first, second


async def _get(port: int, path: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        return await client.get(f"http://127.0.0.1:{port}{path}", headers={"Host": f"127.0.0.1:{port}", **headers})


@pytest.mark.parametrize("path", ["/health", "/v1/fundingInfo", "/v2/channels/x"])
async def test_fault_39_clients_get_the_usual_error(ports: tuple[int, int], path: str) -> None:
    """A page of another site can read the 503, its code and Retry-After; the reason stays inside."""
    answer = await _get(ports[0], path)
    assert refusal(answer) == (503, "store_rebuilding")
    assert (answer.headers["Retry-After"], answer.headers["Cache-Control"]) == ("5", "no-store")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert SECRET not in answer.text


async def test_fault_38_71_the_operator_gets_the_reason_and_a_web_page_does_not(ports: tuple[int, int]) -> None:
    """The checks of Host and origin hold without a store, too."""
    own = await _get(ports[1], "/health")
    assert (own.status_code, SECRET in own.json()["frozen"][0]) == (503, True)
    assert own.json()["alarms"][0]["kind"] == "store"
    assert "Access-Control-Allow-Origin" not in own.headers
    for headers, code in (({"Host": "evil.example"}, "misdirected"), ({"Origin": "http://evil.example"}, "cross_site")):
        foreign = await _get(ports[1], "/health", **headers)
        assert foreign.json()["code"] == code
        assert SECRET not in foreign.text
