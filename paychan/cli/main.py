"""Entry point of the `paychan` command."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="paychan",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Bitcoin payment channel server and client: sell anything by the satoshi, settle once.",
)


def main() -> None:
    """Run the command line."""
    app()
