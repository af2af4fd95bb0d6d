"""The command `paychan up`; module `up` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paychan.cli.terminal import fail, keep_file
from paychan.shared.configfiles import NETWORKS, SERVER, SIGNER, NoSettings, find_settings

EXAMPLES = "[bold]Examples[/bold]\n\n  paychan up debug\n\n  paychan up config/live\n\n  PORT=8080 paychan up debug"


def command(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="DIRECTORY", help=f"Directory with server.toml and signer.toml, or one of {', '.join(NETWORKS)}"
        ),
    ],
) -> None:
    """Start signer and server together, and stop both on Ctrl-C."""
    from paychan.cli.up import up

    keep_file(place)
    named = place.parent if place.is_file() else place
    try:
        files = find_settings(named, SIGNER), find_settings(named if place.name == SIGNER.name else place, SERVER)
    except NoSettings as error:
        fail(f"{error}. `paychan init` writes both files for a network", status=2)
    raise typer.Exit(up(*files, place))
