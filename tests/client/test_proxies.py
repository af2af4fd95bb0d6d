"""Proxies of the environment, with the real server and a real proxy: requests and streams take the same way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paychan.cli.payer.channel import app
from paychan.client import AsyncPayer, ClientError, Payer
from paychan.client.transport.proxy import proxy_of
from tests.client.proxies import Relay
from tests.lib.system import System

NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy of this machine's own environment."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "wallet"))


@pytest.mark.parametrize("scheme", ["http://", "", "socks5://", "socks5h://"])
def test_fault_35_requests_and_streams_take_the_same_proxy(
    system: System, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Opening, payments by PUT and the stream go through the proxy of any kind."""
    with Relay() as relay:
        monkeypatch.setenv("ALL_PROXY", scheme + relay.address)
        with Payer(system.url) as payer:
            channel = payer.new_channel(hours=100)
            channel.fund_debug()
            channel.open()
            channel.pay(1)
            by_put = list(relay.ways)
            channel.pay_many(1, 20)
            by_stream = relay.ways[len(by_put) :]
    if scheme.startswith("socks"):
        assert {way.split()[0] for way in relay.ways} == {"SOCKS"}
        assert by_stream
    else:
        assert {"GET", "POST", "PUT"} == set(by_put)
        assert by_stream == ["CONNECT"]


async def test_fault_35_the_same_on_an_event_loop(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """`AsyncPayer` takes the same ways."""
    with Relay() as relay:
        monkeypatch.setenv("ALL_PROXY", f"socks5h://{relay.address}")
        async with AsyncPayer(system.url) as payer:
            channel = await payer.new_channel(hours=100)
            await channel.fund_debug()
            await channel.open()
            await channel.pay_many(1, 20)
    assert len(relay.ways) >= 2


@pytest.mark.parametrize(
    ("exceptions", "url", "direct"),
    [
        ("localhost,[::1]", "http://localhost:8000", True),
        ("localhost,[::1]", "http://[::1]:8000", True),
        ("localhost, ::1", "http://[::1]:8000", True),
        ("[::1]:8000", "http://[::1]:8000", True),
        ("[::1]:8001", "http://[::1]:8000", False),
        ("fd00::/8", "https://[fd12::1]", True),
        ("10.0.0.0/8", "http://10.1.2.3", True),
        ("10.0.0.0/8", "http://11.1.2.3", False),
        ("shop.example", "https://SHOP.example", True),
        (".example", "https://shop.example", True),
        ("example", "https://shop.example", True),
        ("example", "https://shopexample", False),
        ("shop.example:443", "https://shop.example", True),
        ("shop.example:444", "https://shop.example", False),
        ("*", "https://shop.example", True),
        (",,[,]:, ::::/x", "https://shop.example", False),
        ("", "https://shop.example", False),
    ],
)
def test_fault_35_exceptions_are_read_as_curl_reads_them(
    monkeypatch: pytest.MonkeyPatch, exceptions: str, url: str, direct: bool
) -> None:
    """Brackets, ports, networks, domains; odd entries match nothing and break nothing."""
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", exceptions)

    assert (proxy_of(url) is None) is direct


@pytest.mark.parametrize(
    "proxy", ["ftp://127.0.0.1:1", "http://[::1", "http://", "socks9://x", "http://u:geheim@127.0.0.1:x", "://", "%"]
)
def test_fault_35_an_odd_proxy_is_a_sentence(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    """No command ends with a traceback, the password of the proxy is not shown, and offline commands just work."""
    with Payer(system.url) as payer:
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        channel.open()
        name = channel.name
    monkeypatch.setenv("ALL_PROXY", proxy)

    for words in (
        ["new", system.url, "--debug"],
        ["pay", name, "1"],
        ["pay", name, "1", "--times", "3"],
        ["status", name],
    ):
        result = CliRunner().invoke(app, words)
        assert isinstance(result.exception, SystemExit), (words, result.exception)
        assert result.exit_code == 1
        assert "geheim" not in result.output
    assert CliRunner().invoke(app, ["list"]).exit_code == 0
    with Payer(system.url, wallet=tmp_path / "other") as payer, pytest.raises(ClientError, match="prox"):
        payer.new_channel(hours=100)


def test_fault_35_without_its_packages_a_socks_proxy_names_the_extra(system: System, tmp_path: Path) -> None:
    """A plain install has no SOCKS; the sentence says what to install."""
    program = (
        "import sys; sys.modules['socksio'] = sys.modules['python_socks'] = None\n"
        "from paychan.cli.main import main; main()"
    )
    command = [sys.executable, "-c", program, "channel", "new", system.url, "--debug"]
    settings = os.environ | {"ALL_PROXY": "socks5h://127.0.0.1:9", "PAYCHAN_WALLET": str(tmp_path / "w")}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "pip install 'paychan[socks]'" in done.stderr
    assert "Traceback" not in done.stderr
