"""Arguments and options of the payer's commands, and the examples in their help.

Without imports of the client library: the help needs none of it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from paychan.cli.terminal import keep_option, warn
from paychan.shared.places import wallet_place
from paychan.shared.wording import sat


def _noted(context: typer.Context, parameter: typer.CallbackParam, wallet: Path | None) -> Path | None:
    """Say where the wallet is, if that is not the usual place; commands to paste repeat the option."""
    keep_option(context, parameter, wallet)
    note_place(wallet)
    return wallet


def note_place(wallet: Path | None) -> None:
    """Say where the wallet is, if that is not the usual place."""
    with contextlib.suppress(RuntimeError):
        note = "" if wallet else wallet_place().note
        if note:
            warn(f"paychan: {note}")


_DIGITS = re.compile(r"-?[0-9]+(?:_[0-9]+)*|-?[0-9]{1,3}(?:,[0-9]{3})+", re.ASCII)
"""A whole number as people write it: 1000, 1,000 as this program prints it, or 1_000 as Python has it."""


def amount_of(text: str | int) -> int:
    """Return the amount in satoshi that a text of the command line means.

    Raises:
        typer.BadParameter: not a whole number, such as 1.5 or 1,00.
    """
    if isinstance(text, int):  # a default
        return text
    if _DIGITS.fullmatch(text.strip()) is None:
        msg = f"{text!r} is not a whole number of satoshi, such as 1000, 1,000 or 1_000"
        raise typer.BadParameter(msg)
    return int(text.replace(",", "").replace("_", ""))


def least(smallest: int) -> Callable[[int | None], int | None]:
    """Return a check of an option's amount, which must be at least this one."""

    def check(amount: int | None) -> int | None:
        if amount is not None and amount < smallest:
            msg = f"got {sat(amount)}, want at least {sat(smallest)}"
            raise typer.BadParameter(msg)
        return amount

    return check


NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name as in `paychan channel list`, or its beginning.")
]
_WALLET_HELP = "Directory of the channels. \\[default: $XDG_DATA_HOME/paychan/wallet, or ~/.local/share/paychan/wallet]"
WalletOption = Annotated[
    Path | None, typer.Option("--wallet", envvar="PAYCHAN_WALLET", callback=_noted, help=_WALLET_HELP)
]
GroupWalletOption = Annotated[
    Path | None, typer.Option("--wallet", envvar="PAYCHAN_WALLET", callback=keep_option, help=_WALLET_HELP)
]
"""The option before a subcommand, whose own option notes the place."""
NodeOption = Annotated[str, typer.Option("--node", envvar="PAYCHAN_NODE", help="Your own bitcoind: http://host:port.")]
CredentialsOption = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        envvar="PAYCHAN_CREDENTIALS",
        help="File with user:password of the node, such as its .cookie.",
    ),
]
ElectrumOption = Annotated[
    str,
    typer.Option("--electrum", envvar="PAYCHAN_ELECTRUM", help="Electrum server: ssl://host:port or tcp://host:port."),
]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--certificate",
        envvar="PAYCHAN_CERTIFICATE",
        help="The Electrum server's own certificate, if no certificate authority signed it.",
    ),
]
RateOption = Annotated[
    int | None,
    typer.Option("--fee-rate", min=1, help="Satoshi per byte. \\[default: the chain's estimate if available, else 2]"),
]
ToOption = Annotated[str, typer.Option("--to", help="Address for the refund. \\[default: the change address]")]
MaxFeeOption = Annotated[
    int | None,
    typer.Option(
        "--max-fee",
        parser=amount_of,
        metavar="SAT",
        callback=least(1),
        help="Highest fee in satoshi. \\[default: 10 % of the refunded amount, and 200 per byte]",
    ),
]
TransactionOption = Annotated[
    str,
    typer.Option("--transaction", help="The funding transaction in hex, or a file with it: proves the value."),
]


def examples(*lines: str) -> str:
    """Format the epilog of a command's help."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  {line}" for line in lines)


def read_transaction(text: str) -> str:
    """Return a transaction's hex, given directly or as the name of a file.

    Raises:
        OSError: the file can't be read.
    """
    text = text.strip()
    if not text or len(text) > 255 or all(c in "0123456789abcdefABCDEF" for c in text):
        return text.lower()
    return expanded(Path(text)).read_text(encoding="ascii", errors="replace").strip().lower()


def expanded(path: Path) -> Path:
    """Return a path with the home directory for `~`; unchanged for a user who has none."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for such a user
