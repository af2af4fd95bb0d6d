"""Lists outputs at channel addresses that no channel uses: second, late and too small deposits of payers.

The server can't spend them: the payer's refund returns them after the channel's expiry. The operator needs the list to
answer questions of payers.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from actors.context import Context
from paychan.chain.base import Funding
from paychan.protocol.channel import Channel, State
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.store.base import walk

_PAGE = 200
"""Channels in one request to the chain backend."""


class Deposit(Struct, frozen=True):
    """An output at a channel's address that no channel uses.

    The payer can refund it from `refundable_at` (Unix time).
    """

    outpoint: str
    value_sat: Sat
    confirmations: int
    channel: str
    status: str
    sender: str
    funding_address: str
    refundable_at: UnixTime


async def deposits(context: Context) -> list[Deposit]:
    """List the deposits at the addresses of all channels, in every state. Raises `ChainFailed`."""
    found: dict[str, Deposit] = {}
    for state in State:
        page: list[Channel] = []
        async for channel in walk(context.store, state):
            page.append(channel)
            if len(page) == _PAGE:
                found |= await _deposits_of(page, context)
                page = []
        found |= await _deposits_of(page, context)
    return list(found.values())


async def _deposits_of(channels: Sequence[Channel], context: Context) -> dict[str, Deposit]:
    by_script = {channel.terms.funding_script: channel for channel in channels}
    moves = {txid for channel in channels for txid in _settlements(channel)}
    listed = await context.chain.deposits([channel.terms for channel in by_script.values()])
    found = {}
    for payee, funding in listed:
        is_change = funding.outpoint.vout == 0 and funding.outpoint.txid in moves
        if not is_change and not await _is_held(funding.outpoint, context):
            found[str(funding.outpoint)] = _deposit(by_script[payee.funding_script], funding, context)
    return found


def _settlements(channel: Channel) -> list[bytes]:
    """Return txids of settlements whose change output may pay to the channel's script, where the channel continues."""
    closing = channel.closing
    if closing is None:
        return []
    return [closing.spent_by, closing.settlement.txid if closing.settlement else b""]


async def _is_held(outpoint: OutPoint, context: Context) -> bool:
    return await context.store.get(outpoint) is not None


def _deposit(channel: Channel, funding: Funding, context: Context) -> Deposit:
    return Deposit(
        outpoint=str(funding.outpoint),
        value_sat=funding.value_sat,
        confirmations=funding.confirmations,
        channel=str(channel.outpoint),
        status=channel.state.value,
        sender=channel.terms.client_key.hex(),
        funding_address=channel.terms.funding_address(context.network),
        refundable_at=channel.terms.expiry.unix_time,
    )
