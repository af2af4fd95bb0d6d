"""What a channel is: its stored record, the commands it may get, and the outcomes. `machine.py` holds the rules."""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

from msgspec import Struct

from paychan.protocol.errors import PaychanError
from paychan.protocol.kinds.script import ChannelTerms
from paychan.protocol.moment import paying_time
from paychan.protocol.payment import Payment
from paychan.protocol.settlement import Claim, Settlement, first_output_sat
from paychan.protocol.types import OutPoint, Sat, UnixTime

# --- what is stored -------------------------------------------------------------------------------------------------


class State(Enum):
    """Where a channel stands. Stored by value: never renumber."""

    OPEN = "open"  # takes payments
    CLOSING = "closing"  # takes none; its settlement is being signed or published
    PUBLISHED = "published"  # its settlement was handed to the network
    CLOSED = "closed"  # its settlement is confirmed deep enough; remembered for ever
    LOST = "lost"  # the client's refund spent the funding output; taken up again if the chain takes that back
    UNFUNDED = "unfunded"  # its funding transaction was replaced; goes on if that is there after all


class CloseReason(Enum):
    """Why a channel left OPEN."""

    DRAINED = "drained"
    CLIENT = "client"
    EXPIRY = "expiry"
    OPERATOR = "operator"
    WITHDRAW = "withdraw"  # what was earned is settled; the channel goes on at the client's change output


class Closing(Struct, frozen=True, array_like=True):
    """How a channel that left OPEN is being settled."""

    reason: CloseReason
    begun_at: UnixTime
    client_fee_sat: Sat = Sat(0)
    settlement: Settlement | None = None
    """The newest one signed: the one that pays the highest rate."""
    spent_by: bytes = b""
    """Internal txid of what ended the channel, where that is not `settlement`, or where the channel moved there."""


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
    """SHA256 of the opening payment's signature with flag names a v2 channel; empty in v1."""
    payments: int = 0
    offered: Payment | None = None
    """Verified and stored, but the application has not answered for it yet; `payment` stays what it was."""
    closing: Closing | None = None
    offered_data: str = ""
    """What the client sent to the application beside the offered payment."""
    offered_seq: int = 0
    """Sequence number of the record with which the offered payment was offered; 0 in records from before this field."""
    restored: bool = False
    """The record is from a backup, and nothing was booked since: the application may know payments that it lacks."""

    @property
    def claim(self) -> Claim:
        return Claim(self.terms, self.outpoint, self.funding_sat, self.change_script, self.payment)

    @property
    def received_sat(self) -> Sat:
        return Sat(self.funding_sat - self.payment.change_sat)

    @property
    def is_used(self) -> bool:
        """Whether coins or payments hang on its funding output; an offered payment may have been delivered."""
        return self.received_sat > 0 or self.offered is not None or self.state is not State.OPEN

    @property
    def moves(self) -> bool:
        """Say whether it goes on, or went on, at the change output of its settlement."""
        return self.closing is not None and self.closing.reason is CloseReason.WITHDRAW

    @property
    def moved_sat(self) -> Sat:
        """What a channel that moves goes on with: the chain's word, where the record holds the transaction."""
        settlement = self.closing.settlement if self.closing else None
        confirmed = self.closing.spent_by if self.closing else b""
        if settlement is not None and settlement.txid == confirmed:
            return first_output_sat(settlement.transaction)
        return self.payment.change_sat


def can_move(channel: Channel) -> bool:
    """Say whether a channel can go on at the change output of a withdrawal: a v2 channel whose change funds it again.

    RBPCP §6.2: "so that the server can move received value without the client".
    """
    return bool(channel.secret) and channel.change_script == channel.terms.funding_script


# --- what the world tells, and what comes of it ---------------------------------------------------------------------


class Depth(Struct, frozen=True, forbid_unknown_fields=True):
    """Funding outputs of up to so many satoshi need so many confirmations."""

    up_to_sat: Sat
    confirmations: int


class Rules(Struct, frozen=True):
    """The operator's terms: amounts in satoshi, periods in seconds."""

    dust_sat: Sat
    min_confirmations: int
    settlement_period_seconds: int
    min_duration_seconds: int
    fee_sat_per_vb: int
    """Where the curve of `fees` begins when the chain has no estimate."""
    asks_application: bool = False
    """A payment counts only after the application has said yes to it."""
    unanswered_counts: bool = True
    """What becomes of an offered payment that the application did not answer for: it is settled, or dropped."""
    smaller: tuple[Depth, ...] = ()
    """Less depth for less money, smallest first; `min_confirmations` counts above the last."""
    max_fee_sat_per_vb: int = 1000
    fee_share_percent: int = 100
    """Most of what was received that may become fee, beside what relaying costs."""
    needed_sat_per_vb: int = 0
    """Rate that is paid whatever share it takes; set by `fees.pressed` when a deadline has passed."""
    deadline_margin_seconds: int = 0
    """Settlements should be confirmed this long before the refund becomes valid."""
    longest_life_seconds: int = 0
    """A new channel expires within this; 0: no limit."""

    def confirmations_needed(self, funding_sat: Sat) -> int:
        """Depth that a funding output of this value needs."""
        return next((row.confirmations for row in self.smaller if funding_sat <= row.up_to_sat), self.min_confirmations)


