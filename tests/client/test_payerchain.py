"""Error messages of `paychan channel refund` and `watch` for a node or Electrum server that does not work."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paychan import chain
from paychan.cli.payer.chain import in_options
from paychan.cli.payer.channel import app
from paychan.client import Payer
from tests.client.liar import Liar

MODULES = sorted(Path(str(chain.__file__)).parent.rglob("*.py"))


@pytest.fixture
def name(liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A channel in the wallet, and a file of credentials."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "wallet"))
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "login").write_text("payer:secret\n")
    with Payer(liar.url, wallet=tmp_path / "wallet") as payer:
        return payer.new_channel(hours=100).name


@pytest.mark.parametrize("command", [["refund", "--publish"], ["watch", "--once"]], ids=["refund", "watch"])
@pytest.mark.parametrize(
    ("source", "reason", "advice"),
    [
        (["--node", "http://127.0.0.1:1", "--credentials", "{}/login"], "no bitcoind answers", "or correct --node."),
        (["--node", "{liar}", "--credentials", "{}/none"], "can't read {}/none", "Set --credentials to"),
        (
            ["--electrum", "127.0.0.1:1"],
            "not the URL of an Electrum server",
            "expected tcp://host:port or ssl://host:port",
        ),
    ],
    ids=["no listener", "no credentials", "no URL"],
)
def test_error_messages_name_an_option_of_the_command(
    name: str, liar: Liar, tmp_path: Path, command: list[str], source: list[str], reason: str, advice: str
) -> None:
    """The error names the problem and an option to change: the payer has no settings."""
    words = [*command, name, *(each.format(tmp_path, liar=liar.url) for each in source)]
    result = CliRunner().invoke(app, words)

    assert result.exit_code == 1
    assert reason.format(tmp_path) in result.stderr
    assert advice in result.stderr
    assert "chain." not in result.stderr


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_settings_in_backend_messages_become_options(module: Path) -> None:
    """Every setting that a backend may name has its option."""
    for node in ast.walk(ast.parse(module.read_text())):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
        assert not re.search(r"(?<!paychan\.)\bchain\.[a-z]", in_options(text)), text
