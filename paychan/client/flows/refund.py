"""Recover the payer's coins: the refund after expiry, and the key that receives change."""

from __future__ import annotations

import bitcoin.base58
import msgspec
from bitcoin.core import CTransaction, Hash
from msgspec import Struct

from paychan.client.amounts import whole
from paychan.client.coins import Deposit, Source, parse_outpoint
from paychan.client.errors import FeeTooHigh, FundingTooSmall, ValueUnchecked, WrongState
from paychan.client.record import ChannelRecord, State
from paychan.client.transport.effects import Flow, Save
from paychan.protocol.address import decode_address, encode_address, key_script, least_relayed_sat
from paychan.protocol.kinds.refund import Coin, Refund, input_size, refund_size, sign_refunds
from paychan.protocol.types import Network, OutPoint, Sat

REFUND_SAT_PER_VB = 2
"""Fee rate of the refund that is signed before the channel opens.

A refund with another rate can be signed at any time.
"""

MOST_FEE_PERCENT = 10
MOST_SAT_PER_VB = 200
"""A refund fee above this share of its value, or above this rate, needs `RefundTerms.max_fee_sat`."""

_replace = msgspec.structs.replace


def key_address(client_key: bytes, network: Network) -> str:
    """Return the P2PKH address of the channel's own key, which receives change by default."""
    return encode_address(key_script(client_key), network)


def wif(record: ChannelRecord) -> str:
    """Return the private key in wallet import format, to sweep coins from `key_address`."""
    payload = bytes([record.network.wif_version]) + bytes.fromhex(record.private_key) + b"\x01"
    return str(bitcoin.base58.encode(payload + Hash(payload)[:4]))


class RefundTerms(Struct, frozen=True):
    """Parameters of a refund."""

    sat_per_vb: int = REFUND_SAT_PER_VB
    address: str = ""
    """Receives everything; "" for the channel's home address."""
    coins: tuple[Deposit, ...] | None = None
    """Outputs to take back; None for all that the record holds (`ChannelRecord.held`)."""
    max_fee_sat: int | None = None
    """Highest fee in satoshi; None for `most_fee_sat`."""
    unchecked: bool = False
    """Sign although values are unchecked."""


def refund(record: ChannelRecord, terms: RefundTerms) -> Refund:
    """Sign the transaction that returns the coins at the address once `expiry` has passed. It needs no server.

    An output that costs more than it holds is left out, unless there is no other.

    Raises:
        WrongNumber: the fee rate or the highest fee is not a whole number.
        WrongState: no output is recorded.
        ValueUnchecked: a value was never checked, and `terms.unchecked` is not set.
        FeeTooHigh: above `terms.max_fee_sat`, or else above `most_fee_sat`.
        FundingTooSmall: after the fee, less is left than nodes relay.
        Malformed: not an address of the channel's network.
    """
    limit_sat = None if terms.max_fee_sat is None else whole(terms.max_fee_sat, "max_fee_sat")
    terms = _replace(terms, sat_per_vb=whole(terms.sat_per_vb, "sat_per_vb"), max_fee_sat=limit_sat)
    held = record.held if terms.coins is None else terms.coins
    cost_sat = terms.sat_per_vb * input_size(record.terms)
    coins = [coin for coin in held if coin.value_sat > cost_sat] or list(held)
    if not coins:
        raise WrongState(name=record.name, state="not funded", need="funding")
    for coin in coins:
        if not (coin.source.checked or terms.unchecked):
            raise ValueUnchecked(outpoint=coin.outpoint, value_sat=coin.value_sat, source=coin.source.words)
    script = refund_script(record, terms.address)
    total_sat = sum(coin.value_sat for coin in coins)
    inputs = [Coin(parse_outpoint(coin.outpoint), coin.value_sat) for coin in coins]
    size = refund_size(record.terms, len(inputs), script)
    fee_sat = Sat(size * terms.sat_per_vb)
    least_sat = least_relayed_sat(script)  # independent of the server's dust limit
    if total_sat - fee_sat < least_sat:
        raise FundingTooSmall(got_sat=total_sat, need_sat=fee_sat + least_sat)
    most_sat = most_fee_sat(total_sat, size) if terms.max_fee_sat is None else terms.max_fee_sat
    if fee_sat > most_sat:
        rule = f"{MOST_FEE_PERCENT} % of {total_sat} sat, and {MOST_SAT_PER_VB} sat per byte"
        if terms.max_fee_sat is not None:
            rule = "your own limit"
        raise FeeTooHigh(got_sat=fee_sat, most_sat=most_sat, rule=rule)
    return sign_refunds(record.key, record.terms, inputs, script, fee_sat)


