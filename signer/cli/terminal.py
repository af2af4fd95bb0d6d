"""Output of the signer's commands: one console for results, one for errors; values, tables and commands to copy."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO, cast

import typer

from paychan.shared.called import as_called, called
from paychan.shared.encoding import drop_output, write_out
from paychan.shared.layout import LEAST_WIDTH, Cell, Column, Line, Value, facts, table
from paychan.shared.startup import AtFirstUse
from paychan.shared.wording import grouped

if TYPE_CHECKING:
    from rich.console import Console


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            drop_output(cast("TextIO", self.file))

    # https://no-color.org: Rich alone would still print bold and dim
    return Output(stderr=stderr, highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")


out = cast("Console", AtFirstUse(partial(_console, stderr=False)))
err = cast("Console", AtFirstUse(partial(_console, stderr=True)))
"""Both load Rich at their first use; a service that prints nothing starts without it."""


_typed: dict[str, str] = {}
"""The argument of this command line that stands for FILE in commands to paste."""


def keep_file(given: Path) -> None:
    """Remember the settings of this command line, as they were typed: a file or a directory."""
    _typed["FILE"] = str(given)


def completed(text: str) -> str:
    """Complete the commands of a text that stand between backticks, so that they can be pasted; group its amounts."""
    return as_called(grouped(text), _typed.get("FILE", ""))


class _Mode:
    """Whether the running command prints JSON."""

    as_json = False


def _note_json(context: typer.Context, as_json: bool) -> bool:
    _Mode.as_json = as_json
    context.call_on_close(lambda: setattr(_Mode, "as_json", False))
    return as_json


JsonOption = Annotated[
    bool, typer.Option("--json", callback=_note_json, is_eager=True, help="Print JSON for programs, also for errors.")
]


def fail(message: str, status: int = 1) -> NoReturn:
    """End the command with one sentence that names the problem and the next step; with --json, as a JSON object."""
    if _Mode.as_json:
        show_json({"code": "failed", "error": completed(message)})
        raise typer.Exit(status)
    _report(completed(message))
    raise typer.Exit(status)


def _report(message: str) -> None:
    try:
        from rich.console import Console  # noqa: F401 - for `err`
        from rich.markup import escape
    except (ImportError, OSError):  # after a change of user, the files of packages may be closed to this process
        sys.stderr.write(f"paychan-signer: {message}\n")
    else:
        err.print(f"[red]paychan-signer:[/red] {escape(message)}", soft_wrap=True)


def show_json(value: object) -> None:
    """Print one JSON value for programs: never coloured, in ASCII, whatever terminal and environment ask for."""
    write_out(json.dumps(value, indent=2, default=str) + "\n")


def say(text: str, style: str = "") -> None:
    """Print a sentence; only the terminal breaks its lines. Commands between backticks are named as they were called."""
    from rich.text import Text

    out.print(Text(completed(text), style), soft_wrap=True)


def command(*words: object, program: str = "paychan-signer") -> Value:
    """A command line for the user to paste."""
    return Value(called(program, *words), "green", whole=True)


def next_command(*words: object, program: str = "paychan-signer", then: str = "") -> None:
    """Print the command that comes next as it can be pasted; the word FILE is the settings as they were typed.

    `then` is put behind it as it is, such as a redirection.
    """
    named = (_typed.get("FILE", word) if word == "FILE" else word for word in words)
    line = command(*named, program=program)
    show_facts(("Next", line._replace(text=line.text + then)))


def show_facts(*rows: tuple[str, Cell]) -> None:
    """Show named values without the empty ones."""
    shown = [(name, value) for name, value in rows if (value.text if isinstance(value, Value) else value)]
    _print(facts(shown, terminal_width()))


def whole(text: object) -> Value:
    """A path or another text with spaces that must stay on one line."""
    return Value(str(text), whole=True)


def show_table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> None:
    """Show a table; on a terminal that is too narrow, each row as named values."""
    _print(table(columns, rows, terminal_width()))


def terminal_width() -> int | None:
    """Columns of the terminal; None if the output goes elsewhere."""
    return max(LEAST_WIDTH, out.width) if out.file.isatty() else None


def _print(lines: Iterable[Line]) -> None:
    from rich.text import Text

    for line in lines:
        out.print(Text.assemble(*line), soft_wrap=True)
