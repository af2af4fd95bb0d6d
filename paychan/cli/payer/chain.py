"""A payer's own view of the chain, through the payer's node or an Electrum server. It needs nothing of the server.

The server may have vanished; the refund is the payer's after the expiry by the chain's median time (BIP113), unless the
settlement spends the funding first.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from bitcoin.core import CTransaction
from msgspec import Struct, structs

from paychan.chain.base import Chain, ChainFailed, ChainUnfit
from paychan.chain.bitcoind.chain import BitcoindChain
from paychan.chain.electrum.chain import ElectrumChain
from paychan.cli.payer.outputs import OwnChainView, look, shown_txid, value_at
from paychan.cli.payer.terminal import sat
from paychan.client import Channel, ChannelRecord, Deposit, FundingMissing, Payer, RefundTerms, Source
from paychan.client.flows.deposits import agrees, with_chain
from paychan.client.flows.refund import MOST_SAT_PER_VB, REFUND_SAT_PER_VB, affordable_rate, refund
from paychan.protocol.address import encode_address
from paychan.protocol.fees import ChainFees
from paychan.protocol.kinds.refund import INPUT_BYTES, Refund
from paychan.protocol.types import Network, OutPoint, Sat

_REST_BYTES = 44
"""Most bytes of a refund beside its inputs: version, counts, one output, lock time."""

_SEARCH_SECONDS = 1800.0
"""The first question about an address has a node scan all unspent outputs, which takes minutes on the main network."""

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


class OwnChain(Struct, frozen=True):
    """Where the payer asks about the chain, as given on the command line."""

    node: str
    credentials: Path | None
    electrum: str
    certificate: Path | None

    @property
    def given(self) -> bool:
        return bool(self.node or self.electrum)


class Wish(Struct, frozen=True):
    """How a refund is to be signed."""

    fee_rate: int | None
    to: str
    max_fee_sat: int | None = None


@asynccontextmanager
async def connected(source: OwnChain, network: Network) -> AsyncIterator[Chain]:
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


def _backend(source: OwnChain, network: Network) -> Chain:
    if source.electrum:
        certificate = source.certificate
        return ElectrumChain(source.electrum, network, timeout_seconds=_TIMEOUT_SECONDS, certificate_file=certificate)
    if source.credentials is None:
        msg = "--node needs --credentials, a file with user:password such as the node's .cookie"
        raise ValueError(msg)
    return BitcoindChain(
        source.node,
        network,
        credentials=source.credentials.expanduser(),
        wallet="paychan-payer",
        timeout_seconds=_TIMEOUT_SECONDS,
        search_seconds=_SEARCH_SECONDS,
    )


def in_options(mend: str) -> str:
    """Say in the payer's options what the chain's backends say in the server's settings."""
    for setting, option in _OPTIONS.items():
        mend = mend.replace(setting, option)
    return mend


async def see(chain: Chain, payer: Payer, record: ChannelRecord) -> OwnChainView:
    """Look at a channel, and note what the chain shows: the outputs at the address, their values, where the coins are."""
    sight = await look(chain, record)
    now = with_chain(record, sight.deposits, sight.pending)
    if now != record:
        with payer.channel(record.name) as channel:
            now = channel.chain_shows(sight.deposits, sight.pending)
        sight = structs.replace(sight, record=now, note="; ".join(filter(None, [sight.note, _corrected(record, now)])))
        if now.funding_outpoint != record.funding_outpoint:  # a funding that was not noted, or replaced by its sender
            sight = await look(chain, now)
    if sight.moved is not None and (now.ended or sight.tip.median_time > now.expiry):
        with payer.channel(now.name) as channel:
            now = channel.coins_at(str(sight.moved.outpoint), sight.moved.value_sat)
        return await see(chain, payer, now)
    return sight


async def compare(source: OwnChain, channel: Channel) -> None:
    """Hold the noted funding against the payer's own chain, before anything is signed for it; the chain's word is kept.

    Raises:
        FundingNotThere, FundingDiffers: the chain shows something else at the address.
        FundingMissing: it shows no funding, and none was noted.
    """
    said = channel.record
    async with connected(source, said.network) as chain:
        sight = await look(chain, said)
    now = channel.chain_shows(sight.deposits, sight.pending)
    if said.funding_outpoint:
        agrees(said, sight.deposits, said.funding_outpoint, said.funding_sat, "your own chain")
    elif not now.funding_outpoint:
        raise FundingMissing(name=said.name, got="nothing", need_sat=said.min_funding_sat)


def _corrected(before: ChannelRecord, now: ChannelRecord) -> str:
    if before.funding_outpoint != now.funding_outpoint or before.funding_sat == now.funding_sat:
        return ""
    said = f"{sat(before.funding_sat)} were noted ({before.funding_source.words})"
    return f"{now.funding_outpoint} holds {sat(now.funding_sat)}; {said}"


async def publish(chain: Chain, payer: Payer, sight: OwnChainView, wish: Wish) -> Refund:
    """Sign, keep, publish: in this order, so that a refund of ours is known again. Takes all that is confirmed.

    Raises:
        FeeTooHigh: what relays now costs more than the payer allowed.
    """
    coins = tuple(Deposit(str(each.outpoint), each.value_sat, Source.CHAIN) for each in sight.confirmed)
    rate = wish.fee_rate or _rate(coins, await chain.fees(), wish)
    with payer.channel(sight.record.name) as channel:
        signed = channel.keep_refund(RefundTerms(rate, wish.to, coins, wish.max_fee_sat))
        await chain.publish(signed.transaction)
    return signed


