"""`paychan channel refund` and `watch`: how a payer gets back what a server did not settle."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from paychan.chain.base import ChainFailed, ChainUnfit
from paychan.cli.payer_terminal import (
    JsonOption,
    NameArgument,
    WalletOption,
    examples,
    moment,
    relative,
    sat,
    show_panel,
    told,
)
from paychan.cli.payerchain import (
    DEEP,
    Facts,
    Sight,
    Source,
    Wish,
    act,
    attend,
    confirmations,
    connected,
    facts,
    find_funding,
    look,
    publish,
    shown_txid,
    story,
)
from paychan.cli.terminal import err, fail, out
from paychan.client import ChannelRecord, Payer, State
from paychan.client.recovery import REFUND_SAT_PER_VB, is_refund
from paychan.protocol.debugfunding import debug_outpoint

_LOOK_SECONDS = 60.0
"""Between two looks when the chain tells of nothing."""

_PAUSE_SECONDS = 5.0
"""After a chain that can't be asked."""

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

NodeOption = Annotated[str, typer.Option("--node", help="Your own bitcoind: http://host:port.")]
CredentialsOption = Annotated[
    Path | None, typer.Option("--credentials", help="File with user:password of the node, such as its .cookie.")
]
ElectrumOption = Annotated[str, typer.Option("--electrum", help="Electrum server: ssl://host:port or tcp://host:port.")]
CertificateOption = Annotated[
    Path | None, typer.Option("--certificate", help="The Electrum server's own certificate, if nobody signed it.")
]
RateOption = Annotated[
    int | None,
    typer.Option("--fee-rate", min=1, help="Satoshi per byte. \\[default: the chain's estimate if asked, or else 2]"),
]
ToOption = Annotated[str, typer.Option("--to", help="Address that gets everything. \\[default: the change address]")]