class View(Struct, frozen=True):
    """The moment at which a command is judged: the time, the rules, and a reason not to accept payments, if any."""

    now: UnixTime
    rules: Rules
    frozen: str = ""
    median_time: UnixTime | None = None
    floor_sat_per_vb: int = 1
    """Least rate that the chain relays now."""
    """The chain's median time past, if a block was seen."""

    @property
    def paying_time(self) -> UnixTime:
        """The time by which fee rates rise: a clock that is ahead can't make a settlement dear, see `moment`."""
        return paying_time(self.now, self.median_time)


class Opening(Struct, frozen=True):
    """A request for a new channel, with the funding output that our own view of the chain shows for it."""

    terms: ChannelTerms
    outpoint: OutPoint
    funding_sat: Sat
    confirmations: int
    change_script: bytes
    payment: Payment
    price_sat: Sat
    secret: bytes = b""


class Pay(Struct, frozen=True):
    """The client pays; `application_data` is for the application."""

    payment: Payment
    application_data: str = ""


class Answer(Struct, frozen=True):
    """The application answered for the offered payment: a refusal means no, `data` is for the client."""

    refusal: str = ""
    data: str = ""


class Unanswered(Struct, frozen=True):
    """The application was asked about the offered payment of a closing channel, and did not answer."""


class CloseByProof(Struct, frozen=True):
    """The client closes by showing the newest payment again (v1)."""

    payment: Payment


class CloseByPayment(Struct, frozen=True):
    """The client closes with a last payment, which is the fee it offers, perhaps to another change address (v2)."""

    payment: Payment
    change_script: bytes | None = None


class Close(Struct, frozen=True):
    """We close: expiry is near, or the operator wants it, or wants what was earned while the channel goes on."""

    reason: CloseReason


class Signed(Struct, frozen=True):
    """The signer returned a settlement: the first, or one that pays a higher rate than the last."""

    settlement: Settlement


class Published(Struct, frozen=True):
    """The network took the settlement."""


class Kept(Struct, frozen=True):
    """The network keeps this settlement of ours, and replaces it by none: the newest one was refused."""

    settlement: Settlement


class Confirmed(Struct, frozen=True):
    """A settlement of ours (internal txid) is as deep in the chain as the operator wants."""

    txid: bytes


class Vanished(Struct, frozen=True):
    """What ended the channel is neither deep in the chain nor in the mempool any more."""


class Found(Struct, frozen=True):
    """The chain shows a settlement by the server's branch that the record does not have; see `finding`."""

    claim: Claim
    settlement: Settlement
    deep: bool


class Unfunded(Struct, frozen=True):
    """The funding output is gone, and no transaction spends it: blocks were mined without it."""


class Funded(Struct, frozen=True):
    """The funding output is there after all."""


class TakenBack(Struct, frozen=True):
    """A withdrawal that the signer refused is given up, for this reason; it has signed nothing for the channel."""

    error: PaychanError


class SpentElsewhere(Struct, frozen=True):
    """Another transaction spends the funding output (internal txid)."""

    txid: bytes


class Adopt(Struct, frozen=True):
    """The signer knows this claim, and has signed this settlement for it, if any: the record is from a backup."""

    claim: Claim
    settlement: Settlement | None = None


Command: TypeAlias = (
    Pay
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
    """The channel after the command (the same object when nothing changed), and what it brought in satoshi."""

    channel: Channel
    value_sat: Sat = Sat(0)
    application_data: str = ""


class Rejected(Struct, frozen=True):
    """Nothing changed, for this reason."""

    error: PaychanError


Outcome: TypeAlias = Accepted | Rejected


class Step(Enum):
    """What a record asks of the world next."""

    OFFER = "ask the application about the offered payment"
    SIGN = "ask the signer for the settlement"
    PUBLISH = "hand the settlement to the network"
    WATCH = "see how deep the settlement is"


def next_step(channel: Channel) -> Step | None:
    """Derive what is to be done for a channel from its record alone."""
    if channel.state is State.OPEN:
        return Step.OFFER if channel.offered is not None else None
    if channel.state is State.CLOSING and channel.offered is not None:
        return Step.OFFER
    if channel.state is State.CLOSING and channel.closing is not None:
        return Step.SIGN if channel.closing.settlement is None else Step.PUBLISH
    return Step.WATCH if channel.state is State.PUBLISHED else None
