"""Entry point of the `paychan` command: a table of its commands, each imported when it is called.

The payer's commands need only the packages of a plain `pip install paychan`. If packages are missing, the other
commands name the extra that installs them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from paychan.cli.terminal import out, report
from paychan.shared.commandline import run
from paychan.shared.encoding import prepare_output
from paychan.shared.plainhelp import plain_unless_wide

EPILOG = """
[bold]Examples[/bold]

  paychan up debug                             [dim]signer and server, no Bitcoin[/dim]

  paychan channel new http://localhost:8000    [dim]a payer's channel[/dim]

  paychan status debug                         [dim]state of the server[/dim]
"""

OWN_PACKAGES = ("paychan", "actors", "signer")
"""The project's own packages: a missing module in one is a defect, not an extra that is not installed."""


class _Place(NamedTuple):
    """The location of a command: a module, the name of a Typer application or function in it, and its line in the help."""

    module: str
    name: str
    help: str
    examples: str = ""
    """Name of the epilog in the module, for a function."""
    needs: str = ""
    """A package of the extra `server`, if the command can do nothing without it."""


COMMANDS = {
    "up": _Place(
        "up_command",
        "command",
        "Start signer and server together, and stop both on Ctrl-C.",
        "EXAMPLES",
        needs="plyvel",
    ),
    "gateway": _Place(
        "gateway", "gateway", "Sell an HTTP service: put a price before its URL.", "EXAMPLES", needs="plyvel"
    ),
    "init": _Place("init", "init", "Write the configuration of a signer and a server into a directory.", "EXAMPLES"),
    "channel": _Place("payer.channel", "app", "Pay: open channels to a server, pay over them, close them."),
    "pay": _Place("payer.pay_url", "pay", "Request a URL, and pay for it if it has a price.", "EXAMPLES"),
    "wallet": _Place(
        "payer.wallet_commands", "app", "The payer's wallet: show it, back it up, restore it, check it, show its words."
    ),
    "receipt": _Place("payer.receipt", "app", "Receipts of paid requests: verify one."),
    "channels": _Place("operator.status", "app", "The server's channels: list, show, close."),
    "backup": _Place("operator.backup", "app", "Back up and restore the server's channels.", needs="plyvel"),
    "coins": _Place(
        "operator.coins_command", "coins", "Find the unspent coins on addresses, such as earnings.", "EXAMPLES"
    ),
    "node": _Place("node", "app", "Run a temporary regtest node for trials."),
    "serve": _Place("serve", "serve", "Start the server alone.", "EXAMPLES", needs="plyvel"),
    "settings": _Place("settings", "settings", "Show all settings of a server, with values and meanings.", "EXAMPLES"),
    "settle": _Place(
        "operator.settle_command",
        "settle",
        "Settle the channels of a backup with only a signer.",
        "EXAMPLES",
        needs="plyvel",
    ),
    "status": _Place("operator.status", "status", "Show the channels and the health of a server.", "STATUS_EXAMPLES"),
    "withdraw": _Place(
        "operator.status", "withdraw", "Settle the earnings of channels, and keep them open.", "WITHDRAW_EXAMPLES"
    ),
}


class Commands(TyperGroup):
    """The commands of `COMMANDS`. A module is imported when its command is called, not when the help lists it."""

    _is_listing = False

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._is_listing = True
        super().format_help(ctx, formatter)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - click's signature
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        command = _command(_line_of(place), cmd_name) if self._is_listing else _load(cmd_name, place)
        return plain_unless_wide(command)


def _load(name: str, place: _Place) -> Any:
    if place.needs and find_spec(place.needs) is None:
        raise ModuleNotFoundError(name=place.needs)
    module = import_module(f"paychan.cli.{place.module}")
    found = getattr(module, place.name)
    if not isinstance(found, typer.Typer):
        return _command(found, name, getattr(module, place.examples))
    group: Any = typer.main.get_group(found)
    group.name, group.help = name, place.help
    return group


def _command(function: Any, name: str, examples: str = "") -> Any:
    """Convert a function to a click command."""
    single = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    single.command(name=name, epilog=examples or None)(function)
    return typer.main.get_command(single)


def _line_of(place: _Place) -> Any:
    def line() -> None: ...

    line.__doc__ = place.help
    return line


app = typer.Typer(
    name="paychan",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=EPILOG,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"paychan {version('paychan')}", soft_wrap=True)
        raise typer.Exit


@app.callback()
def _paychan(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Bitcoin payment channels: sell anything by the satoshi, settle once."""


def main() -> None:
    """Run the command line."""
    prepare_output()
    sys.modules.setdefault("click", None)  # type: ignore[arg-type]  # httpx would load it for a command of its own
    try:
        run(plain_unless_wide(typer.main.get_command(app)), typer)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in OWN_PACKAGES:
            raise
        report(f"this command needs the server's packages, {missing} is missing: pip install 'paychan[server]'")
        sys.exit(2)
