"""The payer's own view of the chain, through the payer's node or an Electrum server.

It needs no answer of the paychan server. The server may have disappeared. After the expiry by the chain's median time
(BIP113) the refund belongs to the payer, unless the settlement spends the funding first.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from bitcoin.core import CTransaction
from msgspec import Struct, structs

from paychan.chain.base import ChainFailed, ChainUnfit, PayerChain
from paychan.cli.payer.options import expanded
from paychan.cli.payer.outputs import OwnChainView, look, shown_txid, value_at
from paychan.client import Channel, ChannelRecord, Deposit, FundingMissing, Payer, RefundTerms, Source
from paychan.client.flows.deposits import agrees, with_chain
from paychan.client.flows.refund import MOST_SAT_PER_VB, REFUND_SAT_PER_VB, affordable_rate, refund, refund_script
from paychan.protocol.address import encode_address
from paychan.protocol.fees import ChainFees
from paychan.protocol.kinds.refund import Refund, input_size
from paychan.protocol.types import Network, OutPoint, Sat
from paychan.shared.urls import url_trouble
from paychan.shared.wording import sat

_REST_BYTES = 4 + 1 + 1 + 8 + 1 + 4
"""Bytes of a refund besides its inputs and its output's script: version, counts, value, length, lock time."""

_SEARCH_SECONDS = 1800.0
"""For the first call about an address, a node scans all unspent outputs, which takes minutes on the main network."""

_TIMEOUT_SECONDS = 30.0

_OPTIONS = {
    "chain.url or network": "--node",
    "Set chain.url to a node that has them, or use the wallet that followed these channels": (
        "Give a node that has them with --node, or an Electrum server with --electrum"
    ),
    "chain.url": "--node",
    "chain.credentials_file": "--credentials",
    "Set chain.wallet to another name": "Give another node with --node, or an Electrum server with --electrum",
    "set chain.wallet to a new name, and let the node keep more blocks from now on": (
        "give another node with --node, or an Electrum server with --electrum"
    ),
    "give the URL of a server of that network": "give one of that network with --electrum",
    "set it as the certificate file": "set it with --certificate",
}
"""Remedies for an unusable chain: the server's settings, and the payer's options that replace them."""


class OwnChain(Struct, frozen=True):
    """The payer's source of chain data, as given on the command line."""

    node: str
    credentials: Path | None
    electrum: str
    certificate: Path | None

    @property
    def given(self) -> bool:
        return bool(self.node or self.electrum)

    @property
    def words(self) -> tuple[str, ...]:
        """The options for a command to paste: those of this command line, or placeholders if there is no source."""
        if not self.given:
            return "--node", "URL", "--credentials", "COOKIE"
        options = {name: getattr(self, name) for name in self.__struct_fields__}
        return tuple(
            word
            for name, value in options.items()
            if value and str(value) != os.environ.get(f"PAYCHAN_{name.upper()}")
            for word in (f"--{name}", str(value))
        )


class RefundOptions(Struct, frozen=True):
    """The options of a refund."""

    fee_rate: int | None
    to: str
    max_fee_sat: int | None = None


