"""The output of commands: one console for results, one for errors."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def fail(message: str, status: int = 1) -> NoReturn:
    """End the command with one sentence that names the problem and the next step."""
    err.print(f"[red]paychan:[/red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(status)
