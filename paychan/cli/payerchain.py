"""A payer's own view of the chain, through the payer's node or an Electrum server. It needs nothing of the server.

The server may have vanished; the refund is the payer's after the expiry by the chain's median time (BIP113), unless the
settlement spends the funding first.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

from msgspec import Struct

from paychan.chain.base import Chain, ChainUnfit, Funding, Spend, Tip
from paychan.chain.bitcoind import BitcoindChain
from paychan.chain.electrum import ElectrumChain
from paychan.cli.payer_terminal import relative, sat
from paychan.client import ChannelInUse, ChannelRecord, Payer
from paychan.client.recovery import REFUND_SAT_PER_VB, is_refund
from paychan.protocol.fees import ChainFees
from paychan.protocol.refund import Refund
from paychan.protocol.types import Network

DEEP = 3
"""Confirmations after which a channel has ended for us."""

_MOST_SAT_PER_VB = 200
"""An estimate is believed up to here; more must be asked for."""

_TIMEOUT_SECONDS = 30.0

_OPTIONS = {
    "chain.url or network": "--node",
    "Give chain.url a node that has them, or the wallet that followed these channels": (
        "Give a node that has them with --node, or an Electrum server with --electrum"
    ),
    "chain.url": "--node",
    "chain.credentials_file": "--credentials",
    "Choose another name in chain.wallet": "Give another node with --node, or an Electrum server with --electrum",
    "choose a new name in chain.wallet, and let it keep more blocks from now on": (
        "give another node with --node, or an Electrum server with --electrum"
    ),
    "give the URL of a server of that network": "give one of that network with --electrum",
    "name that as the certificate file": "name that with --certificate",
}
"""What mends a chain that can't serve: the server's settings, and the payer's options in their place."""


class Source(Struct, frozen=True):
    """Where the payer asks about the chain, as given on the command line."""

    node: str
    credentials: Path | None
    electrum: str
    certificate: Path | None


class Wish(Struct, frozen=True):
    """How a refund is to be signed."""

    fee_rate: int | None
    to: str


class Sight(Struct, frozen=True):
    """What the chain shows of a channel: its unspent funding, or else what spent it."""

    record: ChannelRecord
    tip: Tip
    funding: Funding | None
    spend: Spend | None
    note: str = ""
    moved: Funding | None = None
    """Where the coins are instead, if a settlement left them to the channel's own script."""

    @property
    def refund_valid(self) -> bool:
        """BIP113: the lock time is compared with the median time of the block before."""
        return self.funding is not None and self.tip.median_time > self.record.expiry

    @property
    def ended(self) -> bool:
        return self.spend is not None and self.spend.confirmations >= DEEP and self.moved is None


Facts: TypeAlias = dict[str, Any]


@asynccontextmanager
async def connected(source: Source, network: Network) -> AsyncIterator[Chain]:
    """Connect to the payer's node or Electrum server.

    Raises:
        ValueError: neither or both were given, or a node without credentials.
        ChainUnfit: it can't serve us, and which option mends that.
    """
    if bool(source.node) == bool(source.electrum):
        msg = "give your own node with --node and --credentials, or an Electrum server with --electrum"
        raise ValueError(msg)
    try:
        chain = _backend(source, network)
        try:
            await chain.check()
            yield chain
        finally:
            await chain.close()
    except ChainUnfit as error:
        raise ChainUnfit(in_options(str(error))) from error


def _backend(source: Source, network: Network) -> Chain:
    if source.electrum:
        certificate = source.certificate
        return ElectrumChain(source.electrum, network, timeout_seconds=_TIMEOUT_SECONDS, certificate_file=certificate)
    if source.credentials is None:
        msg = "--node needs --credentials, a file with user:password such as the node's .cookie"
        raise ValueError(msg)
    return BitcoindChain(source.node, network, credentials=source.credentials.expanduser(), wallet="paychan-payer")


def in_options(mend: str) -> str:
    """Say in the payer's options what the chain's backends say in the server's settings."""
    for setting, option in _OPTIONS.items():
        mend = mend.replace(setting, option)
    return mend


async def look(chain: Chain, record: ChannelRecord) -> Sight:
    """See how a funded channel stands in the chain."""
    if isinstance(chain, ElectrumChain):
        await chain.watch([record.terms])
    tip = await chain.tip()
    found = (await chain.unspent([record.outpoint])).get(record.outpoint)
    if found is not None:
        return Sight(record, tip, found, None)
    if isinstance(chain, BitcoindChain):  # a rescan, but only of a channel that ended
        await chain.watch([record.terms], record.created_at)
    others = await chain.funding(record.terms) if record.movable else ()
    moved = max(others, key=lambda each: each.value_sat, default=None)
    return Sight(record, tip, None, await chain.spender(record.outpoint), moved=moved)


