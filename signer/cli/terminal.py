"""Output of the signer's commands: one console for results, one for errors."""

from __future__ import annotations

import time
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def fail(message: str, status: int = 1) -> NoReturn:
    """End the command with one sentence that names the problem and the next step."""
    err.print(f"[red]paychan-signer:[/red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(status)


def moment(unix: float) -> str:
    """Local time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix))


def span(seconds: float) -> str:
    """A duration, in its two largest units."""
    left = int(seconds)
    if left < _MINUTE:
        return f"{left} s"
    if left < _HOUR:
        return f"{left // _MINUTE} min"
    if left < 2 * _DAY:
        return f"{left // _HOUR} h {left % _HOUR // _MINUTE} min"
    return f"{left // _DAY} d {left % _DAY // _HOUR} h"
