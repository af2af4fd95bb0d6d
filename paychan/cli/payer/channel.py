"""`paychan channel`: the payer's commands. Each asks the client library and shows what came of it."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from paychan.cli.payer import refund as payerrefund
from paychan.cli.payer.chain import OwnChain, compare
from paychan.cli.payer.options import (
    CertificateOption,
    CredentialsOption,
    ElectrumOption,
    NodeOption,
    TransactionOption,
    read_transaction,
)
from paychan.cli.payer.terminal import (
    JsonOption,
    NameArgument,
    WalletOption,
    examples,
    facts,
    next_step,
    sat,
    show,
    show_invitation,
    show_listing,
    show_panel,
    told,
    unchecked,
    wait_funded,
    way_back,
)
from paychan.cli.terminal import err, fail, out
from paychan.client import (
    Channel,
    Dialect,
    FeeTooHigh,
    FundingNotTold,
    Limits,
    Network,
    Patience,
    Payer,
    Receipt,
    State,
)
from paychan.client.payer import DEFAULT_HOURS

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)

MovableOption = Annotated[
    bool,
    typer.Option(
        "--movable",
        help="Let the server withdraw what it earned while the channel goes on (version 2). What is left comes back "
        "when you close; if the server closes on its own, by `refund` after the expiry.",
    ),
]


@app.command(
    epilog=examples(
        "paychan channel new https://shop.example --amount 500000",
        "paychan channel new https://shop.example --amount 5000000 --hours 2000 --movable",
        "paychan channel new http://localhost:8000 --debug   (a debug server believes its funding)",
    )
)
def new(
    url: Annotated[str, typer.Argument(help="Base URL of the server.")],
    hours: Annotated[
        float, typer.Option(help="Hours of paying. The channel ends later: funding and settling take their time, too.")
    ] = DEFAULT_HOURS,
    expires: Annotated[
        int | None, typer.Option(help="When the channel ends and a refund is possible, as a Unix time.")
    ] = None,
    amount: Annotated[
        int,
        typer.Option(min=0, show_default=False, help="What you mean to lock up, in satoshi. \\[default: the least]"),
    ] = 0,
    change_address: Annotated[
        str, typer.Option(help="Address of your wallet for what is not spent. \\[default: the channel's own key]")
    ] = "",
    movable: MovableOption = False,
    v1: Annotated[bool, typer.Option("--v1", help="Speak version 1 of the protocol.")] = False,
    dialect: Annotated[Dialect, typer.Option(help="Dialect of version 2.")] = Dialect.S,
    network: Annotated[Network | None, typer.Option(help="Accept this Bitcoin network only.")] = None,
    max_open_price: Annotated[int, typer.Option(help="Largest open price to accept, in satoshi.")] = 250_000,
    pay: Annotated[int | None, typer.Option(help="First payment in satoshi. \\[default: the open price]")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the funding, then open.")] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Use the funding that a debug server derives.")] = False,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Agree on a channel with a server: makes a key, checks the terms, shows the address to fund; then opens it.

    Any wallet can fund. Send what is asked for in one output, and no more: how much arrived, the server says.
    """
    limits = Limits(open_price_sat=max_open_price)
    patience = Patience(attempts=2)  # nothing is at stake yet, and somebody waits
    with (
        told(as_json),
        Payer(
            url,
            wallet=wallet,
            version=1 if v1 else 2,
            dialect=dialect,
            network=network,
            limits=limits,
            patience=patience,
        ) as payer,
    ):
        channel = payer.new_channel(
            hours=hours, expires=expires, change_address=change_address, amount_sat=amount, movable=movable
        )
        if debug:
            channel.fund_debug()
        uri = channel.bip21()
        if as_json:
            out.print_json(data=facts(channel.record) | {"uri": uri})
        elif debug:
            show(channel.record, as_json)
        else:
            show_invitation(channel.record, uri, payer.wallet.directory)
    if wait and not as_json and not debug:
        open_(channel.name, amount=pay, wallet=wallet)


