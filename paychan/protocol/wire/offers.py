"""Offers, payments and channel states as x402 and MPP both say them, free of either's JSON.

The gateway and the payer's programs decide by these types; `x402.py` and `mpp.py` translate them. Amounts are satoshi.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from paychan.protocol.payment import Payment
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from paychan.protocol.unpaid import CumulativeMismatch, PaymentUnsupported

BINDING = "bitcoin-channel-v1"
"""Name of this way to pay, in x402 and in MPP."""

UNITS = ("request", "byte", "kilobyte", "second", "event", "token")

CHAINS = {
    "mainnet": "bip122:000000000019d6689c085ae165831e93",
    "testnet": "bip122:000000000933ea01ad0ee984209779ba",
    "testnet4": "bip122:00000000da84f2bafbbc53dee25a72ae",
    "signet": "bip122:00000008819873e925422c1ff0f99f7c",
    "regtest": "bip122:0f9188f13cb7b2c71f2a335e3a4fc328",
}
"""CAIP-2 id of each network: the first 32 hex digits of its displayed genesis hash. `testnet` is testnet3."""

_WORDS = {chain: word for word, chain in CHAINS.items()}


class Offer(Struct, frozen=True, cache_hash=True):
    """The price of a resource, and where and on what terms a channel is opened that pays it."""

    amount_sat: Sat
    """Price of one unit, or the most that a request costs whose price the upstream says."""
    unit: str
    """One of `UNITS`."""
    chain: str
    """CAIP-2 id, one of `CHAINS`."""
    identity: bytes
    """The server's stable identity key, 33 bytes: `payTo` in x402, `recipient` in MPP. It is no channel's key."""
    pay_url: str
    """Base URL of the RBPCP server, where a channel is opened."""
    network: str
    """Word of the chain in `CHAINS`."""
    open_price_sat: Sat
    min_confirmations: int
    settlement_period_seconds: int
    dust_sat: Sat
    realm: str
    description: str = ""
    suggested_deposit_sat: Sat | None = None


class Voucher(Struct, frozen=True):
    """A payment with its channel: the change that stays with the client, and the sum that all payments give so far."""

    channel: OutPoint
    change_sat: Sat
    cumulative_sat: Sat
    signature: bytes
    """DER, then one byte of the hash flag, as `Payment.signature_with_flag`."""

    @classmethod
    def of(cls, channel: OutPoint, funding_sat: Sat, payment: Payment) -> Voucher:
        """Write a payment of a channel whose funding output holds `funding_sat`."""
        cumulative = Sat(funding_sat - payment.change_sat)
        return cls(channel, payment.change_sat, cumulative, payment.signature_with_flag)

    @property
    def payment(self) -> Payment:
        """The payment as the core checks it."""
        return Payment(self.change_sat, self.signature[:-1], self.signature[-1])

    def mismatch(self, funding_sat: Sat) -> CumulativeMismatch | None:
        """Return a refusal if the redundant sum contradicts the capacity: the payer has another channel in mind."""
        need = Sat(funding_sat - self.change_sat)
        return None if self.cumulative_sat == need else CumulativeMismatch(got_sat=self.cumulative_sat, need_sat=need)


class Open(Struct, frozen=True):
    """A new channel with its first payment, for a funding output that is already deep enough."""

    voucher: Voucher
    client_key: bytes
    """33 bytes."""
    expiry: UnixTime
    change_script: bytes
    funding_tx: bytes | None = None
    """Serialized transaction for the server to broadcast; None if the network has it."""


class Close(Struct, frozen=True):
    """The payer closes its channel; the newest payment proves that the request is the payer's."""

    voucher: Voucher


Action: TypeAlias = Voucher | Open | Close


class ChannelState(Struct, frozen=True):
    """A channel as the server has it, with the newest payment as proof: the payer checks its own signature."""

    channel: OutPoint
    capacity_sat: Sat
    accepted_sat: Sat
    spent_sat: Sat
    expiry: UnixTime
    newest: Payment | None
    """None in success answers, whose reader has just made the payment, and if the server shows no proof.

    Only a caller that has shown an authentic payment of the channel may get the proof.
    """
    carried_sat: Sat = Sat(0)
    """Credit from before a withdrawal that no request has used up."""

    @property
    def credit_sat(self) -> Sat:
        """Accepted value that no request has used up, in satoshi."""
        return Sat(self.carried_sat + self.accepted_sat - self.spent_sat)

    @property
    def change_sat(self) -> Sat:
        """Change value of the newest payment, in satoshi."""
        return Sat(self.capacity_sat - self.accepted_sat)


class Settled(Struct, frozen=True):
    """A paid request: `charged_sat` was taken by this request; `state` is the channel after it."""

    state: ChannelState
    charged_sat: Sat
    client_key: bytes = b""


def asset_of(chain: str) -> str:
    """Return the CAIP-19 id of the chain's coin: SLIP-44 number 0 on mainnet, 1 on all test networks."""
    return f"{chain}/slip44:{0 if chain == CHAINS['mainnet'] else 1}"


def chain_of(genesis_hash: str) -> str:
    """Return the CAIP-2 id of the chain that begins with this block (displayed hash, 64 hex digits).

    Raises:
        PaymentUnsupported: none of `CHAINS`.
    """
    return _known(f"bip122:{genesis_hash[:32]}")


def word_of(chain: str) -> str:
    """Return the word of a chain.

    Raises:
        PaymentUnsupported: none of `CHAINS`.
    """
    return _WORDS[_known(chain)]


def address_network(chain: str) -> Network:
    """Return the network by which addresses of a chain are written.

    Raises:
        PaymentUnsupported: none of `CHAINS`.
    """
    return {"mainnet": Network.LIVE, "regtest": Network.REGTEST}.get(word_of(chain), Network.TEST)


def _known(chain: str) -> str:
    if chain not in _WORDS:
        raise PaymentUnsupported(field="chain", got=chain[:80], want="one of " + ", ".join(_WORDS))
    return chain
