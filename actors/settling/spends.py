"""Classification of a transaction that spends a funding output: a settlement, or the client's refund."""

from __future__ import annotations

from bitcoin.core import CTransaction

from actors.context import Context
from paychan.chain.base import Spend
from paychan.protocol.channel import Channel, Found, SpentElsewhere
from paychan.protocol.finding import read_claim
from paychan.protocol.settlement import Settlement, outpoints_of
from paychan.protocol.types import Sat
from paychan.store.base import get_readable


async def judge_spend(channel: Channel, spend: Spend, context: Context) -> Found | SpentElsewhere | None:
    """Return the command that tells the channel of a spend of its funding output; None while a refund is not deep.

    Raises:
        ChainFailed: the spending transaction can't be read.
    """
    deep = spend.confirmations >= context.settlement_confirmations
    transaction = await context.chain.transaction(spend.txid)
    claim = read_claim(channel, transaction) if transaction else None
    if claim is None:
        return SpentElsewhere(spend.txid) if deep else None
    fee_sat = await _fee(transaction, context)
    return Found(claim, Settlement(transaction, spend.txid, fee_sat), deep)


async def _fee(transaction: bytes, context: Context) -> Sat:
    """Return the fee of a settlement in satoshi; a lower figure if it spends a coin of the reserve."""
    records = [await get_readable(context.store, outpoint) for outpoint in outpoints_of(transaction)]
    funded = sum(record.funding_sat for record in records if record is not None)
    return Sat(max(funded - sum(out.nValue for out in CTransaction.deserialize(transaction).vout), 0))
