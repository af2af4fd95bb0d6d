"""Start of the commands: a help text or a list of the wallet loads no package that only the work itself needs.

Time is not measured here, because it depends on the machine. Each loaded module costs about 0.3 ms.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from paychan.cli.main import COMMANDS
from signer.service import app as signer_app
from signer.start import LINES

MOST_MODULES = 345
"""Python, Typer and Rich load 321 modules for a help text."""

ONLY_FOR_WORK = {
    *(
        "asyncio",
        "bitcoin",
        "coincurve",
        "cryptography",
        "httptools",
        "httpx",
        "httpcore",
        "msgspec",
        "mnemonic",
        "plyvel",
    ),
    *("pydantic", "pykka", "segno", "ssl", "structlog", "tomlkit", "tornado", "uvloop", "websockets", "zmq"),
}

HELP = [
    (),
    *((name,) for name in COMMANDS),
    *(("channel", name) for name in ("new", "open", "pay", "status", "close", "refund", "watch", "key", "list")),
    *(("backup", name) for name in ("create", "verify", "restore", "salvage", "list")),
]

PROGRAM = """\
import sys
from paychan.cli.main import main
sys.argv = ["paychan", *sys.argv[1:]]
try:
    main()
finally:
    print("\\n".join(sys.modules), file=sys.stderr)
"""


def loaded_by(*arguments: str) -> set[str]:
    """Names of all modules that a command has loaded at its end."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return set(run.stderr.split())


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_fault_57_help_loads_only_what_it_shows(words: tuple[str, ...]) -> None:
    """A help text needs Typer and Rich alone."""
    loaded = loaded_by(*words, "--help")

    assert packages(loaded) & ONLY_FOR_WORK == set()
    assert len(loaded) <= MOST_MODULES


def test_fault_57_a_list_of_the_wallet_loads_no_network_package(tmp_path: Path) -> None:
    """The wallet is read without HTTP, streams, an event loop or a chain."""
    loaded = loaded_by("channel", "list", "--wallet", str(tmp_path))

    assert packages(loaded) & (ONLY_FOR_WORK - {"bitcoin", "coincurve", "msgspec"}) == set()
    assert not {name for name in loaded if name.startswith(("paychan.chain.bitcoind", "paychan.chain.electrum"))}
    assert len(loaded) <= MOST_MODULES


SIGNER_PROGRAM = PROGRAM.replace("paychan.cli.main", "signer.start")


@pytest.mark.parametrize(
    "words", [("--help",), ("--version",), ("status", "--help"), ("audit", "--help")], ids=" ".join
)
def test_fault_57_the_signer_s_help_loads_no_service(words: tuple[str, ...]) -> None:
    """The list of commands, and commands that see no secret, load no sandbox, ledger or log."""
    run = subprocess.run([sys.executable, "-c", SIGNER_PROGRAM, *words], capture_output=True, text=True, check=True)
    loaded = set(run.stderr.split())

    assert packages(loaded) & {"asyncio", "plyvel", "structlog", "tomlkit", "pyseccomp"} == set()
    assert "signer.service" not in loaded


def test_the_signer_lists_every_command() -> None:
    """The list that is shown without the commands' modules has all of them, with the first words of their help."""
    commands = typer.main.get_group(signer_app).commands

    assert list(LINES) == list(commands)
    for name, line in LINES.items():
        shown = commands[name].help or ""
        assert " ".join(shown.split()).startswith(line.rstrip(".")), name
