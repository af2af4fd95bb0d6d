"""Taking one's own back: the refund after expiry, and the key that change is paid to."""

from __future__ import annotations

import bitcoin.base58
import msgspec
from bitcoin.core import CTransaction, Hash

from paychan.client.errors import FundingTooSmall, WrongState
from paychan.client.flow import Flow, Save
from paychan.client.record import ChannelRecord, State
from paychan.protocol.address import decode_address, encode_address, key_script
from paychan.protocol.refund import Refund, refund_at_rate
from paychan.protocol.types import Network, OutPoint, Sat

REFUND_SAT_PER_VB = 2
"""Fee rate of the refund that is signed before the channel opens; another can be signed at any time."""

_replace = msgspec.structs.replace


def key_address(client_key: bytes, network: Network) -> str:
    """P2PKH address of the channel's own key: where change goes unless the payer names another address."""
    return encode_address(key_script(client_key), network)


def wif(record: ChannelRecord) -> str:
    """Private key in the form that wallets import, to sweep what was paid to `key_address`."""
    payload = bytes([record.network.wif_version]) + bytes.fromhex(record.private_key) + b"\x01"
    return str(bitcoin.base58.encode(payload + Hash(payload)[:4]))


def refund(record: ChannelRecord, sat_per_vb: int, address: str = "") -> Refund:
    """Sign the transaction that takes the whole funding back without the server, once `expiry` has passed.

    It pays to `address`, or else to the channel's home address.

    Raises:
        WrongState: not funded.
        FundingTooSmall: the fee leaves less than the dust limit.
        Malformed: not an address of the channel's network.
    """
    if not record.funding_outpoint:
        raise WrongState(name=record.name, state="not funded", need="funding")
    script = decode_address(address or record.home_address, record.network, "refund address")
    signed = refund_at_rate(record.key, record.terms, record.outpoint, record.funding_sat, script, sat_per_vb)
    if record.funding_sat - signed.fee_sat < record.dust_sat:
        raise FundingTooSmall(got_sat=record.funding_sat, need_sat=signed.fee_sat + record.dust_sat)
    return signed


def first_refund(record: ChannelRecord) -> tuple[str, ...]:
    """Sign the refund that a payer holds from the moment the funding is known; none when its fee would eat it up."""
    try:
        return (refund(record, REFUND_SAT_PER_VB).transaction.hex(),)
    except FundingTooSmall:
        return ()


def keep_refund(record: ChannelRecord, sat_per_vb: int, address: str) -> Flow[Refund]:
    """Sign a refund and keep it, as everything that is published has to be known again. Raises like `refund`."""
    signed = refund(record, sat_per_vb, address)
    raw = signed.transaction.hex()
    others = tuple(each for each in record.refunds if each != raw)
    if record.refunds != (*others, raw):
        yield Save(_replace(record, refunds=(*others, raw)))
    return signed


def coins_at(record: ChannelRecord, outpoint: OutPoint, value_sat: Sat) -> Flow[ChannelRecord]:
    """Note where a chain of the payer's shows the coins of a channel that takes no more payments, with their refund.

    They are at the change output of a settlement that the server made without a word to us.
    """
    here = _replace(
        record,
        funding_outpoint=str(outpoint),
        funding_sat=value_sat,
        earlier_paid_sat=Sat(max(0, record.earlier_paid_sat + record.funding_sat - value_sat)),
        signed_sat=value_sat,
        acknowledged_sat=value_sat,
        refused=False,
    )
    here = _replace(here, refunds=(*record.refunds, *first_refund(here)))
    yield Save(here)
    return here


def is_refund(record: ChannelRecord, txid: str) -> bool:
    """Say whether a displayed txid is that of a refund of ours."""
    return any(CTransaction.deserialize(bytes.fromhex(raw)).GetTxid()[::-1].hex() == txid for raw in record.refunds)


def spent(record: ChannelRecord, txid: str) -> Flow[ChannelRecord]:
    """Note which transaction (displayed txid) spent the funding, deep in the chain: a refund of ours, or the settlement."""
    ending = State.REFUNDED if is_refund(record, txid) else State.CLOSED
    settlement = "" if ending is State.REFUNDED else txid
    record = _replace(record, state=ending, settlement_txid=settlement, end_seen=True)
    yield Save(record)
    return record
