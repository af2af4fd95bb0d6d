"""Payer library, without server code: open a channel to a paychan server, pay over it, close it, or take a refund.

from paychan.client import Payer

payer = Payer("http://localhost:8000")
channel = payer.channel_for(room_sat=5000)  # finds the channel that is open to this server, or opens one
receipt = channel.pay(1000)  # amounts are in satoshi
print(receipt.total_paid_sat, receipt.left_sat)
"""

from paychan.client.channel import AsyncChannel, Channel
from paychan.client.coins import Deposit, Source
from paychan.client.errors import (
    AmbiguousName,
    BackupExists,
    BackupNotWritten,
    ChannelConflict,
    ChannelGone,
    ChannelInUse,
    ChannelMoving,
    ChannelUnknown,
    ClientError,
    CountedLess,
    DamagedBackup,
    DamagedFile,
    Declined,
    FeeTooHigh,
    FundingDiffers,
    FundingMissing,
    FundingNotThere,
    FundingNotTold,
    FundingTooSmall,
    InsufficientFunds,
    LaterFile,
    LooseMode,
    MayHoldCoins,
    NoBackup,
    NoPlace,
    NoSeed,
    NoSuchChannel,
    NotADirectory,
    OtherSeed,
    OverLimit,
    PaymentPending,
    PaymentRefused,
    ProxyUnusable,
    RecordNotWritten,
    Refused,
    ServerFailed,
    ServerMisbehaved,
    TermsUnacceptable,
    Unacknowledged,
    Unreachable,
    UnreadableFile,
    ValueUnchecked,
    WalletError,
    WouldLeaveDust,
    WouldTakeBack,
    WrongNumber,
    WrongState,
)
from paychan.client.flows.close import Settled
from paychan.client.flows.open import FundingOutput
from paychan.client.flows.pay import Receipt
from paychan.client.flows.refund import RefundTerms
from paychan.client.limits import Limits
from paychan.client.payer import AsyncPayer, Payer
from paychan.client.record import ChannelRecord, State
from paychan.client.transport.effects import Patience
from paychan.protocol.types import Network
from paychan.protocol.wire.rbpcp import Dialect

__all__ = [
    "AmbiguousName",
    "AsyncChannel",
    "AsyncPayer",
    "BackupExists",
    "BackupNotWritten",
    "Channel",
    "ChannelConflict",
    "ChannelGone",
    "ChannelInUse",
    "ChannelMoving",
    "ChannelRecord",
    "ChannelUnknown",
    "ClientError",
    "CountedLess",
    "DamagedBackup",
    "DamagedFile",
    "Declined",
    "Deposit",
    "Dialect",
    "FeeTooHigh",
    "FundingDiffers",
    "FundingMissing",
    "FundingNotThere",
    "FundingNotTold",
    "FundingOutput",
    "FundingTooSmall",
    "InsufficientFunds",
    "LaterFile",
    "Limits",
    "LooseMode",
    "MayHoldCoins",
    "Network",
    "NoBackup",
    "NoPlace",
    "NoSeed",
    "NoSuchChannel",
    "NotADirectory",
    "OtherSeed",
    "OverLimit",
    "Patience",
    "Payer",
    "PaymentPending",
    "PaymentRefused",
    "ProxyUnusable",
    "Receipt",
    "RecordNotWritten",
    "RefundTerms",
    "Refused",
    "ServerFailed",
    "ServerMisbehaved",
    "Settled",
    "Source",
    "State",
    "TermsUnacceptable",
    "Unacknowledged",
    "Unreachable",
    "UnreadableFile",
    "ValueUnchecked",
    "WalletError",
    "WouldLeaveDust",
    "WouldTakeBack",
    "WrongNumber",
    "WrongState",
]
