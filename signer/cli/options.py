"""Options and output functions that the commands of `paychan-signer` share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from paychan.protocol.settings import SettingsError
from paychan.shared.configfiles import SIGNER, NoSettings, find_settings
from signer.cli.terminal import fail, keep_file, out, say
from signer.secret.file import PrivateFileError
from signer.secret.sources import NoneTyped, NoSecret, input_is_terminal
from signer.seed.file import SeedError


def find(given: Path) -> Path:
    """Return the signer's file that an argument means; if there is none, end the command with a sentence."""
    keep_file(given)
    try:
        return find_settings(given, SIGNER)
    except NoSettings as error:
        fail(str(error), 2)


ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="signer.toml or its directory, such as live", show_default=False, callback=find
    ),
]

PassphraseDescriptor = Annotated[
    int | None,
    typer.Option("--passphrase-fd", metavar="N", help="read the passphrase from this open file descriptor", min=0),
]

PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", metavar="PATH", help="read the passphrase from this file, mode 0600"),
]

WordsFile = Annotated[
    Path | None,
    typer.Option("--words-file", metavar="PATH", help="write the words to this new file instead of showing them"),
]

BackupFile = Annotated[
    Path | None,
    typer.Option("--words-file", metavar="PATH", help='read the words from this file, "-" for standard input'),
]

RawSeed = Annotated[
    bool, typer.Option("--hex", help="hex digits instead of words: of an old seed file, or an RBPCP v2 root seed")
]


class CommandFailed(Exception):
    """A command can't continue; the text says why and what to do next."""


def or_exit(file: Path, command: Callable[[], None]) -> None:
    """Report a wrong file, key or seed in one line and exit with status 2, as for a wrong command line."""
    try:
        command()
    except (SettingsError, CommandFailed) as error:
        fail(str(error), 2)
    except NoneTyped as error:
        fail(str(error), 2)
    except NoSecret as error:
        where = error.key if error.key.startswith("--") else f"{file}: {error.key}" if error.key else str(file)
        fail(f"{where}: {error}", 2)
    except (SeedError, PrivateFileError) as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        fail("stopped: nothing was changed", 2)


def examples(*lines: str) -> str:
    """Make the last part of a command's help."""
    return "\n\n".join(
        (f"[bold]Example{'s' * (len(lines) > 1)}[/bold]", *(f"  paychan-signer {line}" for line in lines))
    )


def agreed(question: str) -> bool:
    """Ask until the answer is y, yes, n or no, in any case; return whether it is a yes.

    Raises:
        CommandFailed: the input has ended.
    """
    while True:
        try:
            answer = out.input(f"{question} yes or no: ").strip().lower()
        except EOFError:
            msg = "neither yes nor no was typed: nothing was changed"
            raise CommandFailed(msg) from None
        if answer in ("y", "yes", "n", "no"):
            return answer.startswith("y")
        say("Type yes or no.", "yellow")


def on_terminal() -> bool:
    """Whether both input and output are a terminal, so that a person can answer."""
    return input_is_terminal() and bool(sys.stdout) and sys.stdout.isatty()