def refund(
    name: NameArgument,
    fee_rate: RateOption = None,
    to: ToOption = "",
    publish_it: Annotated[bool, typer.Option("--publish", help="Publish it, if its time has come.")] = False,
    node: NodeOption = "",
    credentials: CredentialsOption = None,
    electrum: ElectrumOption = "",
    certificate: CertificateOption = None,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take everything back after the expiry, if the server never settles: sign the refund, or publish it.

    With --publish, your own node or Electrum server is asked; the paychan server is not.
    """
    with told(as_json, name), Payer(wallet=wallet) as payer:
        if publish_it:
            source = Source(node, credentials, electrum, certificate)
            shown = asyncio.run(_publish(source, payer, payer.wallet.find(name), Wish(fee_rate, to)))
            _show_published(shown, as_json)
        else:
            _show_signed(payer, name, fee_rate or REFUND_SAT_PER_VB, to, as_json)


async def _publish(source: Source, payer: Payer, name: str, wish: Wish) -> Facts:
    """Publish one refund, and say what came of it.

    Raises:
        ValueError: its time has not come, or there is nothing to take back.
    """
    record = payer.wallet.read(name)
    async with connected(source, record.network) as chain:
        record = await find_funding(chain, payer, record)
        if not record.funding_outpoint:
            msg = f"nothing to take back: the chain shows no funding of {record.funding_address}"
            raise ValueError(msg)
        sight = await look(chain, record)
        if sight.refund_valid:
            signed = await publish(chain, payer, sight, wish)
            return {"name": name, "txid": shown_txid(signed.txid), "fee_sat": signed.fee_sat, "confirmations": 0}
        sight = await act(chain, payer, sight, wish)
    if sight.spend is not None and is_refund(sight.record, shown_txid(sight.spend.txid)):
        return {"name": name, "txid": shown_txid(sight.spend.txid), "confirmations": sight.spend.confirmations}
    if sight.funding is None:
        msg = f"nothing to take back: {story(sight)}"
        raise ValueError(msg)
    left = relative(record.expiry - sight.tip.median_time)
    msg = (
        f"too early: the refund is valid {left} by the chain's median time, after {moment(record.expiry)} by the clock. "
        f"`paychan channel watch {name}` publishes it then"
    )
    raise ValueError(msg)


def _show_published(shown: Facts, as_json: bool) -> None:
    if as_json:
        out.print_json(data=shown)
        return
    depth = shown["confirmations"]
    show_panel(
        f"Refund of channel {shown['name']}",
        ("Published", f"{shown['txid']}, " + (confirmations(depth) if depth else "not in a block yet")),
        ("Fee", sat(shown["fee_sat"]) if "fee_sat" in shown else ""),
        ("Next", "" if depth >= DEEP else f"paychan channel watch {shown['name']}"),
    )


def _show_signed(payer: Payer, name: str, fee_rate: int, to: str, as_json: bool) -> None:
    with payer.channel(name) as channel:
        signed, record = channel.refund(fee_rate, to), channel.record
    raw, txid = signed.transaction.hex(), shown_txid(signed.txid)
    if as_json:
        shown = {"transaction": raw, "txid": txid, "fee_sat": signed.fee_sat, "valid_after": record.expiry}
        out.print_json(data={"name": record.name, **shown})
        return
    show_panel(
        f"Refund of channel {record.name}",
        ("Pays", f"{sat(record.funding_sat - signed.fee_sat)} to {to or record.home_address}"),
        ("Fee", f"{sat(signed.fee_sat)}, {fee_rate} sat per byte"),
        ("Valid", f"once the chain's median time has passed {moment(record.expiry)}"),
        ("Useless", f"settled already by {record.settlement_txid}" if record.state is State.CLOSED else ""),
        ("Next", f"then: paychan channel refund {record.name} --publish, or hand the line below to any node"),
    )
    out.print(raw, soft_wrap=True)


def watch(
    names: Annotated[list[str] | None, typer.Argument(help="Channels. \\[default: all that are funded]")] = None,
    once: Annotated[bool, typer.Option("--once", help="Look and act once, for cron.")] = False,
    fee_rate: RateOption = None,
    to: ToOption = "",
    node: NodeOption = "",
    credentials: CredentialsOption = None,
    electrum: ElectrumOption = "",
    certificate: CertificateOption = None,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Follow channels in the chain, and publish their refunds when their time has come; the server isn't asked.

    Ends when all channels have ended. --json looks once.
    """
    with told(as_json), Payer(wallet=wallet) as payer:
        source, wish = Source(node, credentials, electrum, certificate), Wish(fee_rate, to)
        chosen = [payer.wallet.find(name) for name in names or []]
        try:
            sights = asyncio.run(_watch(source, payer, chosen, wish, once=once or as_json, quiet=as_json))
        except KeyboardInterrupt:
            fail("stopped watching; refunds stay yours after the expiry.", 130)
        if as_json:
            out.print_json(data=[facts(sight) for sight in sights])


async def _watch(
    source: Source, payer: Payer, chosen: list[str], wish: Wish, *, once: bool, quiet: bool
) -> list[Sight]:
    """Look and act, once or until nothing is left; return the last sights."""
    names = chosen or [each.name for each in payer.records() if _to_watch(each)]
    networks = {payer.wallet.read(name).network for name in names}
    if len(networks) > 1:
        msg = "channels of more than one Bitcoin network: name those of one"
        raise ValueError(msg)
    if not names:
        out.print("" if quiet else "Nothing to watch.", end="" if quiet else "\n")
        return []
    told_before: dict[str, str] = {}
    async with connected(source, networks.pop()) as chain:
        while True:
            try:
                sights = [await attend(chain, payer, name, wish) for name in names]
                if not quiet:
                    _tell_news(sights, told_before)
                names = [sight.record.name for sight in sights if not sight.record.end_seen]
                if once or not names:
                    return sights
                await chain.wait_for_change(sights[0].tip, _LOOK_SECONDS)
            except ChainFailed as failure:
                if once or isinstance(failure, ChainUnfit):
                    raise
                err.print(f"{failure}; asking again", markup=False, soft_wrap=True)
                await asyncio.sleep(_PAUSE_SECONDS)


def _to_watch(record: ChannelRecord) -> bool:
    """What the server called closed is watched, too, until the chain shows it. Debug funding is in no chain."""
    debug = str(debug_outpoint(record.terms.client_key, record.expiry))
    return record.funding_outpoint not in ("", debug) and not record.end_seen


def _tell_news(sights: list[Sight], told_before: dict[str, str]) -> None:
    """Print what changed, other than time."""
    for sight in sights:
        name, depth = sight.record.name, min(sight.funding.confirmations, DEEP) if sight.funding else sight.spend
        news = f"{depth} {sight.refund_valid} {sight.note}"
        if told_before.get(name) != news:
            told_before[name] = news
            note = f"; {sight.note}" if sight.note else ""
            out.print(f"{name}  {story(sight)}{note}", markup=False, soft_wrap=True)