def _rate(coins: Collection[Deposit], fees: ChainFees, wish: Wish) -> int:
    """Choose the rate that the chain estimates, as far as the fee is in proportion, and never less than relays."""
    wanted = min(max(REFUND_SAT_PER_VB, fees.estimate_sat_per_vb or 0), MOST_SAT_PER_VB)
    size = len(coins) * INPUT_BYTES + _REST_BYTES
    if wish.max_fee_sat is not None:
        return max(1, fees.floor_sat_per_vb, min(wanted, wish.max_fee_sat // size))
    return max(fees.floor_sat_per_vb, affordable_rate(sum(each.value_sat for each in coins), size, wanted))


async def bump(chain: Chain, payer: Payer, sight: OwnChainView, wish: Wish) -> Refund:
    """Sign the refunds that wait for a block again as one, with a higher fee, and publish it in their place.

    It pays where they paid unless `wish.to` says otherwise, and takes along what else is confirmed.

    Raises:
        ValueError: the fee is less than replacing takes.
        ChainFailed: the node does not replace, with its reason.
    """
    record, rate, waiting = sight.record, wish.fee_rate or 0, _waiting(sight)
    taken = [OutPoint(bytes(txin.prevout.hash), int(txin.prevout.n)) for each in waiting for txin in each.vin]
    coins = {each.outpoint: each.value_sat for each in sight.confirmed}
    for outpoint in taken:
        value = await value_at(chain, record, outpoint)
        if value is None:
            msg = f"the chain does not show {outpoint}, which the refund takes; ask again"
            raise ChainFailed(msg)
        coins[outpoint] = Sat(value)
    paid = sum(coins[outpoint] for outpoint in taken) - sum(out.nValue for each in waiting for out in each.vout)
    costs = [await chain.replacement_cost(bytes(each.GetTxid())) for each in waiting]
    replaced_sat = sum(cost for cost in costs if cost is not None) if None not in costs else paid
    to = wish.to or encode_address(bytes(waiting[-1].vout[0].scriptPubKey), record.network)
    deposits = tuple(Deposit(str(outpoint), value, Source.CHAIN) for outpoint, value in coins.items())
    terms = RefundTerms(rate, to, deposits, wish.max_fee_sat)
    signed = refund(record, terms)
    size = len(signed.transaction)
    if signed.fee_sat < replaced_sat + size:  # BIP125 rules 3 and 4: more than what is replaced, by 1 sat per byte
        least = -(-(replaced_sat + size) // size)
        msg = (
            f"not replaced: a fee of {signed.fee_sat} sat is too little, replacing {shown_txid(sight.refunds[0])} "
            f"takes {replaced_sat + size} sat: give --fee-rate {least} or more"
        )
        raise ValueError(msg)
    with payer.channel(record.name) as channel:
        signed = channel.keep_refund(terms)
        await chain.publish(signed.transaction)
    return signed


def _waiting(sight: OwnChainView) -> list[CTransaction]:
    """The payer's own refunds that wait for a block."""
    kept = [CTransaction.deserialize(bytes.fromhex(raw)) for raw in sight.record.refunds]
    return [each for each in kept if bytes(each.GetTxid()) in sight.refunds]


def _least_rate(sight: OwnChainView) -> int:
    """The lowest rate, in satoshi per byte, that one of the refunds that wait pays; 0 if what it takes is not noted."""
    values = {
        each.outpoint: each.value_sat for each in (sight.record.funding, *sight.record.deposits) if each is not None
    }
    rates = []
    for each in _waiting(sight):
        taken = [values.get(str(OutPoint(bytes(txin.prevout.hash), int(txin.prevout.n))), 0) for txin in each.vin]
        fee = sum(taken) - sum(out.nValue for out in each.vout)
        rates.append(max(0, -(-fee // len(each.serialize()))))
    return min(rates, default=0)


async def act(chain: Chain, payer: Payer, sight: OwnChainView, wish: Wish) -> OwnChainView:
    """Do for a channel what its sight asks for: publish the refund, or note the end.

    One that waits for a block is replaced if `wish` names a higher rate. A channel that takes payments still goes along by itself, once the server says so.
    """
    if sight.refunds and wish.fee_rate is not None and wish.fee_rate > _least_rate(sight):
        await bump(chain, payer, sight, wish)
        return await look(chain, payer.wallet.read(sight.record.name))
    if sight.refund_valid:
        await publish(chain, payer, sight, wish)
        return await look(chain, payer.wallet.read(sight.record.name))
    if sight.ended and sight.spend is not None and not sight.record.end_seen:
        with payer.channel(sight.record.name) as channel:
            record = channel.spent(shown_txid(sight.spend.txid))
        return structs.replace(sight, record=record)
    return sight


async def attend(chain: Chain, payer: Payer, name: str, wish: Wish) -> OwnChainView | Exception:
    """See to one channel; what goes wrong with it concerns no other, so it is returned."""
    try:
        return await act(chain, payer, await see(chain, payer, payer.wallet.read(name)), wish)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other channels' refunds must not wait for it
        return error
