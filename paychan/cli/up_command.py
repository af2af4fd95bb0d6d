"""The command `paychan up`; module `up` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paychan.shipped import NETWORKS, shipped_directory

EXAMPLES = "[bold]Examples[/bold]\n\n  paychan up debug\n\n  paychan up config/live\n\n  PORT=8080 paychan up debug"


def command(
    directory: Annotated[
        Path, typer.Argument(help=f"Directory with server.toml and signer.toml, or one of {', '.join(NETWORKS)}")
    ],
) -> None:
    """Start signer and server together, and stop both on Ctrl-C."""
    from paychan.cli.up import up

    shipped = shipped_directory(str(directory))
    raise typer.Exit(up(shipped if shipped is not None and not directory.is_dir() else directory))
