"""The argument that names the settings of a server: each of the operator's commands takes the file or its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paychan.cli.terminal import fail, keep_file
from paychan.shared.configfiles import SERVER, NoSettings, find_settings


def find(given: Path) -> Path:
    """Return the server's file that an argument means; if there is none, end the command with a sentence."""
    keep_file(given)
    try:
        return find_settings(given, SERVER)
    except NoSettings as error:
        fail(str(error), status=2, code="configuration")


def _find_given(given: Path | None) -> Path | None:
    return None if given is None else find(given)


ConfigFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="server.toml or its directory, such as live", callback=find)
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="server.toml or its directory: network, signer, chain, fee rules",
        callback=_find_given,
    ),
]