def most_fee_sat(total_sat: int, size: int) -> Sat:
    """Return the highest refund fee that needs no confirmation: a share of the value within a range of rates."""
    share = total_sat * MOST_FEE_PERCENT // 100
    return Sat(max(min(share, size * MOST_SAT_PER_VB), size * REFUND_SAT_PER_VB))


def refund_script(record: ChannelRecord, address: str = "") -> bytes:
    """ScriptPubKey that a refund pays to: of this address, or of the channel's home address. Raises Malformed."""
    return decode_address(address or record.home_address, record.network, "refund address")


def affordable_rate(total_sat: int, size: int, script: bytes, wanted_sat_per_vb: int) -> int:
    """Lower a rate that the payer did not type: to `most_fee_sat`, and so far that the output is still relayed."""
    leaves_output = (total_sat - least_relayed_sat(script)) // size
    return max(1, min(wanted_sat_per_vb, most_fee_sat(total_sat, size) // size, leaves_output))


def first_refund(record: ChannelRecord) -> tuple[str, ...]:
    """Sign the refund that the payer holds from the moment the funding is known; none if the fee would consume it.

    It is the payer's last resort. Commands that publish or show a refund sign a new one.
    """
    coins = () if record.funding is None else (record.funding,)
    try:
        signed = refund(record, RefundTerms(coins=coins, max_fee_sat=record.funding_sat, unchecked=True))
    except FundingTooSmall:
        return ()
    return (signed.transaction.hex(),)


def keep_refund(record: ChannelRecord, terms: RefundTerms) -> Flow[Refund]:
    """Sign a refund and save it: every published refund must be recognised later. Raises like `refund`."""
    signed = refund(record, terms)
    raw = signed.transaction.hex()
    others = tuple(each for each in record.refunds if each != raw)
    if record.refunds != (*others, raw):
        yield Save(_replace(record, refunds=(*others, raw)))
    return signed


def coins_at(record: ChannelRecord, outpoint: OutPoint, value_sat: Sat) -> Flow[ChannelRecord]:
    """Record the output that holds the coins of a channel that takes no more payments, with its refund.

    It is the change output of a settlement that the server made without notice. The payer's own chain shows it.
    """
    here = _replace(
        record,
        funding_outpoint=str(outpoint),
        funding_sat=value_sat,
        earlier_paid_sat=Sat(max(0, record.earlier_paid_sat + record.funding_sat - value_sat)),
        signed_sat=value_sat,
        acknowledged_sat=value_sat,
        refused=False,
        funding_source=Source.CHAIN,
        deposits=tuple(each for each in record.deposits if each.outpoint != str(outpoint)),
    )
    here = _replace(here, refunds=(*record.refunds, *first_refund(here)))
    yield Save(here)
    return here


def is_refund(record: ChannelRecord, txid: str) -> bool:
    """Say whether a displayed txid is that of a refund in the record."""
    return any(CTransaction.deserialize(bytes.fromhex(raw)).GetTxid()[::-1].hex() == txid for raw in record.refunds)


def spent(record: ChannelRecord, txid: str) -> Flow[ChannelRecord]:
    """Record which transaction (displayed txid) spent the funding, deep in the chain: a refund or a settlement."""
    ending = State.REFUNDED if is_refund(record, txid) else State.CLOSED
    settlement = "" if ending is State.REFUNDED else txid
    record = _replace(record, state=ending, settlement_txid=settlement, end_seen=True)
    yield Save(record)
    return record
