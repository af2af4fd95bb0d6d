"""Taking one's own back: the refund after expiry, and the key that change is paid to."""

from __future__ import annotations

import bitcoin.base58
from bitcoin.core import Hash

from paychan.client.errors import FundingTooSmall, WrongState
from paychan.client.record import ChannelRecord
from paychan.protocol.address import decode_address, encode_address, key_script
from paychan.protocol.refund import Refund, refund_at_rate
from paychan.protocol.types import Network


def key_address(client_key: bytes, network: Network) -> str:
    """P2PKH address of the channel's own key: where change goes unless the payer names another address."""
    return encode_address(key_script(client_key), network)


def wif(record: ChannelRecord) -> str:
    """Private key in the form that wallets import, to sweep what was paid to `key_address`."""
    payload = bytes([record.network.wif_version]) + bytes.fromhex(record.private_key) + b"\x01"
    return str(bitcoin.base58.encode(payload + Hash(payload)[:4]))


def refund(record: ChannelRecord, sat_per_vb: int, address: str = "") -> Refund:
    """Sign the transaction that takes the whole funding back without the server, once `expiry` has passed.

    It pays to `address`, or else to the channel's change address.

    Raises:
        WrongState: not funded.
        FundingTooSmall: the fee leaves less than the dust limit.
        Malformed: not an address of the channel's network.
    """
    if not record.funding_outpoint:
        raise WrongState(name=record.name, state="not funded", need="funding")
    script = decode_address(address or record.change_address, record.network, "refund address")
    signed = refund_at_rate(record.key, record.terms, record.outpoint, record.funding_sat, script, sat_per_vb)
    if record.funding_sat - signed.fee_sat < record.dust_sat:
        raise FundingTooSmall(got_sat=record.funding_sat, need_sat=signed.fee_sat + record.dust_sat)
    return signed
