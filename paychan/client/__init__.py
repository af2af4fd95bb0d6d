"""Payer library, without server code: open a channel to a paychan server, pay over it, close it, or take a refund.

from paychan.client import Payer

payer = Payer("http://localhost:8000")
channel = payer.channel_for(room_sat=5000)  # finds the channel that is open to this server, or opens one
receipt = channel.pay(1000)  # amounts are in satoshi
print(receipt.total_paid_sat, receipt.left_sat)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paychan.client.channel import AsyncChannel, Channel
from paychan.client.coins import Deposit, Source
from paychan.client.errors import (
    AmbiguousName,
    AmountTooSmall,
    BackupExists,
    BackupNotWritten,
    BodyNotRepeatable,
    ChannelConflict,
    ChannelForgotten,
    ChannelGone,
    ChannelInUse,
    ChannelMoving,
    ChannelUnknown,
    ClientError,
    CountedLess,
    DamagedBackup,
    DamagedFile,
    Declined,
    FalseProof,
    FeeTooHigh,
    FundingDiffers,
    FundingMissing,
    FundingNotThere,
    FundingNotTold,
    FundingTooSmall,
    HostNotAllowed,
    InsufficientFunds,
    LaterFile,
    LogInUse,
    LooseMode,
    MayHoldCoins,
    NoBackup,
    NoChannel,
    NoPlace,
    NoSeed,
    NoSuchChannel,
    NotADirectory,
    NotApproved,
    OtherSeed,
    OverBudget,
    OverLimit,
    PaymentPending,
    PaymentRefused,
    ProxyUnusable,
    RecordNotWritten,
    Refused,
    ServerFailed,
    ServerMisbehaved,
    StillUnpaid,
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
    WrongUrl,
    WrongValue,
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

if TYPE_CHECKING:
    from paychan.client.paying.budget import Budget, Question
    from paychan.client.paying.clients import paid_async_client, paid_client
    from paychan.client.paying.errors import BodyUnpaid, IdentityChanged
    from paychan.client.paying.exchange import Bill, Need, Purse

__all__ = [
    "AmbiguousName",
    "AmountTooSmall",
    "AsyncChannel",
    "AsyncPayer",
    "BackupExists",
    "BackupNotWritten",
    "Bill",
    "BodyNotRepeatable",
    "BodyUnpaid",
    "Budget",
    "Channel",
    "ChannelConflict",
    "ChannelForgotten",
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
    "FalseProof",
    "FeeTooHigh",
    "FundingDiffers",
    "FundingMissing",
    "FundingNotThere",
    "FundingNotTold",
    "FundingOutput",
    "FundingTooSmall",
    "HostNotAllowed",
    "IdentityChanged",
    "InsufficientFunds",
    "LaterFile",
    "Limits",
    "LogInUse",
    "LooseMode",
    "MayHoldCoins",
    "Need",
    "Network",
    "NoBackup",
    "NoChannel",
    "NoPlace",
    "NoSeed",
    "NoSuchChannel",
    "NotADirectory",
    "NotApproved",
    "OtherSeed",
    "OverBudget",
    "OverLimit",
    "Patience",
    "Payer",
    "PaymentPending",
    "PaymentRefused",
    "ProxyUnusable",
    "Purse",
    "Question",
    "Receipt",
    "RecordNotWritten",
    "RefundTerms",
    "Refused",
    "ServerFailed",
    "ServerMisbehaved",
    "Settled",
    "Source",
    "State",
    "StillUnpaid",
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
    "WrongUrl",
    "WrongValue",
    "paid_async_client",
    "paid_client",
]

_LATER = {
    "Bill": "exchange",
    "BodyUnpaid": "errors",
    "IdentityChanged": "errors",
    "Budget": "budget",
    "Need": "exchange",
    "Purse": "exchange",
    "Question": "budget",
    "paid_async_client": "clients",
    "paid_client": "clients",
}
"""Names of modules of `paying`, which are imported at their first use: commands that pay no request start faster."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"paychan.client.paying.{_LATER[name]}"), name)
