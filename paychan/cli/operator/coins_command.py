"""The command `paychan coins`; module `coins` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paychan.cli.options import ConfigFile

EXAMPLES = """[bold]Examples[/bold]

  paychan coins config/live/server.toml addresses.txt --out coins.txt

  paychan coins config/live/server.toml --publish sweep.txt
"""


def coins(
    file: ConfigFile,
    addresses: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help='File with one address a line, "-" for standard input', show_default=False
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="Write a line TXID:VOUT TRANSACTION for each coin", show_default=False)
    ] = None,
    publish: Annotated[
        Path | None, typer.Option("--publish", help="Broadcast the transaction in this file", show_default=False)
    ] = None,
) -> None:
    """List the confirmed, unspent coins on addresses, for `paychan-signer sweep`; or broadcast its transaction.

    bitcoind scans all unspent outputs for this, which takes minutes on the main network.
    """
    from paychan.cli.operator.coins import run

    run(file, addresses, to, publish)
