"""`paychan channel refund` and `watch`: how a payer gets back coins that a server did not settle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeAlias

from msgspec import Struct

from paychan.chain.base import ChainFailed, ChainUnfit, PayerChain
from paychan.cli.payer.advice import advice
from paychan.cli.payer.chain import OwnChain, RefundOptions, act, bump, connected, handle_channel, publish, refresh
from paychan.cli.payer.outputs import DEEP, OwnChainView, confirmations, describe, shown_txid
from paychan.cli.payer.terminal import Facts, show_panel
from paychan.cli.terminal import command, completed, out, say, show_json, warn
from paychan.client import Channel, ChannelRecord, Deposit, Payer, RefundTerms, Source, State
from paychan.client.flows.forget import is_debug
from paychan.client.flows.refund import REFUND_SAT_PER_VB, is_refund
from paychan.protocol.kinds.refund import Refund
from paychan.protocol.types import Network
from paychan.shared.called import quoted
from paychan.shared.wording import moment, relative, sat

_LOOK_SECONDS = 60.0
"""Longest time between two scans without a change in the chain."""

_PAUSE_SECONDS = 5.0
"""Pause after a failure of the chain."""

_AT_A_TIME = 16
"""Channels that are read concurrently."""


async def look_at(source: OwnChain, payer: Payer, name: str) -> None:
    """Record the outputs that the chain shows at the channel's address."""
    record = payer.wallet.read(name)
    async with connected(source, record.network) as chain:
        await refresh(chain, payer, record)


async def publish_now(source: OwnChain, payer: Payer, name: str, options: RefundOptions) -> Facts:
    """Broadcast one refund, or replace it by one with a higher fee, and return the result.

    Raises:
        ValueError: the refund is not valid yet, there are no coins to refund, or it can't be replaced.
    """
    record = payer.wallet.read(name)
    async with connected(source, record.network) as chain:
        view = await refresh(chain, payer, record)
        if view.refunds and options.fee_rate is not None:
            return _made(name, await bump(chain, payer, view, options))
        if view.refund_valid:
            return _made(name, await publish(chain, payer, view, options))
        return await _published_before(source, chain, payer, view, options)


def _made(name: str, signed: Refund) -> Facts:
    return {"name": name, "txid": shown_txid(signed.txid), "fee_sat": signed.fee_sat, "confirmations": 0}


async def _published_before(
    source: OwnChain, chain: PayerChain, payer: Payer, view: OwnChainView, options: RefundOptions
) -> Facts:
    """Return the state of a refund that was broadcast before. Raises `ValueError` if there is none to broadcast."""
    record = view.record
    if view.refunds:
        return {"name": record.name, "txid": shown_txid(view.refunds[0]), "confirmations": 0}
    view = await act(chain, payer, view, options)
    if view.spend is not None and is_refund(view.record, shown_txid(view.spend.txid)) and not view.coins:
        txid, depth = shown_txid(view.spend.txid), view.spend.confirmations
        if options.fee_rate is not None:
            msg = f"not replaced: the refund {txid} is in a block, {confirmations(depth)}"
            raise ValueError(msg)
        return {"name": record.name, "txid": txid, "confirmations": depth}
    if not view.coins:
        msg = f"no coins to refund: the chain shows no funding of {record.funding_address}: {describe(view)}"
        raise ValueError(msg)
    left, watch = (
        record.expiry - view.tip.median_time,
        quoted("paychan", "channel", "watch", record.name, *source.words),
    )
    if left < 0:
        msg = f"too early: {describe(view)}. `{watch}` broadcasts it once it is in a block"
        raise ValueError(msg)
    msg = (
        f"too early: the refund is valid {relative(left)} by the chain's median time, after {moment(record.expiry)} by the "
        f"clock. `{watch}` broadcasts it then"
    )
    raise ValueError(msg)


def show_published(shown: Facts, source: OwnChain, as_json: bool) -> None:
    if as_json:
        show_json(shown)
        return
    depth, name = shown["confirmations"], shown["name"]
    faster = quoted("paychan", "channel", "refund", name, "--publish", "--fee-rate", "N", *source.words)
    show_panel(
        f"Refund of channel {name}",
        ("Published", f"{shown['txid']}, " + (confirmations(depth) if depth else "not in a block yet")),
        ("Fee", sat(shown["fee_sat"]) if "fee_sat" in shown else ""),
        ("Faster", "" if depth else completed(f"`{faster}` replaces it")),
        ("Next", "" if depth >= DEEP else command("channel", "watch", name, *source.words)),
    )


class _Signed(Struct, frozen=True):
    """A refund, and the outputs that it spends."""

    refund: Refund
    coins: tuple[Deposit, ...]


def sign(channel: Channel, options: RefundOptions, *, unchecked: bool) -> list[_Signed]:
    """Sign one refund for all outputs that the payer's chain shows, and one for each output that may not exist.

    A refund with an input that does not exist is worthless, so an unproved output must not share a refund with others.
    """
    held = channel.record.held
    shown = tuple(each for each in held if each.source is Source.CHAIN)
    groups = [group for group in (shown, *((each,) for each in held if each not in shown)) if group] or [()]
    rate = options.fee_rate or REFUND_SAT_PER_VB
    return [
        _Signed(channel.keep_refund(RefundTerms(rate, options.to, group, options.max_fee_sat, unchecked)), group)
        for group in groups
    ]


