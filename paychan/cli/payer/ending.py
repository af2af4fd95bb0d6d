"""The commands `paychan channel close` and `forget`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from paychan.cli.payer.options import (
    CertificateOption,
    CredentialsOption,
    ElectrumOption,
    NameArgument,
    NodeOption,
    WalletOption,
    examples,
)
from paychan.cli.terminal import JsonOption, completed, say, show_json, warn
from paychan.shared.wording import sat

CLOSE_EXAMPLES = examples(
    "paychan channel close 4593d97a",
    "paychan channel close 4593d97a --fee 2000 --to mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY   (version 2)",
)
FORGET_EXAMPLES = examples(
    "paychan channel forget 4593d97a",
    "paychan channel forget 4593d97a 77c0ffee --node http://127.0.0.1:8332 --credentials ~/.bitcoin/.cookie",
)


def close(
    name: NameArgument,
    fee: Annotated[int, typer.Option(help="Fee in satoshi to offer for a faster settlement (version 2).")] = 0,
    max_fee: Annotated[
        int | None, typer.Option(min=1, help="Highest fee to offer. \\[default: 10 % of the rest, and 100 per byte]")
    ] = None,
    to: Annotated[str, typer.Option(help="Another address for the change (version 2).")] = "",
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the server settle a channel: the unpaid rest comes back.

    An offered fee is a payment; the fee that the settlement really pays is shown.
    """
    import msgspec

    from paychan.cli.payer.terminal import exit_on_error, show_panel, unchecked
    from paychan.client import FeeTooHigh, Payer

    with exit_on_error(as_json, name), Payer(wallet=wallet) as payer, payer.channel(name) as channel:
        doubt = unchecked(channel.record)
        try:
            settled = channel.close(fee, to, max_fee_sat=max_fee)
        except FeeTooHigh as error:
            if as_json or max_fee is not None or not sys.stdin.isatty():
                raise
            typer.confirm(f"{error}. Offer {fee} sat anyway?", abort=True)
            settled = channel.close(fee, to, max_fee_sat=fee)
        if as_json:
            show_json({"name": channel.name, **msgspec.to_builtins(settled)})
            return
        offered, paid = settled.offered_fee_sat, settled.paid_fee_sat
        by_all = "not known: the server showed no settlement of this channel alone"
        show_panel(
            f"Channel {channel.name}",
            ("Before", "the channel had ended before this command" if settled.before else ""),
            ("Settled by", settled.settlement_txid),
            ("Spends", settled.outpoint),
            ("Value", doubt),
            (
                "Comes back",
                f"{sat(settled.change_sat)} to {settled.change_address}" if settled.change_sat else "nothing",
            ),
            (
                "Fee",
                (f"{sat(offered)} offered; " if offered else "") + (by_all if paid is None else f"{sat(paid)} paid"),
            ),
            (
                "Key",
                ""
                if to
                else completed(f"`paychan channel key {channel.name}`, unless that address belongs to your own wallet"),
            ),
        )
        if paid is not None and offered > paid:
            warn(
                f"The server keeps {sat(offered - paid)} of the fee that you offered, because the settlement pays less."
            )


def forget(
    names: Annotated[list[str], typer.Argument(help="Channels as in `paychan channel list`.")],
    node: NodeOption = "",
    credentials: CredentialsOption = None,
    electrum: ElectrumOption = "",
    certificate: CertificateOption = None,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take channels without coins off the list: never funded, of debug mode, or ended with nothing left to fetch.

    While coins could be there, the command refuses. Server or own chain say whether an output pays to the address. The
    file with the key is kept in the wallet's directory `forgotten`; moved back, it is a channel again.
    """
    from paychan.cli.payer.chain import OwnChain
    from paychan.cli.payer.terminal import exit_on_error
    from paychan.client import Payer

    source, kept = OwnChain(node, credentials, electrum, certificate), []
    with exit_on_error(as_json), Payer(wallet=wallet) as payer:
        for name in [payer.wallet.find(each) for each in names]:
            if source.given:
                import asyncio

                from paychan.cli.payer.refund import look_at

                asyncio.run(look_at(source, payer, name))
            with payer.channel(name) as channel:
                address = channel.address
                path = channel.forget(chain_was_asked=source.given)
            kept.append({"name": name, "file": str(path)})
            if not as_json:
                say(f"Forgot {name}. Its key is kept in {path}, in case coins still arrive at {address}.")
        if as_json:
            show_json(kept)