@asynccontextmanager
async def connected(source: OwnChain, network: Network) -> AsyncIterator[PayerChain]:
    """Connect to the payer's node or Electrum server.

    Raises:
        ValueError: neither or both were given, or a node without credentials.
        ChainUnfit: the chain is not usable; the message names the option to correct.
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


def _backend(source: OwnChain, network: Network) -> PayerChain:
    if source.electrum:
        from paychan.chain.electrum.chain import ElectrumChain

        certificate = source.certificate
        return ElectrumChain(source.electrum, network, timeout_seconds=_TIMEOUT_SECONDS, certificate_file=certificate)
    trouble = url_trouble(source.node, ("http", "https"), path=True)
    if trouble:
        msg = f"--node {source.node}: {trouble}"
        raise ValueError(msg)
    if source.credentials is None:
        msg = "--node needs --credentials, a file with user:password such as the node's .cookie"
        raise ValueError(msg)
    from paychan.chain.bitcoind.chain import BitcoindChain

    return BitcoindChain(
        source.node,
        network,
        credentials=expanded(source.credentials),
        wallet="paychan-payer",
        timeout_seconds=_TIMEOUT_SECONDS,
        search_seconds=_SEARCH_SECONDS,
    )


def in_options(remedy: str) -> str:
    """Replace the server's settings in a message of a chain backend by the payer's options."""
    for setting, option in _OPTIONS.items():
        remedy = remedy.replace(setting, option)
    return remedy


async def refresh(chain: PayerChain, payer: Payer, record: ChannelRecord) -> OwnChainView:
    """Read a channel's outputs, their values and its coins' place from the chain, and record them."""
    view = await look(chain, record)
    now = with_chain(record, view.deposits, view.pending)
    if now != record:
        with payer.channel(record.name) as channel:
            now = channel.chain_shows(view.deposits, view.pending)
        view = structs.replace(view, record=now, note="; ".join(filter(None, [view.note, _corrected(record, now)])))
        if (
            now.funding_outpoint != record.funding_outpoint
        ):  # a funding that was not recorded, or that its sender replaced
            view = await look(chain, now)
    if view.moved is not None and (now.ended or now.terms.expiry.is_due(view.tip)):
        with payer.channel(now.name) as channel:
            now = channel.coins_at(str(view.moved.outpoint), view.moved.value_sat)
        return await refresh(chain, payer, now)
    return view


async def compare(source: OwnChain, channel: Channel) -> None:
    """Compare the recorded funding with the payer's own chain before anything is signed for it; record the chain's data.

    Raises:
        FundingNotThere, FundingDiffers: the chain shows another output at the address.
        FundingMissing: the chain shows no funding, and none was recorded.
    """
    said = channel.record
    async with connected(source, said.network) as chain:
        view = await look(chain, said)
    now = channel.chain_shows(view.deposits, view.pending)
    if said.funding_outpoint:
        agrees(said, view.deposits, said.funding_outpoint, said.funding_sat, "your own chain")
    elif not now.funding_outpoint:
        raise FundingMissing(name=said.name, got="nothing", need_sat=said.min_funding_sat, address=said.funding_address)


def _corrected(before: ChannelRecord, now: ChannelRecord) -> str:
    if before.funding_outpoint != now.funding_outpoint or before.funding_sat == now.funding_sat:
        return ""
    said = f"{sat(before.funding_sat)} were recorded ({before.funding_source.words})"
    return f"{now.funding_outpoint} holds {sat(now.funding_sat)}; {said}"


async def publish(chain: PayerChain, payer: Payer, view: OwnChainView, options: RefundOptions) -> Refund:
    """Sign, store and broadcast, in this order, so that the payer's refund is recognised later.

    Spends all confirmed outputs.

    Raises:
        FeeTooHigh: the lowest fee that is relayed now exceeds the payer's limit.
    """
    coins = tuple(Deposit(str(each.outpoint), each.value_sat, Source.CHAIN) for each in view.confirmed)
    rate = options.fee_rate or _rate(coins, view.record, await chain.fees(), options)
    with payer.channel(view.record.name) as channel:
        signed = channel.keep_refund(RefundTerms(rate, options.to, coins, options.max_fee_sat))
        await chain.publish(signed.transaction)
    return signed


def _rate(coins: Collection[Deposit], record: ChannelRecord, fees: ChainFees, options: RefundOptions) -> int:
    """Choose the chain's estimated rate, limited to a proportionate fee, but at least the lowest rate that is relayed."""
    wanted = min(max(REFUND_SAT_PER_VB, fees.estimate_sat_per_vb or 0), MOST_SAT_PER_VB)
    script = refund_script(record, options.to)
    size = len(coins) * input_size(record.terms) + _REST_BYTES + len(script)
    if options.max_fee_sat is not None:
        return max(1, fees.floor_sat_per_vb, min(wanted, options.max_fee_sat // size))
    return max(fees.floor_sat_per_vb, affordable_rate(sum(each.value_sat for each in coins), size, script, wanted))


async def bump(chain: PayerChain, payer: Payer, view: OwnChainView, options: RefundOptions) -> Refund:
    """Sign one refund with a higher fee in place of the refunds that wait for a block, and broadcast it.

    It pays to their address unless `options.to` gives another, and also spends the other confirmed outputs.

    Raises:
        ValueError: the fee is lower than a replacement needs.
        ChainFailed: the node refuses the replacement, with its reason.
    """
    record, rate, waiting = view.record, options.fee_rate or 0, _waiting(view)
    taken = [OutPoint(bytes(txin.prevout.hash), int(txin.prevout.n)) for each in waiting for txin in each.vin]
    coins = {each.outpoint: each.value_sat for each in view.confirmed}
    for outpoint in taken:
        value = await value_at(chain, record, outpoint)
        if value is None:
            msg = f"the chain does not show {outpoint}, which the refund spends; try again"
            raise ChainFailed(msg)
        coins[outpoint] = Sat(value)
    paid = sum(coins[outpoint] for outpoint in taken) - sum(out.nValue for each in waiting for out in each.vout)
    costs = [await chain.replacement_cost(bytes(each.GetTxid())) for each in waiting]
    replaced_sat = sum(cost for cost in costs if cost is not None) if None not in costs else paid
    to = options.to or encode_address(bytes(waiting[-1].vout[0].scriptPubKey), record.network)
    deposits = tuple(Deposit(str(outpoint), value, Source.CHAIN) for outpoint, value in coins.items())
    terms = RefundTerms(rate, to, deposits, options.max_fee_sat)
    signed = refund(record, terms)
    size = len(signed.transaction)
    if signed.fee_sat < replaced_sat + size:  # BIP125 rules 3 and 4: the replaced fees and 1 sat per byte more
        least = -(-(replaced_sat + size) // size)
        msg = (
            f"not replaced: a fee of {signed.fee_sat} sat is too low, replacing {shown_txid(view.refunds[0])} "
            f"takes {replaced_sat + size} sat: give --fee-rate {least} or more"
        )
        raise ValueError(msg)
    with payer.channel(record.name) as channel:
        signed = channel.keep_refund(terms)
        await chain.publish(signed.transaction)
    return signed


def _waiting(view: OwnChainView) -> list[CTransaction]:
    """Return the payer's own refunds that wait for a block."""
    kept = [CTransaction.deserialize(bytes.fromhex(raw)) for raw in view.record.refunds]
    return [each for each in kept if bytes(each.GetTxid()) in view.refunds]


def _least_rate(view: OwnChainView) -> int:
    """Return the lowest rate, in satoshi per byte, of the waiting refunds; 0 if their inputs' values are not recorded."""
    values = {
        each.outpoint: each.value_sat for each in (view.record.funding, *view.record.deposits) if each is not None
    }
    rates = []
    for each in _waiting(view):
        taken = [values.get(str(OutPoint(bytes(txin.prevout.hash), int(txin.prevout.n))), 0) for txin in each.vin]
        fee = sum(taken) - sum(out.nValue for out in each.vout)
        rates.append(max(0, -(-fee // len(each.serialize()))))
    return min(rates, default=0)


async def act(chain: PayerChain, payer: Payer, view: OwnChainView, options: RefundOptions) -> OwnChainView:
    """Do the step that a channel needs: broadcast the refund, or record the end.

    A refund that waits for a block is replaced if `options` has a higher rate. A channel that takes payments follows its
    coins by itself, after the server's answer.
    """
    if view.refunds and options.fee_rate is not None and options.fee_rate > _least_rate(view):
        await bump(chain, payer, view, options)
        return await look(chain, payer.wallet.read(view.record.name))
    if view.refund_valid:
        await publish(chain, payer, view, options)
        return await look(chain, payer.wallet.read(view.record.name))
    if view.ended and view.spend is not None and not view.record.end_seen:
        with payer.channel(view.record.name) as channel:
            record = channel.spent(shown_txid(view.spend.txid))
        return structs.replace(view, record=record)
    return view


async def handle_channel(
    chain: PayerChain, payer: Payer, name: str, options: RefundOptions
) -> OwnChainView | Exception:
    """Handle one channel. A failure is returned, because it does not concern the other channels."""
    try:
        return await act(chain, payer, await refresh(chain, payer, payer.wallet.read(name)), options)
    except Exception as error:  # noqa: BLE001 - after any failure, the other channels' refunds must go on
        return error