def show_signed(record: ChannelRecord, signed: list[_Signed], source: OwnChain, to: str, as_json: bool) -> None:
    raw = [each.refund.transaction.hex() for each in signed]
    if as_json:
        first = signed[0].refund
        shown = {
            "transaction": raw[0],
            "txid": shown_txid(first.txid),
            "fee_sat": first.fee_sat,
            "valid_after": record.expiry,
            "transactions": raw,
            "checked": all(coin.source.checked for each in signed for coin in each.coins),
        }
        show_json({"name": record.name, **shown})
        return
    for each in signed:
        total = sum(coin.value_sat for coin in each.coins)
        taken = ", ".join(f"{sat(coin.value_sat)} in {coin.outpoint}: {coin.source.words}" for coin in each.coins)
        show_panel(
            f"Refund of channel {record.name}",
            ("Takes", taken),
            ("Pays", f"{sat(total - each.refund.fee_sat)} to {to or record.home_address}"),
            ("Fee", f"{sat(each.refund.fee_sat)}, if the outputs hold that value"),
            ("Valid", f"once the chain's median time has passed {moment(record.expiry)}"),
            ("Useless", f"already settled by {record.settlement_txid}" if record.state is State.CLOSED else ""),
            ("Then", "send the line below through any node, or let your own node or Electrum server send it:"),
            ("Next", command("channel", "refund", record.name, "--publish", *source.words)),
        )
        out.print(each.refund.transaction.hex(), soft_wrap=True)


class OtherNetwork(ValueError):
    """A channel is skipped: its network is not that of the payer's chain."""

    code = "other_network"

    def __init__(self, record: ChannelRecord, network: Network) -> None:
        super().__init__(f"skipped: it is on the {record.network.value} network, your chain on {network.value}")
        self.at_stake = bool(record.funding_outpoint) and not record.ended
        """The channel may need a refund."""


_Seen: TypeAlias = dict[str, OwnChainView | Exception]
"""By name: the state of a channel in the chain, or the failure to read it."""


def is_failure(view: OwnChainView | Exception) -> bool:
    return view.at_stake if isinstance(view, OtherNetwork) else isinstance(view, Exception)


async def follow(
    source: OwnChain, payer: Payer, chosen: list[str], options: RefundOptions, *, once: bool, quiet: bool
) -> _Seen:
    """Scan and act, once or until no change is expected; return the last states.

    New channels of the wallet are included.
    """
    reported: dict[str, str] = {}
    records, problems = _records(payer, chosen)
    if not records:
        out.print("" if quiet or problems else "Nothing to watch.", end="" if quiet or problems else "\n")
        _report_changes({**problems}, reported, quiet=quiet)
        return {**problems}
    async with _connected(source, records) as (chain, network):
        while True:
            records, problems = _records(payer, chosen)
            names = [each.name for each in records if each.network is network]
            skipped = {each.name: OtherNetwork(each, network) for each in records if each.network is not network}
            seen: _Seen = {**problems, **skipped, **await _handle_all(chain, payer, names, options)}
            _report_changes(seen, reported, quiet=quiet)
            views = [each for each in seen.values() if isinstance(each, OwnChainView)]
            failed = [name for name in names if isinstance(seen[name], Exception)]
            if once or not (failed or any(view.waits for view in views)):
                return seen
            await _wait(chain, views)


async def _handle_all(chain: PayerChain, payer: Payer, names: list[str], options: RefundOptions) -> _Seen:
    """Handle the channels a few at a time: one scan of a node's unspent outputs serves all that wait."""
    turns = asyncio.Semaphore(_AT_A_TIME)

    async def one(name: str) -> OwnChainView | Exception:
        async with turns:
            return await handle_channel(chain, payer, name, options)

    return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))


async def _wait(chain: PayerChain, views: list[OwnChainView]) -> None:
    try:
        if views:
            await chain.wait_for_change(views[0].tip, _LOOK_SECONDS)
            return
    except ChainFailed as failure:
        warn(f"{failure}; trying again")
    await asyncio.sleep(_PAUSE_SECONDS)


@asynccontextmanager
async def _connected(source: OwnChain, records: list[ChannelRecord]) -> AsyncIterator[tuple[PayerChain, Network]]:
    """Connect to the chain of the first of the channels' networks that it serves.

    Raises:
        ChainUnfit: it serves none of them.
    """
    networks = list(dict.fromkeys(record.network for record in records))
    for network in networks:
        stack = AsyncExitStack()
        try:
            chain = await stack.enter_async_context(connected(source, network))
        except ChainUnfit:
            if network is networks[-1]:
                raise
            continue
        async with stack:
            yield chain, network
        return


def _records(payer: Payer, chosen: list[str]) -> tuple[list[ChannelRecord], dict[str, Exception]]:
    """Read the channels to watch, and the reasons why others can't be read.

    Channels with debug funding are left out.
    """
    records, problems = payer.wallet.read_all()
    if chosen:
        found = [each for each in records if each.name in chosen]
        return found, {name: error for name, error in problems.items() if name in chosen}
    return [each for each in records if not is_debug(each)], {**problems}


def _report_changes(seen: _Seen, reported: dict[str, str], *, quiet: bool) -> None:
    """Print what has changed since the last report, except for times."""
    for name, view in seen.items():
        if isinstance(view, Exception):
            news = f"{view}"
        else:
            depth = [min(coin.confirmations, DEEP) for coin in view.coins]
            news = f"{depth} {view.spend} {view.refund_valid} {view.note} {view.refunds}"
        if quiet or reported.get(name) == news:
            continue
        reported[name] = news
        if isinstance(view, Exception):
            warn(f"{name}  {view}. {advice(view, name)}".rstrip())
        else:
            note = f"; {view.note}" if view.note else ""
            say(f"{name}  {describe(view)}{note}")
