"""Say whether a channel may leave the wallet's list: only if its address certainly holds no coins of the payer."""

from __future__ import annotations

from paychan.client.coins import Source
from paychan.client.errors import FundingNotTold, MayHoldCoins, Refused, ServerMisbehaved, Unreachable
from paychan.client.flows.open import outputs
from paychan.client.flows.refund import key_address
from paychan.client.record import ChannelRecord, State
from paychan.client.transport.effects import Flow, Patience
from paychan.protocol.debug_funding import debug_outpoint
from paychan.protocol.types import Network


def check_empty(record: ChannelRecord, patience: Patience, *, chain_was_asked: bool) -> Flow[None]:
    """Check that a channel holds no coins. The server is asked for outputs unless the payer's own chain was.

    Raises:
        MayHoldCoins: there are coins, or nothing shows that there are none.
    """
    if is_debug(record) and record.network is not Network.LIVE:
        return
    reason = _reason(record)
    if not reason and not record.ended and not chain_was_asked:
        reason = yield from _asked(record, patience)
    if reason:
        raise MayHoldCoins(name=record.name, reason=reason)


def is_debug(record: ChannelRecord) -> bool:
    """Say whether the channel has outputs, and all are those of debug mode, which no chain has."""
    debug = _debug_outpoint(record)
    if record.funding_outpoint and (record.funding_source is Source.DEBUG or record.funding_outpoint == debug):
        return True
    return bool(record.held) and all(each.outpoint == debug for each in record.held)


def _debug_outpoint(record: ChannelRecord) -> str:
    return str(debug_outpoint(record.terms.client_key, record.expiry))


def _reason(record: ChannelRecord) -> str:
    """Return the reason of the record against forgetting the channel; "" if it has none."""
    for each in record.held:
        return f"{each.value_sat} sat in {each.outpoint} are known at its address"
    if not record.ended:
        return "" if record.state is State.NEW else f"it is {record.state.value}"
    if not record.end_seen:
        return "its end is the server's claim: `paychan channel watch --once` with your own chain checks it"
    if record.home_address == key_address(record.terms.client_key, record.network):
        return f"its change was paid to its own key at {record.home_address}"
    return ""


def _asked(record: ChannelRecord, patience: Patience) -> Flow[str]:
    """Ask the server for outputs at the address; return the reason against forgetting the channel."""
    try:
        found = yield from outputs(record, patience)
    except (FundingNotTold, Refused, ServerMisbehaved, Unreachable) as error:
        return f"the server does not say whether coins came ({error}), but your own chain can: --node or --electrum"
    coins = [each for each in found if each.outpoint != _debug_outpoint(record)]
    return "; ".join(f"the server lists {each.value_sat} sat in {each.outpoint}" for each in coins)
