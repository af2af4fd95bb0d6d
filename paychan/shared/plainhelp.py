"""Help without frames, for pipes and terminals that are too narrow for them: Rich cuts names in its frames."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

_FRAMED_COLUMNS = 100
"""On a terminal of this width, no name in a help text is cut."""

_PLAIN_COLUMNS = 80
"""Least width of plain help: a narrower terminal breaks the lines, and no name is broken here."""

_UNBROKEN = "\b\n"
"""Click's mark of a paragraph whose lines it does not break."""

_MARKUP = re.compile(r"\\\[|\[/?(?:bold|dim|green|red|yellow)\]")


def plain_unless_wide(command: Any) -> Any:
    """Let a click command and those below it show plain help, unless the output is a wide terminal; return it."""
    _name_numbers(command)
    wide = sys.stdout and sys.stdout.isatty() and shutil.get_terminal_size().columns >= _FRAMED_COLUMNS
    if not wide or os.environ.get("NO_COLOR"):
        _make_plain(command)
    return command


def _name_numbers(command: Any) -> None:
    """Call the number of each option N that has no better name; integers and fractions have names of their own."""
    for parameter in command.params:
        is_number = getattr(parameter.type, "name", "").split()[0:1] in (["integer"], ["float"])
        if parameter.param_type_name == "option" and is_number and parameter.metavar is None:
            parameter.metavar = "N"
    for below in getattr(command, "commands", {}).values():
        _name_numbers(below)


def _make_plain(command: Any) -> None:
    command.rich_markup_mode = None
    command.context_settings = {**command.context_settings, "terminal_width": _PLAIN_COLUMNS}
    command.help = _without_markup(command.help)
    command.short_help = command.short_help or (command.help or "").partition("\n\n")[0]
    examples = (_without_markup(command.epilog) or "").strip("\n").split("\n\n")
    command.epilog = "\n\n".join(f"{_UNBROKEN}{each}" for each in examples if each)
    for parameter in command.params:
        parameter.help = _without_markup(getattr(parameter, "help", None))
        if parameter.param_type_name == "argument":
            parameter.make_metavar = partial(_without_braces, parameter.make_metavar)
    for below in getattr(command, "commands", {}).values():
        _make_plain(below)


def _without_braces(metavar: Callable[..., str], *context: Any, **named: Any) -> str:
    """Return the name of an argument without Typer's braces around one that is required: `NAME`, as in texts."""
    return metavar(*context, **named).replace("{", "").replace("}", "")


def _without_markup(text: str | None) -> str | None:
    return text and _MARKUP.sub(lambda found: "[" if found[0] == "\\[" else "", text)
