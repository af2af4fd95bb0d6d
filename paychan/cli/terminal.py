"""The output of commands: one console for results, one for errors; values, tables and commands that can be copied."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO, cast

import typer

from paychan.shared.called import as_called, called, quoted
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

_SHARED = {"--wallet": ("channel", "wallet"), "--dir": ("node",)}
"""By option: the commands that would mean another wallet or node without it."""

_QUIET_SECONDS = 1.0

_kept: dict[str, str] = {}
"""By command: what this command line adds to each command to paste."""


_typed: dict[str, str] = {}
"""The argument of this command line that stands for FILE in commands to paste."""


def keep_file(given: Path) -> None:
    """Remember the settings of this command line, as they were typed: a file or a directory."""
    _typed["FILE"] = str(given)


def completed(text: str) -> str:
    """Complete the commands of a text that stand between backticks, so that they can be pasted; group its amounts."""
    return as_called(grouped(text), _typed.get("FILE", ""), _kept)


class _Mode:
    """Whether the running command prints JSON."""

    as_json = False


def _note_json(context: typer.Context, as_json: bool) -> bool:
    _Mode.as_json = as_json
    context.call_on_close(lambda: setattr(_Mode, "as_json", False))
    return as_json


JsonOption = Annotated[
    bool, typer.Option("--json", callback=_note_json, is_eager=True, help="Print one JSON value, also for errors.")
]


def fail(message: str, status: int = 1, *, code: str = "failed") -> NoReturn:
    """End the command with one sentence that names the problem and the next step; with --json, as a JSON object."""
    report(message, code)
    raise typer.Exit(status)


def report(message: str, code: str = "failed") -> None:
    """Print the sentence of `fail`."""
    if _Mode.as_json:
        show_json({"code": code, "error": completed(message)})
        return
    try:
        from rich.console import Console  # noqa: F401 - for `err`
        from rich.markup import escape
    except (ImportError, OSError):  # no descriptor is free to read them
        sys.stderr.write(f"paychan: {completed(message)}\n")
    else:
        err.print(f"[red]paychan:[/red] {escape(completed(message))}", soft_wrap=True)


def show_json(value: object) -> None:
    """Print one JSON value for programs: never coloured, in ASCII, whatever terminal and environment ask for."""
    write_out(json.dumps(value, indent=2, default=str) + "\n")


@contextmanager
def patiently(text: str) -> Iterator[None]:
    """Say after a second, on standard error, what a person waits for; nothing with --json."""
    if _Mode.as_json:
        yield
        return
    timer = threading.Timer(_QUIET_SECONDS, warn, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(text: str, style: str = "") -> None:
    """Print a sentence; only the terminal breaks its lines. Commands between backticks are named as they were called."""
    from rich.text import Text

    out.print(Text(completed(text), style), soft_wrap=True)


def warn(text: str) -> None:
    """Print a sentence beside the results, on standard error."""
    from rich.text import Text

    err.print(Text(completed(text)), soft_wrap=True)


def command(*words: object, program: str = "paychan") -> Value:
    """A command line for the user to paste, which means the same wallet or node as this one.

    The word FILE stands for the settings of this command line, as they were typed.
    """
    options = _kept.get(str(words[0]), "") if words else ""
    named = (_typed.get("FILE", word) if word == "FILE" else word for word in words)
    return Value(called(program, *named) + options, "green", whole=True)


def next_command(*words: object, program: str = "paychan") -> None:
    """Print the command that comes next as it can be pasted, alone on its line if the terminal is narrow."""
    show_facts("", ("Next", command(*words, program=program)))


def show_facts(title: str, *rows: tuple[str, Cell]) -> None:
    """Show named values without the empty ones, below a title if it is not empty."""
    from rich.text import Text

    shown = [(name, value) for name, value in rows if (value.text if isinstance(value, Value) else value)]
    if title:
        out.print(Text(title, "bold"), soft_wrap=True)
    _print(facts(shown, terminal_width(), "  " if title else ""))


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


def keep_option(context: typer.Context, parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """Remember an option that was given on the command line (not by the environment): commands to paste repeat it."""
    option, source = parameter.opts[0], context.get_parameter_source(parameter.name or "")
    given = value is not None and source is not None and source.name == "COMMANDLINE"
    for name in _SHARED[option]:
        _kept[name] = " " + quoted(option, value) if given else ""
    return value
