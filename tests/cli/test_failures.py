"""Failures and next steps in the words of the operator: no class of Python, the cause that is there, one style."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import httpx
import pytest
import typer
from click.testing import CliRunner as ClickRunner
from rich.text import Text
from typer.testing import CliRunner

from paychan.chain.base import ChainUnfit
from paychan.chain.bitcoind.node import NodeState
from paychan.chain.bitcoind.rpc import JsonRpc
from paychan.cli import terminal as paychan_terminal
from paychan.cli.main import app
from paychan.cli.operator import status
from paychan.cli.payer.terminal import next_step
from paychan.client import Patience, Payer, ServerFailed, State
from paychan.protocol.types import Network, OutPoint
from paychan.shared.plainhelp import plain_unless_wide
from paychan.shared.wording import failure
from signer.cli import terminal as signer_terminal
from signer.cli.sweeping import Place, is_swept, read_sweeps
from signer.commands import app as signer
from tests.lib.system import System

CONFIG = Path(__file__).parents[2] / "config"


@pytest.fixture
def closed_port() -> int:
    """A port where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.quick
@pytest.mark.parametrize(
    "error", [httpx.ConnectError(""), httpx.ReadTimeout(""), TimeoutError(), httpx.PoolTimeout("")]
)
def test_a_failed_request_is_said_in_words(error: Exception) -> None:
    """No text names a class of Python."""
    said = failure(error)

    assert said
    assert type(error).__name__ not in said
    assert failure(httpx.ConnectError("refused")) == "refused"


async def test_a_stopped_node_is_named_before_its_cookie(closed_port: int, tmp_path: Path) -> None:
    """A node removes its cookie at its stop: the cause is that it does not run."""
    rpc = JsonRpc(f"http://127.0.0.1:{closed_port}", tmp_path / ".cookie", 5)

    with pytest.raises(ChainUnfit, match=rf"^no bitcoind runs at http://127\.0\.0\.1:{closed_port}"):
        await NodeState(rpc, Network.REGTEST).check()
    await rpc.close()


def test_a_server_that_stopped_is_said_in_words(tmp_path: Path) -> None:
    """Its file `running` is still there, and nothing listens at the address in it."""
    with System(tmp_path / "system") as system:
        system.kill_server()
        said = CliRunner().invoke(app, ["status", str(system.server_file)])

    assert said.exit_code == 3
    assert "Error" not in said.output
    assert "paychan serve" in said.output


@pytest.mark.quick
def test_earnings_of_a_sweep_are_marked(tmp_path: Path) -> None:
    """Of several settlements of the same channels one confirms; a line that can't be read says nothing."""
    first, dearer, other = (OutPoint(bytes([number]) * 32, 0) for number in (1, 2, 3))
    place = Place(b"", "derived", frozenset(), 10, (frozenset({first, dearer}), frozenset({other})))
    sweeps = tmp_path / "signer.sweeps"
    sweeps.write_text("damaged\n" + json.dumps({"txid": "aa", "spends": [str(dearer)]}) + "\n")

    assert read_sweeps(sweeps) == {dearer: "aa"}
    assert not is_swept(place, read_sweeps(sweeps))
    sweeps.write_text(json.dumps({"txid": "aa", "spends": [str(dearer), str(other)]}) + "\n")
    assert is_swept(place, read_sweeps(sweeps))
    assert read_sweeps(tmp_path / "none") == {}


@pytest.mark.quick
def test_next_can_be_pasted(tmp_path: Path) -> None:
    """The command stands alone behind "Next"; work before it is a sentence of its own."""
    said = CliRunner().invoke(app, ["init", "live", str(tmp_path / "live")]).output.splitlines()

    assert "Edit both files first." in said
    assert [line.split()[2:] for line in said if line.startswith("Next  ")] == [["init", str(tmp_path / "live")]]


def test_closing_without_the_signer_says_so_at_once(tmp_path: Path) -> None:
    """The closing is accepted; the command says so before its first pause, and the status names itself as next."""
    said: list[str] = []
    with System(tmp_path / "system") as system:
        payer = Payer(system.url, wallet=tmp_path / "wallet", patience=Patience(attempts=1))
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        channel.open()
        system.signer.stop()
        with pytest.raises(ServerFailed):
            channel.close(waits=said.append)
        assert said == ["signer_unavailable"]
        channel.status()
        assert channel.record.state is State.CLOSING
        next_step_of = str(next_step(channel.record))
    assert f"channel status {channel.name}" in next_step_of


@pytest.mark.quick
def test_without_colours_there_are_no_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich alone would still print bold and dim."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    for terminal in (paychan_terminal, signer_terminal):
        console = terminal._console(stderr=False)
        with console.capture() as capture:
            console.print(Text("bold", "bold red"))
        assert capture.get() == "bold\n"


@pytest.mark.quick
def test_an_alarm_is_one_short_line() -> None:
    """It names a channel once; `--json` has a text that is too long."""
    channel = f"{'ab' * 32}:0"
    short = status._alarm_line({"kind": "fee", "channel": channel, "text": f"{channel}: costs"})
    long = status._alarm_line({"kind": "fee", "channel": channel, "text": "x" * 500})

    assert short == f"fee: {channel}: costs"
    assert long.startswith(f"fee {channel}: x")
    assert long.endswith("--json shows all of it")
    assert len(long) < 360


@pytest.mark.quick
@pytest.mark.parametrize(("program", "line"), [(app, ["channel", "pay"]), (app, ["status"]), (signer, ["sweep"])])
def test_numbers_in_help_have_one_name(program: typer.Typer, line: list[str]) -> None:
    """Neither kinds of numbers nor Python's words."""
    said = ClickRunner().invoke(plain_unless_wide(typer.main.get_command(program)), [*line, "--help"])

    assert said.exit_code == 0, said.output
    assert not re.search(r"(?i)\binteger\b|\bfloat\b", said.output), said.output
