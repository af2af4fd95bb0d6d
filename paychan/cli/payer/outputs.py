"""A channel in the payer's own chain: all outputs at its address, and the spends of the recorded ones.

Here the chain is the truth. The server may have named an output that does not exist, reported another value, or
disappeared; the sender may have replaced the funding by another transaction, or paid twice. So the address is read, not
the outpoint.
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec import Struct

from paychan.chain.base import ChainFailed, ChainUnfit, Funding, PayerChain, Spend, Tip
from paychan.cli.payer.terminal import Facts
from paychan.client import ChannelRecord, Deposit, Source
from paychan.client.coins import parse_outpoint, proven_value
from paychan.client.flows.forget import is_debug
from paychan.client.flows.refund import is_refund
from paychan.protocol.errors import Malformed
from paychan.protocol.types import OutPoint, UnixTime
from paychan.shared.wording import relative, sat

DEEP = 3
"""Confirmations after which a channel has ended for the payer."""

_MATURE = 100
"""Consensus (COINBASE_MATURITY): one immature input would make the whole refund invalid."""

_MOST_MOVES = 50
"""Most consecutive settlements that are followed to the output with a movable channel's coins."""

_CLOCK_LEEWAY_SECONDS = 2 * 24 * 3600
"""Time by which a channel may be older in the chain's time than in the payer's clock at its creation."""


class OwnChainView(Struct, frozen=True):
    """A channel as the chain shows it."""

    record: ChannelRecord
    tip: Tip
    coins: tuple[Funding, ...] = ()
    """All unspent outputs at the address."""
    spend: Spend | None = None
    """The transaction that spent the recorded funding; for a channel that moved, the one that spent its last output."""
    moved: Funding | None = None
    """The present output of the coins, if a settlement left them to the channel's own script."""
    pending: tuple[str, ...] = ()
    """Recorded outputs that are spent, but not deep in the chain yet."""
    refunds: tuple[bytes, ...] = ()
    """Internal txids of the payer's own refunds that wait for a block."""
    note: str = ""

    @property
    def funding(self) -> Funding | None:
        """The recorded funding output, while it is unspent."""
        return next((coin for coin in self.coins if str(coin.outpoint) == self.record.funding_outpoint), None)

    @property
    def confirmed(self) -> tuple[Funding, ...]:
        """The outputs that a refund can spend: an unconfirmed one may still be replaced, and coinbase must be mature."""
        return tuple(coin for coin in self.coins if coin.confirmations >= (_MATURE if coin.coinbase else 1))

    @property
    def refund_valid(self) -> bool:
        """Whether the refund is valid now."""
        return bool(self.confirmed) and self.record.terms.expiry.is_due(self.tip)

    @property
    def ended(self) -> bool:
        return self.spend is not None and self.spend.confirmations >= DEEP and self.moved is None

    @property
    def waits(self) -> bool:
        """Whether a change is still expected: coins to refund, or a spend or funding that is not deep yet."""
        recorded = bool(self.record.funding_outpoint) and not is_debug(self.record)
        return bool(self.coins or self.pending) or (recorded and not self.record.end_seen)

    @property
    def deposits(self) -> tuple[Deposit, ...]:
        return tuple(Deposit(str(each.outpoint), each.value_sat, Source.CHAIN) for each in self.coins)


async def look(chain: PayerChain, record: ChannelRecord) -> OwnChainView:
    """Read a channel's state from the chain. Writes nothing."""
    noted = parse_outpoint(record.funding_outpoint) if record.funding_outpoint and not is_debug(record) else None
    note = await _follow(chain, record, noted)
    tip = await chain.tip()
    coins = await chain.find_all(record.terms)
    unspent = {coin.outpoint for coin in coins}
    spends: dict[OutPoint, Spend] = {}
    others = [parse_outpoint(each.outpoint) for each in record.deposits]
    for outpoint in [*([noted] if noted else []), *others]:
        spend = None if outpoint in unspent else await spender(chain, record, outpoint)
        if spend is not None:
            spends[outpoint] = spend
    moved, last = None, spends.get(noted) if noted else None
    if last is not None and record.movable:
        moved, last = await _follow_moves(chain, record, coins, last)
    shallow = {outpoint: spend for outpoint, spend in spends.items() if spend.confirmations < DEEP}
    waiting = {each.txid for each in shallow.values() if not each.confirmations}
    return OwnChainView(
        record,
        tip,
        coins,
        last,
        moved,
        pending=tuple(map(str, shallow)),
        refunds=tuple(txid for txid in waiting if is_refund(record, shown_txid(txid))),
        note=note,
    )


