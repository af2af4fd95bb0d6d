"""The payer's record of one channel. Losing it means losing money: it is durable before a payment is sent.

Payments are stored as signed: as change values, the amount that still belongs to the payer. Signatures are not stored,
since signing is deterministic (RFC 6979) and yields the same bytes again.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from coincurve import PrivateKey
from msgspec import Struct

from paychan.client.coins import Deposit, Source, parse_outpoint
from paychan.protocol.address import decode_address, encode_address, key_script
from paychan.protocol.errors import Malformed
from paychan.protocol.keys import parse_public_key
from paychan.protocol.kinds.base import RBPCP_KIND, ChannelTerms, make_terms
from paychan.protocol.payment import Payment, PaymentSigner
from paychan.protocol.types import MAX_MONEY_SAT, Network, OutPoint, Sat, UnixTime
from paychan.protocol.wire.rbpcp import Dialect


class State(Enum):
    """State of a channel, as far as the payer knows. Stored by value: never rename."""

    NEW = "new"  # has an address, perhaps funding; not opened
    OPEN = "open"  # the server took the opening payment
    CLOSING = "closing"  # the payer asked to close, or the server reported it; not settled yet
    CLOSED = "closed"  # settled
    REFUNDED = "refunded"  # a refund took all coins back


class ChannelRecord(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One channel: fixed facts, then the signed and the acknowledged amounts."""

    format: Literal[1] = 1
    name: str
    url: str
    """Base URL of the server, without a slash at its end."""
    version: Literal[1, 2]
    dialect: Dialect
    network: Network
    private_key: str
    server_key: str
    expiry: UnixTime
    funding_address: str
    """Address of the funding: rebuilt from server key, own key and expiry, never taken from the server."""
    created_at: UnixTime
    open_price_sat: Sat
    dust_sat: Sat
    min_confirmations: int
    settlement_period_hours: int
    change_address: str
    meant_sat: Sat = Sat(0)
    """Amount that the payer planned to send; 0 for the minimum."""
    location: str
    """Path and query of v1 requests: from the last Location, below `url`. v2 derives its paths."""

    funding_outpoint: str = ""
    """`txid:vout` as wallets show it."""
    funding_sat: Sat = Sat(0)
    state: State = State.NEW
    secret: str = ""
    """Names a v2 channel; follows from the opening payment."""
    signed_sat: Sat | None = None
    """Change value of the newest payment that may have been sent."""
    acknowledged_sat: Sat | None = None
    """Change value of the newest payment that the server confirmed."""
    refused: bool = False
    """The server refused the newest signed payment, but may still use it."""
    application_data: str = ""
    """Application data of the newest signed payment."""
    closing_sat: Sat | None = None
    """Change value of the closing payment, once the payer asked to close."""
    closing_address: str = ""
    settlement_txid: str = ""
    end_seen: bool = False
    """The payer's own chain showed the spend of the funding.

    Otherwise `state` and `settlement_txid` are the server's claim.
    """
    refunds: tuple[str, ...] = ()
    """Signed refunds (hex), the newest last; the first one is signed when the funding becomes known."""
    payout_address: str = ""
    """Final address of the coins of a movable channel; "" for the address of its own key."""
    earlier_paid_sat: Sat = Sat(0)
    """Amount paid at outputs that the channel has left. All other amounts belong to the present output."""
    moves: tuple[str, ...] = ()
    """Settlements (hex) that moved the channel from output to output, signed by both sides."""
    funding_source: Source = Source.UNKNOWN
    """Source of the funding output's value."""
    deposits: tuple[Deposit, ...] = ()
    """Further outputs at the address that, when last seen, were unspent or not spent deep in the chain."""
    offered_fee_sat: Sat = Sat(0)
    """Fee that the closing payment offered."""
    paid_fee_sat: Sat | None = None
    """Fee of the settlement, read from it; None if the server showed none, or settled several channels in one."""
    kind: str = RBPCP_KIND
    """Tag of the channel's kind."""
    funding_asked: bool = False
    """The program was asked to send the coins: it may have sent them, so it is not asked again."""
    identity: str = ""
    """The server's identity key (hex), once a request was paid by an offer that named it; "" before."""
    key_index: int | None = None
    """Index of the key below the wallet's seed; None for a random key of an earlier version."""

    def __repr__(self) -> str:
        """Hide the private key."""
        return f"ChannelRecord({self.name}, {self.state.value}, left_sat={self.left_sat})"

    @property
    def key(self) -> PrivateKey:
        return PrivateKey(bytes.fromhex(self.private_key))

    @property
    def terms(self) -> ChannelTerms:
        server_key = parse_public_key(self.server_key, "server_key")
        return make_terms(server_key, self.key.public_key.format(), self.expiry, self.kind)

    @property
    def outpoint(self) -> OutPoint:
        return parse_outpoint(self.funding_outpoint)

    @property
    def funding(self) -> Deposit | None:
        """The output that funds the channel, once it is recorded."""
        if not self.funding_outpoint:
            return None
        return Deposit(self.funding_outpoint, self.funding_sat, self.funding_source)

    @property
    def held(self) -> tuple[Deposit, ...]:
        """Outputs that a refund spends: the funding unless the channel has ended, and all further deposits."""
        funding = () if self.funding is None or self.ended else (self.funding,)
        return (*funding, *self.deposits)

    @property
    def movable(self) -> bool:
        """Say whether the server can withdraw its earnings without ending the channel (RBPCP §6.2)."""
        return self.version == 2 and self.change_address == self.funding_address

    @property
    def home_address(self) -> str:
        """Address that finally receives the unspent amount, by a closing or a refund."""
        if not self.movable:
            return self.change_address
        return self.payout_address or encode_address(key_script(self.terms.client_key), self.network)

    @property
    def min_funding_sat(self) -> Sat:
        """Minimum funding with which the channel can be opened and still has change."""
        return Sat(self.open_price_sat + self.dust_sat)

    @property
    def amount_sat(self) -> Sat:
        """Amount to send to the address, in one output."""
        return max(self.meant_sat, self.min_funding_sat)

    @property
    def ended(self) -> bool:
        """Say whether the channel has ended, according to the server or the chain."""
        return self.state in (State.CLOSED, State.REFUNDED)

    @property
    def left_sat(self) -> Sat:
        """Amount that certainly still belongs to the payer: the change of the newest signed payment."""
        return self.funding_sat if self.signed_sat is None else self.signed_sat

    @property
    def paid_sat(self) -> Sat:
        """Sum of all signed payments, at this output and at earlier ones."""
        return Sat(self.earlier_paid_sat + self.funding_sat - self.left_sat)

    @property
    def agreed_sat(self) -> Sat:
        """Newest change value that both sides know."""
        return self.funding_sat if self.acknowledged_sat is None else self.acknowledged_sat

    @property
    def pending_sat(self) -> Sat:
        """Sum of the signed payments that were never acknowledged."""
        return Sat(self.agreed_sat - self.left_sat)

    @property
    def unacknowledged(self) -> bool:
        """Say whether the newest signed payment still has no answer. Its amount may be 0."""
        return self.signed_sat != self.acknowledged_sat

    def sign(self, change_sat: Sat, address: str = "") -> Payment:
        """Sign a payment that leaves `change_sat` at `address` (default: the channel's change address)."""
        return self.signer(address).payment(change_sat)

    def signer(self, address: str = "") -> PaymentSigner:
        """Return a signer for many payments, with change to `address` (default: the channel's change address)."""
        script = decode_address(address or self.change_address, self.network)
        return PaymentSigner(self.key, self.terms, self.outpoint, self.funding_sat, script)