async def find_funding(chain: Chain, payer: Payer, record: ChannelRecord) -> ChannelRecord:
    """Find in the chain what funds a channel, when its server went away before it told."""
    if record.funding_outpoint:
        return record
    enough = [each for each in await chain.funding(record.terms) if each.value_sat >= record.min_funding_sat]
    if not enough:
        return record
    best = max(enough, key=lambda each: each.value_sat)
    with payer.channel(record.name) as channel:
        channel.fund(str(best.outpoint), best.value_sat)
        return channel.record


async def publish(chain: Chain, payer: Payer, sight: Sight, wish: Wish) -> Refund:
    """Sign, keep, publish: in this order, so that a refund of ours is known again."""
    rate = wish.fee_rate or min(max(REFUND_SAT_PER_VB, _wanted(await chain.fees())), _MOST_SAT_PER_VB)
    with payer.channel(sight.record.name) as channel:
        signed = channel.keep_refund(rate, wish.to)
        await chain.publish(signed.transaction)
    return signed


def _wanted(fees: ChainFees) -> int:
    return max(fees.estimate_sat_per_vb or 0, fees.floor_sat_per_vb)


async def act(chain: Chain, payer: Payer, sight: Sight, wish: Wish) -> Sight:
    """Do for a channel what its sight asks for: publish the refund, note where its coins went, or the end.

    A channel that takes payments still goes along by itself, once the server says so.
    """
    try:
        if sight.refund_valid:
            await publish(chain, payer, sight, wish)
            return await look(chain, payer.wallet.read(sight.record.name))
        if sight.moved is not None and (sight.record.ended or sight.tip.median_time > sight.record.expiry):
            with payer.channel(sight.record.name) as channel:
                record = channel.coins_at(str(sight.moved.outpoint), sight.moved.value_sat)
            return await act(chain, payer, await look(chain, record), wish)
        if sight.ended and sight.spend is not None and not sight.record.end_seen:
            with payer.channel(sight.record.name) as channel:
                record = channel.spent(shown_txid(sight.spend.txid))
            return Sight(record, sight.tip, None, sight.spend)
    except ChannelInUse as error:
        return Sight(sight.record, sight.tip, sight.funding, sight.spend, str(error))
    return sight


def confirmations(depth: int) -> str:
    return f"{depth} confirmation" + ("s" if depth != 1 else "")


def story(sight: Sight) -> str:
    """Tell a sight in one line."""
    record, spend = sight.record, sight.spend
    if sight.moved is not None:
        return f"moved to {sight.moved.outpoint} by a settlement; the next payment goes along"
    if spend is not None:
        txid = shown_txid(spend.txid)
        depth = confirmations(spend.confirmations) if spend.confirmations else "not in a block yet"
        if is_refund(record, txid):
            return f"refunded by {txid}, {depth}"
        return f"funding spent by the settlement {txid}, {depth}" + ("; closed" if record.end_seen else "")
    if sight.funding is None:
        return "the chain shows no funding: never confirmed, or replaced by its sender"
    left = relative(record.expiry - sight.tip.median_time)
    unspent = f"{sat(sight.funding.value_sat)} unspent, {confirmations(sight.funding.confirmations)}"
    return f"{unspent}; the refund is valid {'now' if sight.refund_valid else f'{left} by median time'}"


async def attend(chain: Chain, payer: Payer, name: str, wish: Wish) -> Sight:
    record = await find_funding(chain, payer, payer.wallet.read(name))
    if not record.funding_outpoint:
        return Sight(record, await chain.tip(), None, None)
    return await act(chain, payer, await look(chain, record), wish)


def facts(sight: Sight) -> Facts:
    """What programs get to know of a sight."""
    record, spend = sight.record, sight.spend
    txid = "" if spend is None else shown_txid(spend.txid)
    return {
        "name": record.name,
        "state": record.state.value,
        "unspent": sight.funding is not None,
        "refund_valid": sight.refund_valid,
        "expiry": record.expiry,
        "median_time": sight.tip.median_time,
        "spent_by": txid,
        "by_refund": bool(txid) and is_refund(record, txid),
        "confirmations": 0 if spend is None else spend.confirmations,
        "note": sight.note,
    }


def shown_txid(txid: bytes) -> str:
    """A txid as wallets show it."""
    return txid[::-1].hex()