async def _follow(chain: PayerChain, record: ChannelRecord, noted: OutPoint | None) -> str:
    """Watch the address. For earlier spends a node needs a rescan; only then it can name the spending transaction."""
    if not chain.spends_need_rescan:
        await chain.watch([record.terms])
    elif record.end_seen or noted is None:
        pass  # a scan of the unspent outputs is enough
    elif not await chain.unspent([noted]):
        try:
            await chain.watch([record.terms], UnixTime(max(0, record.created_at - _CLOCK_LEEWAY_SECONDS)))
        except ChainUnfit as error:  # unspent outputs are found nevertheless
            return f"the transaction that spent the funding is unknown: {error}"
    return ""


async def spender(chain: PayerChain, record: ChannelRecord, outpoint: OutPoint) -> Spend | None:
    """Return the spend of an output of this address; None also if the output does not exist, even if the server named it."""
    if await value_at(chain, record, outpoint) is None:
        return None
    return await chain.spender(outpoint)


async def value_at(chain: PayerChain, record: ChannelRecord, outpoint: OutPoint) -> int | None:
    """Return the value of an output of this address, read from its transaction; None if it does not exist."""
    try:
        raw = await chain.transaction(outpoint.txid)
        return proven_value(raw.hex(), outpoint, record.terms.funding_script)
    except (ChainFailed, Malformed):
        return None


async def _follow_moves(
    chain: PayerChain, record: ChannelRecord, coins: Collection[Funding], spend: Spend
) -> tuple[Funding | None, Spend]:
    """Follow the change of settlements to the unspent output; else return the last spend."""
    for _ in range(_MOST_MOVES):
        change = OutPoint(spend.txid, 0)
        here = next((coin for coin in coins if coin.outpoint == change), None)
        if here is not None:
            return here, spend
        following = await spender(chain, record, change)
        if following is None:
            break
        spend = following
    return None, spend


def confirmations(depth: int) -> str:
    return f"{depth} confirmation" + ("s" if depth != 1 else "")


def describe(view: OwnChainView) -> str:
    """Describe a channel's state in one line."""
    record, spend = view.record, view.spend
    parts: list[str] = []
    if view.moved is not None:
        parts.append(f"moved to {view.moved.outpoint} by a settlement; the next payment follows it")
    elif spend is not None:
        txid = shown_txid(spend.txid)
        depth = confirmations(spend.confirmations) if spend.confirmations else "not in a block yet"
        if is_refund(record, txid):
            parts.append(f"refunded by {txid}, {depth}")
        else:
            parts.append(f"funding spent by the settlement {txid}, {depth}" + ("; closed" if record.end_seen else ""))
    elif view.funding is not None:
        parts.append(
            f"{sat(view.funding.value_sat)} unspent, {confirmations(view.funding.confirmations)}; {_when(view)}"
        )
    elif record.end_seen:
        parts.append(record.state.value)
    elif record.funding_outpoint and not is_debug(record):
        parts.append("the chain shows no funding: it was never confirmed, or its sender replaced it")
    others = [coin for coin in view.coins if coin not in (view.funding, view.moved)]
    if others:
        shown = ", ".join(f"{sat(coin.value_sat)} in {coin.outpoint}" for coin in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        parts.append(f"also at this address: {shown}{more}" + (f"; {_when(view)}" if view.funding is None else ""))
    if view.refunds and spend is None:
        parts.append(f"refund {shown_txid(view.refunds[0])} waits for a block")
    return "; ".join(parts) or "no outputs at this address"


def _when(view: OwnChainView) -> str:
    if view.refund_valid:
        return "the refund is valid now"
    left = view.record.expiry - view.tip.median_time
    return f"the refund is valid {relative(left)} by median time" if left >= 0 else "the refund needs a confirmation"


def facts(view: OwnChainView) -> Facts:
    """The JSON of a channel's state in the chain."""
    record, spend = view.record, view.spend
    txid = "" if spend is None else shown_txid(spend.txid)
    return {
        "name": record.name,
        "state": record.state.value,
        "unspent": view.funding is not None,
        "outputs": [
            {"outpoint": str(each.outpoint), "value_sat": each.value_sat, "confirmations": each.confirmations}
            for each in view.coins
        ],
        "refund_valid": view.refund_valid,
        "expiry": record.expiry,
        "median_time": view.tip.median_time,
        "spent_by": txid,
        "by_refund": bool(txid) and is_refund(record, txid),
        "confirmations": 0 if spend is None else spend.confirmations,
        "refunds_waiting": [shown_txid(txid) for txid in view.refunds],
        "note": view.note,
    }


def shown_txid(txid: bytes) -> str:
    """A txid in hex, as wallets show it."""
    return txid[::-1].hex()
