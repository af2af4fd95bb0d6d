"""The command `paychan up`; module `up` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paychan.cli.gateway import DEFAULT_PORT, GatewayPort, Price, Upstream, arguments_of
from paychan.cli.terminal import fail, keep_file
from paychan.shared.configfiles import NETWORKS, SERVER, SIGNER, NoSettings, find_settings

EXAMPLES = """[bold]Examples[/bold]

  paychan up debug

  paychan up config/live

  PORT=8001 paychan up debug

  paychan up debug --gateway http://127.0.0.1:5000 --price 25
"""


def command(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="DIRECTORY", help=f"Directory with server.toml and signer.toml, or one of {', '.join(NETWORKS)}"
        ),
    ],
    gateway: Upstream = None,
    price: Price = None,
    gateway_port: GatewayPort = DEFAULT_PORT,
) -> None:
    """Start signer and server together, and stop both on Ctrl-C."""
    from paychan.cli.up import up

    sells = arguments_of(gateway, price, gateway_port)
    keep_file(place)
    named = place.parent if place.is_file() else place
    try:
        files = find_settings(named, SIGNER), find_settings(named if place.name == SIGNER.name else place, SERVER)
    except NoSettings as error:
        if place.is_file():
            beside = f"{place} is a file without {SIGNER.name} and {SERVER.name} beside it"
            fail(f"{beside}: `paychan up` takes their directory, or one of {', '.join(NETWORKS)}", status=2)
        fail(f"{error}. `paychan init` writes both files for a network", status=2)
    raise typer.Exit(up(*files, place, sells))
