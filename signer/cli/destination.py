"""The question of `init` where the earnings go, and the answer in the configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from paychan.protocol.address import encode_address
from paychan.protocol.errors import Malformed
from paychan.protocol.types import Network
from signer.cli.options import CommandFailed, on_terminal
from signer.cli.rotate import replace_config, with_destination
from signer.cli.terminal import out, say
from signer.config import SignerConfig
from signer.keys.payout import Payout, Wallet, parse_payout

SEED = "seed"
"""The answer that leaves the earnings on addresses of the signer's own seed."""

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


def choose_destination(file: Path, config: SignerConfig, given: str) -> str:
    """Return what the operator chose: an address, a descriptor, or "seed"; nothing is written yet.

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


def said(chosen: str) -> str:
    """Return a sentence about the place that the operator chose."""
    if chosen == SEED:
        return "Earnings go to addresses of the seed: `paychan-signer earnings FILE` lists them, `sweep` spends them."
    return f"Earnings go to {chosen}."


def first_address(payout: Payout, network: Network) -> str:
    """Return the first receiving address of a wallet, to be compared with what the wallet shows; "" for an address."""
    return encode_address(payout.at(0), network) if isinstance(payout, Wallet) else ""


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
        first = "" if chosen == SEED else first_address(parse_payout(chosen, Network(config.network)), _network(config))
        if not first or out.input(f"Is {first} the first receiving address of your wallet? yes or no: ") == "yes":
            return chosen


def _checked(file: Path, text: str, config: SignerConfig) -> str:
    if text == SEED:
        return text
    try:
        parse_payout(text, _network(config))
    except Malformed as error:
        msg = f"destination: {error.fields['reason']}"  # without the text, which may be a private key
        raise CommandFailed(msg) from None
    if not os.access(file.resolve().parent, os.W_OK):  # known before the words are shown for nothing
        msg = (
            f"this user can't write {file}. Write destination_address = '{text}' into its section [settlement] as the user "
            "that can, then run this command again"
        )
        raise CommandFailed(msg)
    return text


def _network(config: SignerConfig) -> Network:
    return Network(config.network)