@app.command(
    name="open",
    epilog=examples(
        "paychan channel open 4593d97a   (waits for the funding if need be)",
        "paychan channel open 4593d97a --outpoint 2fc6…0a1b:0 --value 500000   (compared with what the server shows)",
        "paychan channel open 4593d97a --outpoint 2fc6…0a1b:0 --transaction tx.hex   (proves the value)",
        "paychan channel open 4593d97a --node http://127.0.0.1:8332 --credentials ~/.bitcoin/.cookie",
    ),
)
def open_(
    name: NameArgument,
    outpoint: Annotated[
        str, typer.Option(help="The output that pays to the address: TXID:VOUT. \\[default: as the server tells]")
    ] = "",
    value: Annotated[int, typer.Option(min=0, help="Its value in satoshi.")] = 0,
    transaction: TransactionOption = "",
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Believe the value that you type, whatever the server or chain shows.")
    ] = False,
    amount: Annotated[int | None, typer.Option(help="First payment in satoshi. \\[default: the open price]")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the funding is deep enough.")] = True,
    node: NodeOption = "",
    credentials: CredentialsOption = None,
    electrum: ElectrumOption = "",
    certificate: CertificateOption = None,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Open a funded channel with its first payment; wait for the funding, unless an outpoint is given.

    What the output holds is compared with its transaction, or with your own node or Electrum server if you name one: less
    than it holds, and the difference would be given away.
    """
    with (
        told(as_json, name, again=f"paychan channel open {name}"),
        Payer(wallet=wallet) as payer,
        payer.channel(name) as channel,
    ):
        source = OwnChain(node, credentials, electrum, certificate)
        if outpoint:  # the payer's own chain, if there is one, is asked below
            believed = unchecked or (source.given and not transaction)
            channel.fund(outpoint, value, transaction=read_transaction(transaction), unchecked=believed)
        elif channel.record.signed_sat is None or channel.record.refused:
            _find_funding(channel, wait=wait and not as_json, own_chain=source.given)
        if source.given and not unchecked and channel.record.state is State.NEW:
            asyncio.run(compare(source, channel))
        show_receipt(channel, channel.open(amount), as_json)


def _find_funding(channel: Channel, *, wait: bool, own_chain: bool) -> None:
    """Have the funding found; an outpoint noted earlier, or the payer's own chain, will do for servers that don't tell."""
    try:
        if wait:
            wait_funded(channel)
        else:
            channel.wait_funded(0)
    except FundingNotTold:
        if not (channel.record.funding_outpoint or own_chain):
            raise


@app.command(
    epilog=examples(
        "paychan channel pay 4593d97a 1000",
        "paychan channel pay 4593d97a 1 --times 1000",
        "paychan channel pay 4593d97a 10 --every 1   (10 sat a second, until Ctrl-C)",
        "paychan channel pay 4593d97a --drain    (everything that is left, which closes the channel)",
        "paychan channel pay 4593d97a --resume   (the last payment again, whose answer was lost)",
    )
)
def pay(
    name: NameArgument,
    amount: Annotated[int, typer.Argument(metavar="SAT", help="Satoshi to pay.", show_default=False)] = 0,
    times: Annotated[
        int | None, typer.Option(min=1, help="Pay so many times. \\[default: once; with --every until Ctrl-C]")
    ] = None,
    every: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait so long between two payments.")] = 0.0,
    drain: Annotated[bool, typer.Option("--drain", help="Pay everything that is left.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Send the last payment again; it counts once.")] = False,
    data: Annotated[str, typer.Option(help="What to tell the application behind the server (version 2).")] = "",
    limit: Annotated[int, typer.Option(help="Refuse to pay more at once, in satoshi.")] = 1_000_000,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pay over an open channel."""
    limits = Limits(payment_sat=limit)
    with told(as_json, name), Payer(wallet=wallet, limits=limits) as payer, payer.channel(name) as channel:
        if resume:
            show_receipt(channel, channel.resume(), as_json)
        elif drain or (times in (None, 1) and not every):
            show_receipt(channel, channel.pay(amount, drain=drain, application_data=data), as_json)
        else:
            _pay_many(channel, amount, times or channel.left_sat, every, data, as_json)


def _pay_many(channel: Channel, amount: int, times: int, every: float, data: str, as_json: bool) -> None:
    """Pay again and again, with a bar and the rate. Ctrl-C leaves what is under way to be completed, which it says."""
    columns = (
        TextColumn("Paying"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} payments/s"),
        TimeElapsedColumn(),
    )
    begun, done = time.monotonic(), 0
    with Progress(*columns, console=err, transient=True, disable=as_json) as progress:
        task = progress.add_task("", total=times, rate=0.0)

        def show_progress(payments: int) -> None:
            nonlocal done
            done = payments
            progress.update(task, completed=done, rate=done / (time.monotonic() - begun))

        try:
            receipt = channel.pay_many(amount, times, every_seconds=every, application_data=data, watcher=show_progress)
        except KeyboardInterrupt:
            progress.stop()
            under_way = channel.record.pending_sat // max(1, amount)
            rest = f"`paychan channel pay {channel.name} --resume` completes the {under_way} under way."
            fail(f"stopped after {done} payments{f'. {rest}' if under_way else ', all of them acknowledged.'}", 130)
    show_receipt(channel, receipt, as_json, payments=times, seconds=round(time.monotonic() - begun, 3))


def show_receipt(channel: Channel, receipt: Receipt, as_json: bool, *, payments: int = 1, seconds: float = 0.0) -> None:
    """Show what a payment, or the last of many, came to."""
    if as_json:
        more = {"seconds": seconds} if seconds else {}
        out.print_json(data={"name": channel.name, "payments": payments, **msgspec.to_builtins(receipt), **more})
        return
    paid = sat(receipt.paid_sat) + (" (the server had it already)" if receipt.repeated else "")
    show_panel(
        f"Channel {channel.name}",
        ("Paid", paid if payments == 1 else f"{payments} times {paid}, {payments / seconds:.0f} payments/s"),
        ("In all", sat(receipt.total_paid_sat)),
        ("Left", sat(receipt.left_sat)),
        ("Value", unchecked(channel.record)),
        ("Answer", receipt.application_data),
        ("Settled by", receipt.settlement_txid),
        ("Next", next_step(channel.record) if channel.record.paid_sat == receipt.paid_sat else ""),
    )


@app.command(epilog=examples("paychan channel status 4593d97a", "paychan channel status 4593d97a --offline"))
def status(
    name: NameArgument,
    offline: Annotated[bool, typer.Option("--offline", help="Show what the wallet knows, ask nobody.")] = False,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the server how a channel stands; learn whether a payment without an answer was booked."""
    with told(as_json, name), Payer(wallet=wallet) as payer:
        if offline:
            show(payer.wallet.read(payer.wallet.find(name)), as_json)
            return
        with payer.channel(name) as channel:
            channel.look_for_others()
            channel.status()
            show(channel.record, as_json)


@app.command(
    epilog=examples(
        "paychan channel close 4593d97a",
        "paychan channel close 4593d97a --fee 2000 --to mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY   (version 2)",
    )
)
def close(
    name: NameArgument,
    fee: Annotated[int, typer.Option(help="Fee in satoshi to offer for a faster settlement (version 2).")] = 0,
    max_fee: Annotated[
        int | None, typer.Option(min=1, help="Offer up to this. \\[default: 10 % of what is left, and 100 per byte]")
    ] = None,
    to: Annotated[str, typer.Option(help="Another address for the change (version 2).")] = "",
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have the server settle a channel: what was not paid comes back.

    A fee that is offered is a payment: what the settlement really pays is shown.
    """
    with told(as_json, name), Payer(wallet=wallet) as payer, payer.channel(name) as channel:
        doubt = unchecked(channel.record)
        try:
            settled = channel.close(fee, to, max_fee_sat=max_fee)
        except FeeTooHigh as error:
            if as_json or max_fee is not None or not sys.stdin.isatty():
                raise
            typer.confirm(f"{error}. Offer {fee} sat nevertheless?", abort=True)
            settled = channel.close(fee, to, max_fee_sat=fee)
        if as_json:
            out.print_json(data={"name": channel.name, **msgspec.to_builtins(settled)})
            return
        offered, paid = settled.offered_fee_sat, settled.paid_fee_sat
        by_all = "not known: the server showed no settlement of this channel alone"
        show_panel(
            f"Channel {channel.name}",
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
            ("Key", "" if to else f"`paychan channel key {channel.name}`, if that address is not of your own wallet"),
        )
        if paid is not None and offered > paid:
            err.print(
                f"The server keeps {sat(offered - paid)} of the fee that you offered: the settlement pays less.",
                soft_wrap=True,
            )


app.command(epilog=payerrefund.REFUND_EXAMPLES)(payerrefund.refund)
app.command(epilog=payerrefund.WATCH_EXAMPLES)(payerrefund.watch)


@app.command(epilog=examples("paychan channel key 4593d97a"))
def key(name: NameArgument, wallet: WalletOption = None, as_json: JsonOption = False) -> None:
    """Show a channel's private key (WIF), for a wallet to sweep what came back. Show it to nobody.

    What lies at the channel's own address no wallet can sweep: that is a script, and `refund` brings it home.
    """
    with told(as_json, name), Payer(wallet=wallet) as payer, payer.channel(name) as channel:
        record = channel.record
        if as_json:
            shown = {"wif": channel.wif(), "address": record.home_address, "script_address": record.funding_address}
            held = msgspec.to_builtins(record.held)
            out.print_json(data={"name": channel.name, **shown, "outputs": held, "way_back": way_back(record)})
            return
        out.print(channel.wif())
        for each in record.held:
            err.print(
                f"This key does not sweep {sat(each.value_sat)} in {each.outpoint} at {record.funding_address}. "
                f"{way_back(record)}",
                soft_wrap=True,
                markup=False,
            )


@app.command(name="list", epilog=examples("paychan channel list", "paychan channel list --json"))
def list_(wallet: WalletOption = None, as_json: JsonOption = False) -> None:
    """Show the channels of the wallet, each on its own: one that can't be read is named, and the exit status is 1."""
    with told(as_json), Payer(wallet=wallet) as payer:
        records, problems = payer.wallet.read_all()
        show_listing(records, problems, as_json)
        if problems:
            raise typer.Exit(1)
