"""The channel: its stored record, the commands it accepts, and their outcomes. `state_machine.py` holds the rules."""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

import msgspec
from msgspec import Struct

from paychan.protocol.charges import Charge, Delivered, Delivery, Release
from paychan.protocol.errors import PaychanError
from paychan.protocol.kinds.base import ChannelTerms
from paychan.protocol.moment import paying_time
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.settlement import Claim, Settlement, first_output_sat
from paychan.protocol.types import OutPoint, Sat, UnixTime

# --- the stored record ----------------------------------------------------------------------------------------------


class State(Enum):
    """State of a channel. Records store the value: never rename one."""

    OPEN = "open"  # accepts payments
    CLOSING = "closing"  # accepts no payments; its settlement is being signed or broadcast
    PUBLISHED = "published"  # its settlement was broadcast
    CLOSED = "closed"  # its settlement is confirmed deep enough; the record is kept for ever
    LOST = "lost"  # the client's refund spent the funding output; back to CLOSING if the chain drops the refund
    UNFUNDED = "unfunded"  # its funding transaction was replaced; the channel returns if that transaction confirms


class CloseReason(Enum):
    """Why a channel left OPEN."""

    DRAINED = "drained"
    CLIENT = "client"
    EXPIRY = "expiry"
    OPERATOR = "operator"
    WITHDRAW = "withdraw"  # the received value is settled; the channel continues at the client's change output


class Closing(Struct, frozen=True, array_like=True):
    """State of the settlement of a channel that left OPEN."""

    reason: CloseReason
    begun_at: UnixTime
    client_fee_sat: Sat = Sat(0)
    settlement: Settlement | None = None
    """The newest signed settlement, which is the one with the highest fee rate."""
    spent_by: bytes = b""
    """Internal txid of the transaction that ended the channel, if it is not `settlement` or the channel moved to it."""


class Channel(Struct, frozen=True, array_like=True):
    """One channel: fixed facts, newest accepted payment, state. `seq` grows by one with every stored change."""

    terms: ChannelTerms
    outpoint: OutPoint
    funding_sat: Sat
    change_script: bytes
    payment: Payment
    state: State
    seq: int
    opened_at: UnixTime
    secret: bytes = b""
    """Name of a v2 channel: SHA256 of the opening payment's signature with its flag byte. Empty in v1."""
    payments: int = 0
    offered: Payment | None = None
    """A verified payment that waits for the application's answer; `payment` is still the one before it."""
    closing: Closing | None = None
    offered_data: str = ""
    """Text for the application that the client sent with the offered payment."""
    offered_seq: int = 0
    """`seq` of the record in which the offered payment was stored first; 0 in records older than this field."""
    restored: bool = False
    """The record is from a backup and no payment was booked since: the application may know payments that it lacks."""
    spent_sat: Sat = Sat(0)
    """Part of `accepted_sat` for which something was delivered, or is being delivered."""
    withdrawn_sat: Sat = Sat(0)
    """Value received at the outputs that the channel had before its withdrawals."""
    deliveries: tuple[Delivery, ...] = ()
    """Newest paid requests, the oldest first."""

    @property
    def claim(self) -> Claim:
        return Claim(self.terms, self.outpoint, self.funding_sat, self.change_script, self.payment)

    def verifier(self, change_script: bytes | None = None) -> PaymentVerifier:
        """Make the verifier of its payments, or of those that pay the change to another script."""
        return PaymentVerifier(self.terms, self.outpoint, self.funding_sat, change_script or self.change_script)

    @property
    def received_sat(self) -> Sat:
        return Sat(self.funding_sat - self.payment.change_sat)

    @property
    def accepted_sat(self) -> Sat:
        """Value of all accepted payments, also of those before a withdrawal."""
        return Sat(self.withdrawn_sat + self.received_sat)

    @property
    def credit_sat(self) -> Sat:
        """Value of accepted payments for which nothing was delivered yet."""
        return Sat(self.accepted_sat - self.spent_sat)

    @property
    def is_used(self) -> bool:
        """Whether value depends on the funding output; the application may have delivered for an offered payment."""
        return self.received_sat > 0 or self.offered is not None or self.state is not State.OPEN

    @property
    def moves(self) -> bool:
        """Whether the channel continues, or continued, at the change output of its settlement."""
        return self.closing is not None and self.closing.reason is CloseReason.WITHDRAW

    @property
    def moved_sat(self) -> Sat:
        """Funding of the successor, in satoshi: output 0 of the confirmed settlement if the record holds it."""
        settlement = self.closing.settlement if self.closing else None
        confirmed = self.closing.spent_by if self.closing else b""
        if settlement is not None and settlement.txid == confirmed:
            return first_output_sat(settlement.transaction)
        return self.payment.change_sat