def check_record(record: ChannelRecord) -> None:
    """Check a record that was read for consistency.

    Raises:
        PaychanError, ValueError: keys, expiry, addresses or amounts contradict each other.
    """
    if record.terms.funding_address(record.network) != record.funding_address:
        raise Malformed(field="funding_address", reason="does not follow from the keys and the expiry")
    for address in {record.change_address, record.closing_address, record.payout_address} - {""}:
        decode_address(address, record.network)
    if record.funding_outpoint:
        parse_outpoint(record.funding_outpoint)
    for deposit in record.deposits:
        parse_outpoint(deposit.outpoint)
        if not 0 <= deposit.value_sat <= MAX_MONEY_SAT:
            raise Malformed(field="deposits", reason=f"{deposit.value_sat} sat")
    for raw in (*record.refunds, *record.moves):
        bytes.fromhex(raw)
    check_amounts(record)


def check_amounts(record: ChannelRecord) -> None:
    """Check that the amounts of a record fit each other. Raises Malformed."""
    amounts = (0, record.left_sat, record.agreed_sat, record.funding_sat, MAX_MONEY_SAT)
    if list(amounts) != sorted(amounts) or not 0 <= record.earlier_paid_sat <= MAX_MONEY_SAT:
        raise Malformed(field="signed_sat", reason="amounts contradict each other")
