"""The command `paychan settle`; module `settle` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paychan.cli.options import ConfigOption
from paychan.cli.terminal import JsonOption

EXAMPLES = """[bold]Examples[/bold]

  paychan settle --offline NEWEST.backup --config config/live/server.toml

  paychan settle --offline NEWEST.backup --config config/live/server.toml --publish

  paychan settle --offline NEWEST.backup --signer signer.sock --network live --sign --out transactions.txt
"""


def settle(
    offline: Annotated[
        Path, typer.Option("--offline", help="The backup, preferably the newest: a file that ends in .backup")
    ],
    config_file: ConfigOption = None,
    signer: Annotated[Path | None, typer.Option(help="The signer's socket, instead of the configured one")] = None,
    network: Annotated[str, typer.Option(help="Without --config: live, test, regtest or debug")] = "",
    fee_rate: Annotated[
        int | None, typer.Option(min=1, help="Satoshi per virtual byte. \\[default: the server's rate at this time]")
    ] = None,
    sign: Annotated[
        bool,
        typer.Option(
            "--sign",
            help="Sign and show the transactions. The signer remembers them, and the server that runs next closes the "
            "channels",
        ),
    ] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Sign, and broadcast the transactions through the configured chain")
    ] = False,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", help="With --sign or --publish: write the raw transactions to a new file, one per line in hex"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Settle every channel of a backup without a server: for a machine whose disk failed. The signer must be running.

    Without --sign and --publish it shows the plan, and nothing is signed or broadcast. The same command may be repeated: settled channels are not settled again.
    """
    from paychan.cli.operator.settle import run

    run(offline, config_file, signer, network, fee_rate, out_file, sign=sign, publish=publish, as_json=as_json)
