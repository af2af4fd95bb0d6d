"""The commands `paychan channel close` and `forget`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from paychan.cli.payer.options import (
    CertificateOption,
    CredentialsOption,
    ElectrumOption,
    NameArgument,
    NodeOption,
    WalletOption,
    amount_of,
    examples,
    least,
)
from paychan.cli.terminal import JsonOption, command, completed, patiently, say, show_json, warn
from paychan.shared.wording import sat

if TYPE_CHECKING:
    from collections.abc import Callable

    from paychan.client import ChannelRecord
    from paychan.client.flows.close import Settled

CLOSE_EXAMPLES = examples(
    "paychan channel close 4593d97a",
    "paychan channel close 4593d97a --fee 2000 --to mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY   (version 2)",
)
FORGET_EXAMPLES = examples(
    "paychan channel forget 4593d97a",
    "paychan channel forget 4593d97a 77c0ffee --node http://127.0.0.1:8332 --credentials ~/.bitcoin/.cookie",
)


FeeOption = Annotated[
    int,
    typer.Option(parser=amount_of, metavar="SAT", help="Fee in satoshi to offer for a faster settlement (version 2)."),
]
MostFeeOption = Annotated[
    int | None,
    typer.Option(
        parser=amount_of,
        metavar="SAT",
        callback=least(1),
        help="Highest fee to offer. \\[default: 10 % of the rest, and 100 per byte]",
    ),
]


def close(
    name: NameArgument,
    fee: FeeOption = 0,
    max_fee: MostFeeOption = None,
    to: Annotated[str, typer.Option(help="Another address for the change (version 2).")] = "",
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the server settle a channel: the unpaid rest comes back.

    An offered fee is a payment; the fee that the settlement really pays is shown.
    """
    import msgspec

    from paychan.cli.payer.terminal import exit_on_error, unchecked
    from paychan.client import FeeTooHigh, Payer

    with exit_on_error(as_json, name), Payer(wallet=wallet) as payer, payer.channel(name) as channel:
        doubt, had = unchecked(channel.record), channel.record
        waits = None if as_json else _waiting(channel.name)
        try:
            with patiently("Waiting for the server's settlement."):
                settled = channel.close(fee, to, max_fee_sat=max_fee, waits=waits)
        except FeeTooHigh as error:
            if as_json or max_fee is not None or not sys.stdin.isatty():
                raise
            typer.confirm(f"{error}. Offer {fee} sat anyway?", abort=True)
            settled = channel.close(fee, to, max_fee_sat=fee, waits=waits)
        returned = settled.change_sat + settled.offered_fee_sat == had.agreed_sat
        dropped = had.pending_sat if returned and had.closing_sat is None else 0
        if as_json:
            show_json({"name": channel.name, **msgspec.to_builtins(settled), "dropped_sat": dropped})
            return
        _show_settled(channel.name, settled, doubt, dropped, own_address=bool(to))


def _show_settled(name: str, settled: Settled, doubt: str, dropped: int, *, own_address: bool) -> None:
    """Show the settlement, the fee, and how the change is spent; `dropped` satoshi were signed and never accepted."""
    from paychan.cli.payer.terminal import show_panel

    offered, paid = settled.offered_fee_sat, settled.paid_fee_sat
    by_all = "not known: the server showed no settlement of this channel alone"
    show_panel(
        f"Channel {name}",
        ("Before", "the channel had ended before this command" if settled.before else ""),
        ("Settled by", settled.settlement_txid),
        ("Spends", settled.outpoint),
        ("Value", doubt),
        (
            "Comes back",
            f"{sat(settled.change_sat)} to {settled.change_address}" if settled.change_sat else "nothing",
        ),
        (
            "Not paid",
            f"{sat(dropped)} of a payment that no answer accepted: they come back, too" if dropped else "",
        ),
        (
            "Fee",
            (f"{sat(offered)} offered; " if offered else "") + (by_all if paid is None else f"{sat(paid)} paid"),
        ),
        (
            "Key",
            ""
            if own_address
            else completed(f"`paychan channel key {name}`, unless that address belongs to your own wallet"),
        ),
        ("Next", command("channel", "status", name)),
    )
    if paid is not None and offered > paid:
        warn(f"The server keeps {sat(offered - paid)} of the fee that you offered, because the settlement pays less.")


def _confirm(record: ChannelRecord, *, yes: bool, as_json: bool) -> None:
    """Ask before a channel with an address for real coins is forgotten: late coins there would go unseen.

    Raises:
        ValueError: no terminal to ask at, and no --yes.
    """
    if yes or record.network.value != "live":
        return
    question = f"coins that still come to {record.funding_address} will be seen by no command, since {record.name} is forgotten"
    if as_json or not sys.stdin.isatty():
        msg = f"{question}: --yes confirms it where there is no terminal to ask at"
        raise ValueError(msg)
    typer.confirm(f"{question}. Go on?", abort=True)


YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask before a channel of the network live is forgotten.")]


def _waiting(name: str) -> Callable[[str], None]:
    """Return a function that says once that a closing was accepted, and why there is no settlement yet."""
    said: list[str] = []

    def waits(code: str) -> None:
        why = {
            "signer_unavailable": "The server has accepted the closing, but its signer is away.",
            "channel_closing": "The server has accepted the closing, and has not settled it yet.",
        }.get(code)
        if why and not said:
            said.append(code)
            warn(
                f"{why} It settles by itself later, so you may end this command (Ctrl-C); "
                f"`paychan channel status {name}` shows the settlement."
            )

    return waits


def forget(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Channels as in `paychan channel list`.")],
    yes: YesOption = False,
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
                _confirm(channel.record, yes=yes, as_json=as_json)
                address = channel.address
                path = channel.forget(chain_was_asked=source.given)
            kept.append({"name": name, "file": str(path)})
            if not as_json:
                say(
                    f"Forgot {name}. Its key and all else of it are kept in {path}, and in each later backup, in case "
                    f"coins still arrive at {address}. `paychan channel key {name}` shows the key; the file, moved back "
                    f"to {payer.wallet.directory}, is a channel again."
                )
        if as_json:
            show_json(kept)