def delivered(channel: Channel, payment: Payment) -> Channel:
    """Return the channel with a payment whose value is spent: the application or an earlier record delivered for it."""
    value_sat = channel.payment.change_sat - payment.change_sat
    return msgspec.structs.replace(channel, payment=payment, spent_sat=Sat(channel.spent_sat + value_sat))


def can_move(channel: Channel) -> bool:
    """Say whether a channel can continue at a withdrawal's change output: a v2 channel whose change funds it again.

    RBPCP §6.2: "so that the server can move received value without the client".
    """
    return bool(channel.secret) and channel.change_script == channel.terms.funding_script


# --- commands and outcomes ------------------------------------------------------------------------------------------


class Depth(Struct, frozen=True, forbid_unknown_fields=True):
    """Funding outputs of at most `up_to_sat` satoshi need this number of confirmations."""

    up_to_sat: Sat
    confirmations: int


class Rules(Struct, frozen=True):
    """The operator's terms: amounts in satoshi, periods in seconds."""

    dust_sat: Sat
    min_confirmations: int
    settlement_period_seconds: int
    min_duration_seconds: int
    fee_sat_per_vb: int
    """Start of the fee curve (see `fees`) when the chain has no estimate."""
    asks_application: bool = False
    """A payment counts only after the application has accepted it."""
    unanswered_counts: bool = True
    """Whether an offered payment without an answer of the application is settled; else it is dropped."""
    smaller: tuple[Depth, ...] = ()
    """Lower depths for smaller funding outputs, smallest first; `min_confirmations` applies above the last row."""
    max_fee_sat_per_vb: int = 1000
    fee_share_percent: int = 100
    """Largest share of the received value that may become fee; the relay minimum may always be paid."""
    needed_sat_per_vb: int = 0
    """Rate that may be paid beyond that share; `fees.pressed` sets it when a deadline has passed."""
    deadline_margin_seconds: int = 0
    """Time between the deadline of a settlement's confirmation and the moment at which the refund becomes valid."""
    longest_life_seconds: int = 0
    """Longest time from opening to expiry; 0: no limit."""

    def confirmations_needed(self, funding_sat: Sat) -> int:
        """Depth that a funding output of this value needs."""
        return next((row.confirmations for row in self.smaller if funding_sat <= row.up_to_sat), self.min_confirmations)


class View(Struct, frozen=True):
    """The facts by which a command is judged: the time, the rules, and the reason to refuse payments, if any."""

    now: UnixTime
    rules: Rules
    frozen: str = ""
    median_time: UnixTime | None = None
    """The chain's median time past, if the server has seen a block."""
    floor_sat_per_vb: int = 1
    """Lowest rate that the chain relays now."""
    height: int | None = None
    """Height of the newest block, if the server has seen it; no kind needs it yet."""

    @property
    def paying_time(self) -> UnixTime:
        """Time on the fee curve: a clock that is ahead can't make a settlement expensive, see `moment`."""
        return paying_time(self.now, self.median_time)


class Opening(Struct, frozen=True):
    """A request for a new channel, with its funding output as the server's own chain view shows it."""

    terms: ChannelTerms
    outpoint: OutPoint
    funding_sat: Sat
    confirmations: int
    change_script: bytes
    payment: Payment
    price_sat: Sat
    secret: bytes = b""

    @property
    def verifier(self) -> PaymentVerifier:
        """Verifier of its payment."""
        return PaymentVerifier(self.terms, self.outpoint, self.funding_sat, self.change_script)


