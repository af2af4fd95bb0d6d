"""The command line of `paychan-signer` without its commands: name, help and version."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

from signer.cli.terminal import out


class _RunByDefault(TyperGroup):
    """`paychan-signer FILE` is `paychan-signer run FILE`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


def new_app() -> typer.Typer:
    """Return a command line without commands."""
    app = typer.Typer(
        name="paychan-signer",
        cls=_RunByDefault,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        help="""Hold the keys of a payment channel server, and sign its settlements after checking them.

    Examples:

      paychan-signer config/debug/signer.toml

      paychan-signer init config/live/signer.toml
    """,
    )
    app.callback()(_signer)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"paychan-signer {version('paychan')}")
        raise typer.Exit


def _signer(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass
