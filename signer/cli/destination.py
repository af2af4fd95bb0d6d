"""The question of `init` and `recover` where the earnings go, and the answer in the configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from paychan.protocol.errors import Malformed
from signer.cli.options import CommandFailed, agreed, on_terminal
from signer.cli.rotate import SEED, checked_place, first_address, replace_config, say_first_address, with_destination
from signer.cli.terminal import out, say
from signer.config import SignerConfig

DestinationOption = Annotated[
    str,
    typer.Option(
        "--destination",
        metavar="PLACE",
        help='where earnings go: an address, a descriptor of your own wallet such as "wpkh(xpub…/0/*)", or "seed"',
        show_default=False,
    ),
]

_QUESTION = """\
Where do the earnings go? Type one of these:
  an address of your own wallet
  a descriptor of your own wallet, such as wpkh([73c5da0a/84h/0h/0h]xpub…/0/*): settlements pay to its first 20 addresses
  seed   addresses that follow from the seed of this signer; `paychan-signer sweep` spends them later"""


def choose_destination(file: Path, config: SignerConfig, given: str, otherwise: str = "") -> str:
    """Return what the operator chose: an address, a descriptor, or "seed"; nothing is written yet.

    `otherwise` is the choice where there is no terminal to ask on.

    Raises:
        CommandFailed: there is no terminal to ask on, or the choice is not valid, or contradicts the configuration.
    """
    named = config.settlement.destination_address
    if named:
        if given not in ("", named):
            msg = f"{file} names {named}: `paychan-signer rotate destination FILE PLACE` changes it"
            raise CommandFailed(msg)
        return named
    if given:
        return _checked(file, given, config)
    if not on_terminal() and otherwise:
        return otherwise
    if not on_terminal():
        msg = (
            "where do the earnings go? Give --destination ADDRESS, or a descriptor of your own wallet, or "
            "--destination seed for addresses that follow from the seed"
        )
        raise CommandFailed(msg)
    return _ask(file, config)


def write_destination(file: Path, config: SignerConfig, chosen: str) -> None:
    """Write the choice into the configuration. Raises `CommandFailed`."""
    if chosen not in (SEED, config.settlement.destination_address):
        replace_config(file, with_destination(file.read_text(encoding="utf8"), chosen))


def say_destination(chosen: str, config: SignerConfig) -> None:
    """Say where earnings go, with the first address of a wallet."""
    if chosen == SEED:
        say("Earnings go to addresses of the seed: `paychan-signer earnings FILE` lists them, `sweep` spends them.")
        return
    say(f"Earnings go to {chosen}.")
    say_first_address(chosen, config)


def _ask(file: Path, config: SignerConfig) -> str:
    say(_QUESTION)
    while True:
        try:
            chosen = _checked(file, out.input("Destination: ").strip(), config)
        except CommandFailed as error:
            say(str(error), "yellow")
            continue
        except EOFError:
            msg = "no destination was typed: nothing was changed"
            raise CommandFailed(msg) from None
        first = first_address(chosen, config)
        if not first or agreed(f"Is {first} the first receiving address of your wallet?"):
            return chosen


def _checked(file: Path, text: str, config: SignerConfig) -> str:
    try:
        chosen = checked_place(text, config)
    except Malformed as error:
        msg = f"destination: {error.fields['reason']}"  # without the text, which may be a private key
        raise CommandFailed(msg) from None
    if chosen != SEED and not os.access(file.resolve().parent, os.W_OK):  # known before the words are shown for nothing
        msg = (
            f"this user can't write {file}. Write destination_address = '{chosen}' into its section [settlement] as the user "
            "that can, then run this command again"
        )
        raise CommandFailed(msg)
    return chosen
