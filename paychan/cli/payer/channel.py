"""`paychan channel`: the payer's commands. Each calls the client library and shows the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from paychan.cli.payer import ending, pay_command, refund_commands
from paychan.cli.payer.options import (
    CertificateOption,
    CredentialsOption,
    ElectrumOption,
    NameArgument,
    NodeOption,
    TransactionOption,
    WalletOption,
    amount_of,
    examples,
    least,
    read_transaction,
)
from paychan.cli.terminal import JsonOption, err, out, show_json, warn
from paychan.shared.wording import sat

if TYPE_CHECKING:
    from paychan.client import Channel

_PAYMENT_LIMIT_SAT = 1_000_000
_DEFAULT_HOURS = 7 * 24

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)

MovableOption = Annotated[
    bool,
    typer.Option(
        "--movable",
        help="Let the server withdraw its earnings while the channel stays open (version 2). The rest comes back "
        "when you close; if the server closes on its own, by `refund` after the expiry.",
    ),
]


AmountOption = Annotated[
    int,
    typer.Option(
        parser=amount_of,
        metavar="SAT",
        callback=least(0),
        show_default=False,
        help="Amount to fund, in satoshi. \\[default: the smallest]",
    ),
]
FirstPaymentOption = Annotated[
    int | None,
    typer.Option(parser=amount_of, metavar="SAT", help="First payment in satoshi. \\[default: the open price]"),
]


@app.command(
    epilog=examples(
        "paychan channel new https://shop.example --amount 500000",
        "paychan channel new https://shop.example --amount 5000000 --hours 2000 --movable",
        "paychan channel new http://localhost:8000 --debug   (a debug server accepts its funding without a check)",
    )
)
def new(
    url: Annotated[str, typer.Argument(metavar="URL", help="Base URL of the server.")],
    hours: Annotated[
        float, typer.Option(help="Hours for payments. The channel ends later: funding and settling take time, too.")
    ] = _DEFAULT_HOURS,
    expires: Annotated[
        int | None, typer.Option(help="Unix time at which the channel ends and a refund becomes possible.")
    ] = None,
    amount: AmountOption = 0,
    change_address: Annotated[
        str, typer.Option(help="Address of your wallet for the unspent rest. \\[default: the channel's own key]")
    ] = "",
    movable: MovableOption = False,
    v1: Annotated[bool, typer.Option("--v1", help="Use version 1 of the protocol.")] = False,
    dialect: Annotated[Literal["swagger", "api"], typer.Option(help="Dialect of version 2.")] = "swagger",
    network: Annotated[
        Literal["live", "test", "regtest"] | None, typer.Option(help="Accept only this Bitcoin network.")
    ] = None,
    max_open_price: Annotated[
        int, typer.Option(parser=amount_of, metavar="SAT", help="Largest open price to accept, in satoshi.")
    ] = 250_000,
    pay: FirstPaymentOption = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the funding, then open.")] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Use the funding that a debug server derives.")] = False,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Agree on a channel with a server: creates a key, checks the terms, shows the address to fund; then opens it.

    Any wallet can fund: send exactly the shown amount in one output.
    """
    from paychan.cli.payer.invitation import show_invitation, takes_no_coins
    from paychan.cli.payer.terminal import exit_on_error, facts, show
    from paychan.client import Dialect, Limits, Network, Patience, Payer

    with (
        exit_on_error(as_json),
        _fitting(amount=amount, pay=pay, debug=debug, opens=wait and not as_json and not debug),
        Payer(
            url,
            wallet=wallet,
            version=1 if v1 else 2,
            dialect=Dialect(dialect),
            network=None if network is None else Network(network),
            limits=Limits(open_price_sat=max_open_price),
            patience=Patience(attempts=2),  # no coins are at stake yet, and a person waits
        ) as payer,
    ):
        channel = payer.new_channel(
            hours=hours, expires=expires, change_address=change_address, amount_sat=amount, movable=movable
        )
        if debug:
            channel.fund_debug()
        if as_json:
            show_json(facts(channel.record) | {"uri": channel.bip21(), "debug": debug or takes_no_coins(channel)})
        else:
            show(channel.record, False) if debug else show_invitation(channel, payer.wallet.directory)
    if wait and not as_json and not debug:
        open_(channel.name, amount=pay, limit=max(_PAYMENT_LIMIT_SAT, max_open_price), wallet=wallet)


@contextmanager
def _fitting(*, amount: int, pay: int | None, debug: bool, opens: bool) -> Iterator[None]:
    """Refuse options that would be ignored.

    Raises:
        ValueError: an amount for a debug funding, or a first payment for a channel that this command does not open.
    """
    if debug and amount:
        msg = f"got --debug and --amount {amount}: a debug server's funding has an amount of its own, so leave one out"
        raise ValueError(msg)
    if pay is not None and not opens:
        msg = f"got --pay {pay}, but this command only makes the channel: `paychan channel open NAME --amount {pay}` pays it"
        raise ValueError(msg)
    yield


