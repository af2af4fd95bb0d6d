"""Fee estimates and package broadcasts over an Electrum server. All fee data is the server's unproved statement."""

from __future__ import annotations

from decimal import Decimal
from math import ceil

from msgspec import Struct

from paychan.chain.base import ChainRefused
from paychan.chain.electrum.connection import ServerRefused
from paychan.chain.electrum.session import ElectrumLink
from paychan.protocol.fees import RELAY_FLOOR_SAT_PER_VB, ChainFees

_FEE_TARGET_BLOCKS = 12
"""Two hours: a settlement has the whole settlement period."""

_NO_ESTIMATE = -1

_NEW_IN_1_6 = (1, 6)
"""The protocol version that added mempool.get_info and packages, and removed relayfee."""


class _MempoolInfo(Struct):
    """In BTC per 1000 vB. By default no node requires a larger increment than this one."""

    mempoolminfee: Decimal
    minrelaytxfee: Decimal
    incrementalrelayfee: Decimal = Decimal("0.00001")


class _PackageError(Struct):
    txid: str
    error: str


class _PackageVerdict(Struct):
    success: bool
    errors: list[_PackageError] = []


async def read_fees(link: ElectrumLink) -> tuple[ChainFees, str]:
    """Return the server's estimate, if any, and its node's relay fees, in whole satoshi per vB, rounded up.

    The text lists what the server refused to answer or answered in an invalid form: fees work without it, by floor and
    curve. ElectrumX reports its node's relay fees up to a minute late. Before protocol 1.6, servers report only the
    static minimum.
    """
    estimate, missing = None, []
    try:
        answer = await link.ask("blockchain.estimatefee", _FEE_TARGET_BLOCKS, kind=Decimal)
        estimate = None if answer == _NO_ESTIMATE else _sat_per_vb(answer)
    except ChainRefused as refusal:
        missing.append(f"estimates no fees ({refusal})")
    floor, increment = RELAY_FLOOR_SAT_PER_VB, 1
    try:
        info = await _mempool_info(link)
        floor = max(_sat_per_vb(info.mempoolminfee), _sat_per_vb(info.minrelaytxfee))
        increment = _sat_per_vb(info.incrementalrelayfee)
    except ChainRefused as refusal:
        missing.append(f"does not tell what its node relays ({refusal})")
    fees = ChainFees(estimate_sat_per_vb=estimate, floor_sat_per_vb=floor, increment_sat_per_vb=increment)
    return fees, f"the Electrum server {' and '.join(missing)}" if missing else ""


async def submit_package(link: ElectrumLink, *transactions: bytes) -> str:
    """Broadcast transactions that depend on each other; return the reason of a refusal, or an empty text."""
    if await link.version() < _NEW_IN_1_6:
        return "the server accepts no packages"
    package = [transaction.hex() for transaction in transactions]
    try:
        verdict = await link.ask("blockchain.transaction.broadcast_package", package, kind=_PackageVerdict)
    except ServerRefused as refusal:
        return str(refusal)
    if verdict.success:
        return ""
    return "; ".join(f"{each.txid}: {each.error}" for each in verdict.errors) or "no reason given"


async def _mempool_info(link: ElectrumLink) -> _MempoolInfo:
    if await link.version() >= _NEW_IN_1_6:
        return await link.ask("mempool.get_info", kind=_MempoolInfo)
    relay_fee = await link.ask("blockchain.relayfee", kind=Decimal)
    return _MempoolInfo(relay_fee, relay_fee)


def _sat_per_vb(btc_per_kvb: Decimal) -> int:
    """Convert the protocol's unit, rounded up, at least 1. More than 1 BTC/kvB (100,000 sat/vB) is not a fee rate."""
    if not btc_per_kvb.is_finite() or not 0 <= btc_per_kvb <= 1:
        msg = f"fee rate of {btc_per_kvb} BTC/kvB"
        raise ChainRefused(msg)
    return max(ceil(btc_per_kvb * 100_000), 1)
