"""The examples of the page run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from paychan.client import Purse, paid_async_client
from tests.client.paying.seller import Seller
from tests.lib.readme import ROOT
from tests.lib.system import System

PAGE = (ROOT / "paychan" / "mpp" / "README.md").read_text()


def example(heading: str) -> str:
    """Return the first Python example under a heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found, heading
    return found[1]


def test_the_payers_example_pays(
    seller: Seller, wallet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program pays 25 sat and prints the charge."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(wallet))
    code = example("Pay").replace("http://localhost:8080/v1/tile", seller.url)
    assert seller.url in code
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "200 25\n"
    assert seller.signed_sat == 25


async def test_the_sellers_example_sells(system: System, purse: Purse) -> None:
    """The program is paid 25 sat, which its answer names."""
    code = example("Sell").replace(".paychan/debug/merchant.sock", str(system.state / "merchant.sock"))
    program: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), program)
    transport = httpx.ASGITransport(program["app"])
    async with paid_async_client(purse, transport=transport, base_url="http://maps.example") as client:
        assert (await client.get("/v1/tile")).text == "tile, 25 sat"
    await program["sales"].close()