class Pay(Struct, frozen=True):
    """The client pays; `application_data` is text for the application."""

    payment: Payment
    application_data: str = ""


class Answer(Struct, frozen=True):
    """The application answered about the offered payment: a `refusal` text means no, `data` is for the client."""

    refusal: str = ""
    data: str = ""


class Unanswered(Struct, frozen=True):
    """The application was asked about the offered payment of a closing channel, and did not answer."""


class CloseByProof(Struct, frozen=True):
    """The client closes by showing the newest payment again (v1)."""

    payment: Payment


class CloseByPayment(Struct, frozen=True):
    """The client closes with a last payment (v2): its value is the fee offered; its change address may be a new one."""

    payment: Payment
    change_script: bytes | None = None


class Close(Struct, frozen=True):
    """The server closes: expiry is near, or the operator closes, or withdraws value while the channel continues."""

    reason: CloseReason


class Signed(Struct, frozen=True):
    """The signer returned a settlement: the first, or one with a higher fee rate than the one before."""

    settlement: Settlement


class Published(Struct, frozen=True):
    """The network accepted the settlement."""


class Kept(Struct, frozen=True):
    """The network keeps this earlier settlement of the channel, and refused the newest one as its replacement."""

    settlement: Settlement


class Confirmed(Struct, frozen=True):
    """A settlement by the server's branch (internal txid) is as deep in the chain as the operator wants."""

    txid: bytes


class Vanished(Struct, frozen=True):
    """The transaction that ended the channel is neither deep in the chain nor in the mempool any more."""


class Found(Struct, frozen=True):
    """The chain shows a settlement by the server's branch that the record lacks; see `finding`."""

    claim: Claim
    settlement: Settlement
    deep: bool


class Unfunded(Struct, frozen=True):
    """The funding output is gone, and no transaction spends it: blocks were mined without it."""


class Funded(Struct, frozen=True):
    """The funding output is in the chain again."""


class TakenBack(Struct, frozen=True):
    """The server cancels a withdrawal that the signer refused for this reason; the signer has signed nothing for it."""

    error: PaychanError


class SpentElsewhere(Struct, frozen=True):
    """Another transaction spends the funding output (internal txid)."""

    txid: bytes


class Adopt(Struct, frozen=True):
    """The record is from a backup: the signer knows this claim, and has signed this settlement for it, if any."""

    claim: Claim
    settlement: Settlement | None = None


Command: TypeAlias = (
    Pay
    | Charge
    | Release
    | Delivered
    | Answer
    | Unanswered
    | CloseByProof
    | CloseByPayment
    | Close
    | Signed
    | Published
    | Kept
    | Confirmed
    | Vanished
    | SpentElsewhere
    | Adopt
    | TakenBack
    | Found
    | Unfunded
    | Funded
)


class Accepted(Struct, frozen=True):
    """The channel after the command (the same object if nothing changed), and the value it brought, in satoshi."""

    channel: Channel
    value_sat: Sat = Sat(0)
    application_data: str = ""


class Rejected(Struct, frozen=True):
    """The command was refused for this reason; nothing changed."""

    error: PaychanError


Outcome: TypeAlias = Accepted | Rejected


class Step(Enum):
    """Next action of the server for a record."""

    OFFER = "ask the application about the offered payment"
    SIGN = "ask the signer for the settlement"
    PUBLISH = "broadcast the settlement"
    WATCH = "check how deep the settlement is"


def next_step(channel: Channel) -> Step | None:
    """Derive the server's next action for a channel from its record alone."""
    if channel.state is State.OPEN:
        return Step.OFFER if channel.offered is not None else None
    if channel.state is State.CLOSING and channel.offered is not None:
        return Step.OFFER
    if channel.state is State.CLOSING and channel.closing is not None:
        return Step.SIGN if channel.closing.settlement is None else Step.PUBLISH
    return Step.WATCH if channel.state is State.PUBLISHED else None
