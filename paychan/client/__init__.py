"""What a payer's program uses; needs no server code.

from paychan.client import Payer

channel = Payer("http://localhost:8000").new_channel(hours=72)
channel.fund_debug()  # or: channel.fund("txid:vout", value_sat), after a wallet has paid to channel.address
channel.open()
receipt = channel.pay(1000)
"""

from paychan.client.channel import AsyncChannel, Channel
from paychan.client.closing import Settled
from paychan.client.errors import (
    ChannelConflict,
    ChannelGone,
    ChannelInUse,
    ChannelUnknown,
    ClientError,
    DamagedFile,
    Declined,
    FundingTooSmall,
    InsufficientFunds,
    NoSuchChannel,
    OverLimit,
    PaymentRefused,
    Refused,
    ServerFailed,
    ServerMisbehaved,
    TermsUnacceptable,
    Unacknowledged,
    Unreachable,
    WalletError,
    WouldLeaveDust,
    WouldTakeBack,
    WrongState,
)
from paychan.client.flow import Patience
from paychan.client.payer import AsyncPayer, Payer
from paychan.client.paying import Receipt
from paychan.client.record import ChannelRecord, State
from paychan.client.terms import Limits
from paychan.protocol.rest import Dialect
from paychan.protocol.types import Network

__all__ = [
    "AsyncChannel",
    "AsyncPayer",
    "Channel",
    "ChannelConflict",
    "ChannelGone",
    "ChannelInUse",
    "ChannelRecord",
    "ChannelUnknown",
    "ClientError",
    "DamagedFile",
    "Declined",
    "Dialect",
    "FundingTooSmall",
    "InsufficientFunds",
    "Limits",
    "Network",
    "NoSuchChannel",
    "OverLimit",
    "Patience",
    "Payer",
    "PaymentRefused",
    "Receipt",
    "Refused",
    "ServerFailed",
    "ServerMisbehaved",
    "Settled",
    "State",
    "TermsUnacceptable",
    "Unacknowledged",
    "Unreachable",
    "WalletError",
    "WouldLeaveDust",
    "WouldTakeBack",
    "WrongState",
]