@app.command(
    name="open",
    epilog=examples(
        "paychan channel open 4593d97a   (waits for the funding if necessary)",
        "paychan channel open 4593d97a --outpoint TXID:VOUT --value 500000   (compared with the server's value)",
        "paychan channel open 4593d97a --node http://127.0.0.1:8332 --credentials ~/.bitcoin/.cookie",
    ),
)
def open_(
    name: NameArgument,
    outpoint: Annotated[
        str, typer.Option(help="The output that pays to the address: TXID:VOUT. \\[default: as the server reports]")
    ] = "",
    value: Annotated[
        int, typer.Option(parser=amount_of, metavar="SAT", callback=least(0), help="Its value in satoshi.")
    ] = 0,
    transaction: TransactionOption = "",
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Use the value that you give, even if server or chain show another.")
    ] = False,
    amount: FirstPaymentOption = None,
    limit: Annotated[
        int, typer.Option(parser=amount_of, metavar="SAT", help="Largest first payment, in satoshi.")
    ] = _PAYMENT_LIMIT_SAT,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the funding has enough confirmations.")
    ] = True,
    node: NodeOption = "",
    credentials: CredentialsOption = None,
    electrum: ElectrumOption = "",
    certificate: CertificateOption = None,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Open a funded channel with its first payment; wait for the funding, unless an outpoint is given.

    The output's value is compared with its transaction, or with your own node or Electrum server if you give one: with
    a value that is too low, the difference would be lost.
    """
    from paychan.cli.payer.chain import OwnChain, compare
    from paychan.cli.payer.terminal import exit_on_error, opening, show_receipt
    from paychan.client import Limits, Payer, State

    with (
        exit_on_error(as_json, name, again=f"paychan channel open {name}"),
        Payer(wallet=wallet, limits=Limits(payment_sat=limit)) as payer,
        payer.channel(name) as channel,
    ):
        source = OwnChain(node, credentials, electrum, certificate)
        if not outpoint and (value or transaction or unchecked):
            msg = "--value, --transaction and --unchecked describe an output: name it with --outpoint TXID:VOUT"
            raise ValueError(msg)
        if outpoint:  # the payer's own chain, if there is one, is read below
            believed = unchecked or (source.given and not transaction)
            channel.fund(outpoint, value, transaction=read_transaction(transaction), unchecked=believed)
        elif channel.record.signed_sat is None or channel.record.refused:
            _find_funding(channel, wait=wait and not as_json, own_chain=source.given)
        if source.given and not unchecked and channel.record.state is State.NEW:
            import asyncio

            asyncio.run(compare(source, channel))
        if not as_json:
            warn(opening(channel.record, amount))
        show_receipt(channel, channel.open(amount), as_json)


def _find_funding(channel: Channel, *, wait: bool, own_chain: bool) -> None:
    """Find the funding.

    If the server does not report it, an outpoint recorded earlier or the payer's own chain suffices.
    """
    from paychan.cli.payer.invitation import wait_funded
    from paychan.client import FundingNotTold

    try:
        if wait:
            wait_funded(channel)
        else:
            channel.wait_funded(0)
    except FundingNotTold:
        if not (channel.record.funding_outpoint or own_chain):
            raise


app.command(epilog=pay_command.EXAMPLES)(pay_command.pay)


@app.command(epilog=examples("paychan channel status 4593d97a", "paychan channel status 4593d97a --offline"))
def status(
    name: NameArgument,
    offline: Annotated[
        bool, typer.Option("--offline", help="Show the wallet's data without asking the server.")
    ] = False,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the server for the state of a channel, and whether it accepted a payment that has no answer."""
    from paychan.cli.payer.terminal import exit_on_error, show
    from paychan.client import Payer
    from paychan.client.wallet import Wallet

    with exit_on_error(as_json, name):
        if offline:
            kept = Wallet(wallet)
            show(kept.read(kept.find(name)), as_json)
            return
        with Payer(wallet=wallet) as payer, payer.channel(name) as channel:
            channel.look_for_others()
            channel.status()
            show(channel.record, as_json)


app.command(epilog=ending.CLOSE_EXAMPLES)(ending.close)
app.command(epilog=refund_commands.REFUND_EXAMPLES)(refund_commands.refund)
app.command(epilog=refund_commands.WATCH_EXAMPLES)(refund_commands.watch)
app.command(epilog=ending.FORGET_EXAMPLES)(ending.forget)


@app.command(epilog=examples("paychan channel key 4593d97a"))
def key(name: NameArgument, wallet: WalletOption = None, as_json: JsonOption = False) -> None:
    """Show a channel's private key (WIF), so that a wallet can sweep the returned coins. Keep it secret.

    It shows the key of a forgotten channel, too.
    No wallet can sweep outputs at the channel's own address: that address is a script, and `refund` spends from it.
    """
    import msgspec

    from paychan.cli.payer.terminal import exit_on_error, way_back
    from paychan.client.flows.refund import wif
    from paychan.client.wallet import Wallet

    with exit_on_error(as_json, name):
        record = Wallet(wallet).read_kept(name)
        if as_json:
            shown = {"wif": wif(record), "address": record.home_address, "script_address": record.funding_address}
            held = msgspec.to_builtins(record.held)
            show_json({"name": record.name, **shown, "outputs": held, "way_back": way_back(record)})
            return
        out.print(wif(record), soft_wrap=True, markup=False)
        for each in record.held if way_back(record) else ():
            err.print(
                f"This key does not sweep {sat(each.value_sat)} in {each.outpoint} at {record.funding_address}. "
                f"It comes back {way_back(record)}.",
                soft_wrap=True,
                markup=False,
            )


@app.command(name="list", epilog=examples("paychan channel list", "paychan channel list --json"))
def list_(wallet: WalletOption = None, as_json: JsonOption = False) -> None:
    """Show the channels of the wallet.

    A channel that can't be read is listed with the reason, and the exit status is 1.
    """
    from paychan.cli.payer.terminal import exit_on_error, show_listing
    from paychan.client.wallet import Wallet

    with exit_on_error(as_json):
        records, problems = Wallet(wallet).read_all()
        show_listing(records, problems, as_json)
        if problems:
            raise typer.Exit(1)
