"""The commands `paychan channel refund` and `watch`; module `refund` does the work."""

from __future__ import annotations

from typing import Annotated

import typer

from paychan.cli.payer.options import (
    CertificateOption,
    CredentialsOption,
    ElectrumOption,
    MaxFeeOption,
    NameArgument,
    NodeOption,
    RateOption,
    ToOption,
    TransactionOption,
    WalletOption,
    examples,
    read_transaction,
)
from paychan.cli.terminal import JsonOption, fail, show_json

REFUND_EXAMPLES = examples(
    "paychan channel refund 4593d97a",
    "paychan channel refund 4593d97a --fee-rate 10 --to mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY",
    "paychan channel refund 4593d97a --publish --node http://127.0.0.1:8332 --credentials ~/.bitcoin/.cookie",
    "paychan channel refund 4593d97a --publish --electrum ssl://electrum.example:50002",
)
WATCH_EXAMPLES = examples(
    "paychan channel watch --node http://127.0.0.1:8332 --credentials ~/.bitcoin/.cookie",
    "paychan channel watch 4593d97a --electrum ssl://electrum.example:50002 --once   (for cron)",
)


def refund(
    name: NameArgument,
    fee_rate: RateOption = None,
    to: ToOption = "",
    publish_it: Annotated[
        bool, typer.Option("--publish", help="Broadcast it if it is valid; again with --fee-rate to replace it.")
    ] = False,
    max_fee: MaxFeeOption = None,
    transaction: TransactionOption = "",
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Sign for a value that was not checked; any value beyond it is lost.")
    ] = False,
    node: NodeOption = "",
    credentials: CredentialsOption = None,
    electrum: ElectrumOption = "",
    certificate: CertificateOption = None,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Get all coins back after the expiry, if the server never settles: sign the refund, or broadcast it.

    With your own node or Electrum server, which --publish needs, it spends all outputs at the channel's address, with
    the values that the chain shows; the paychan server is not asked. --fee-rate replaces a refund that was broadcast
    before.
    """
    import asyncio

    from paychan.cli.payer import refund as recovery
    from paychan.cli.payer.chain import OwnChain, RefundOptions
    from paychan.cli.payer.terminal import exit_on_error
    from paychan.client import Payer

    with exit_on_error(as_json, name), Payer(wallet=wallet) as payer:
        source, options = OwnChain(node, credentials, electrum, certificate), RefundOptions(fee_rate, to, max_fee)
        name = payer.wallet.find(name)
        if transaction:
            with payer.channel(name) as channel:
                channel.prove(read_transaction(transaction))
        if publish_it:
            shown = asyncio.run(recovery.publish_now(source, payer, name, options))
            recovery.show_published(shown, source, as_json)
            return
        if source.given:
            asyncio.run(recovery.look_at(source, payer, name))
        with payer.channel(name) as channel:
            signed = recovery.sign(channel, options, unchecked=unchecked)
            recovery.show_signed(channel.record, signed, source, to, as_json)


def watch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help=r"Channels. \[default: all of the wallet]")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Scan and act once, for cron.")] = False,
    fee_rate: RateOption = None,
    to: ToOption = "",
    max_fee: MaxFeeOption = None,
    node: NodeOption = "",
    credentials: CredentialsOption = None,
    electrum: ElectrumOption = "",
    certificate: CertificateOption = None,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Follow channels in the chain, and broadcast their refunds when these become valid; the server is not asked.

    Scans every address that the wallet ever used, including those of ended channels, so a late payment is found. Ends
    when no change is expected any more. A failure of one channel stops no other; the exit status is then 1, as for an
    open channel of another network, which is skipped. --json scans once.
    """
    import asyncio

    from paychan.cli.payer import refund as recovery
    from paychan.cli.payer.chain import OwnChain, RefundOptions
    from paychan.cli.payer.outputs import facts
    from paychan.cli.payer.terminal import exit_on_error, problem_facts
    from paychan.client import Payer

    with exit_on_error(as_json), Payer(wallet=wallet) as payer:
        source, options = OwnChain(node, credentials, electrum, certificate), RefundOptions(fee_rate, to, max_fee)
        chosen = [payer.wallet.find(name) for name in names or []]
        try:
            seen = asyncio.run(recovery.follow(source, payer, chosen, options, once=once or as_json, quiet=as_json))
        except KeyboardInterrupt:
            fail("stopped watching; the refunds remain possible after the expiry.", 130)
        failed = any(recovery.is_failure(view) for view in seen.values())
        if as_json:
            shown = [
                problem_facts(name, view) if isinstance(view, Exception) else facts(view) for name, view in seen.items()
            ]
            show_json(shown)
        if failed:
            raise typer.Exit(1)
