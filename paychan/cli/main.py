"""Entry point of the `paychan` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paychan.cli import backup, channel, node, operator, settle, supervisor
from paychan.cli.terminal import fail

EPILOG = """
[bold]Examples[/bold]

  paychan up config/debug                      [dim]signer and server, no Bitcoin[/dim]

  paychan channel new http://localhost:8000    [dim]a payer's channel[/dim]

  paychan status config/debug/server.toml      [dim]how the server is[/dim]
"""

app = typer.Typer(
    name="paychan",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Bitcoin payment channels: sell anything by the satoshi, settle once.",
    epilog=EPILOG,
)
app.add_typer(channel.app, name="channel", help="Pay: open channels to a server, pay over them, close them.")
app.add_typer(backup.app, name="backup", help="Back up and restore the server's channels.")
app.add_typer(operator.app, name="channels", help="The server's channels: list, show, close.")
app.add_typer(node.app, name="node", help="A throw-away regtest node to play with.")
app.command(epilog="[bold]Example[/bold]\n\n  paychan status config/debug/server.toml")(operator.status)
app.command(epilog=operator.WITHDRAW_EXAMPLES)(operator.withdraw)
app.command(epilog=settle.EXAMPLES)(settle.settle)


@app.command(epilog="[bold]Example[/bold]\n\n  paychan serve config/debug/server.toml")
def serve(
    file: Annotated[Path, typer.Argument(help="The server's configuration, such as config/debug/server.toml")],
) -> None:
    """Start the server alone; the signer must be running. PORT in the environment overrides http.port."""
    from paychan import app as server  # noqa: PLC0415 - the payer's commands need none of it
    from paychan.config import load_server_config  # noqa: PLC0415
    from paychan.protocol.declared import SettingsError  # noqa: PLC0415
    from paychan.store.base import StoreFailed  # noqa: PLC0415

    try:
        server.run(load_server_config(file), str(file))
    except (SettingsError, server.StartError, StoreFailed) as error:
        fail(str(error), status=2)


@app.command(epilog="[bold]Examples[/bold]\n\n  paychan up config/debug\n\n  PORT=8080 paychan up config/debug")
def up(
    directory: Annotated[Path, typer.Argument(help="Directory with server.toml and signer.toml, such as config/debug")],
) -> None:
    """Start signer and server together, and stop both on Ctrl-C."""
    raise typer.Exit(supervisor.up(directory))


def main() -> None:
    """Run the command line."""
    app()
