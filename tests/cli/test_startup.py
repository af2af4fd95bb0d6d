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
from signer.commands import app as signer_app
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


SERVER_STARTS = """\
import sys, paychan.cli.main
from pathlib import Path
from paychan.cli import serve
serve.fail = lambda *_, **__: print("\\n".join(sys.modules))
serve.serve(Path("missing.toml"))
"""

SIGNER_STARTS = """\
import sys, signer.cli.terminal, signer.start
signer.cli.terminal.fail = lambda *_: print("\\n".join(sys.modules))
sys.argv = ["paychan-signer", "missing.toml"]
signer.start.main()
"""
"""A service that has loaded all its modules, and then finds no settings."""


@pytest.mark.parametrize(
    ("program", "service"),
    [(SERVER_STARTS, "paychan.app"), (SIGNER_STARTS, "signer.service")],
    ids=["server", "signer"],
)
def test_a_service_starts_without_packages_for_a_terminal(program: str, service: str) -> None:
    """Rich and Click, which structlog and httpx would load if they could, are a third of a start; other commands are more."""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    loaded = set(run.stdout.split())

    assert service in loaded, run.stderr
    assert packages(loaded) & {"rich", "click", "pygments", "tomlkit"} == set()
    assert "signer.cli.seed" not in loaded


@pytest.mark.parametrize("module", ["paychan.cli.terminal", "signer.cli.terminal"])
def test_a_failure_is_reported_where_rich_can_t_be_read(module: str) -> None:
    """A process that has changed its user, or has no free descriptor, still says why it ends."""
    program = f"import sys; sys.modules['rich'] = None\nfrom {module} import fail\nfail('the reason')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert ": the reason\n" in run.stderr


def test_the_signer_lists_every_command() -> None:
    """The list that is shown without the commands' modules has all of them, with the first words of their help."""
    commands = typer.main.get_group(signer_app).commands

    assert list(LINES) == list(commands)
    for name, line in LINES.items():
        shown = commands[name].help or ""
        assert " ".join(shown.split()).startswith(line.rstrip(".")), name
