"""The next step after a failure of a payer's command, by the kind of the failure."""

from __future__ import annotations

from paychan.client import (
    AmbiguousName,
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
    FeeTooHigh,
    FundingDiffers,
    FundingMissing,
    FundingNotThere,
    FundingNotTold,
    LaterFile,
    NoChannel,
    NoSuchChannel,
    OverBudget,
    OverLimit,
    PaymentPending,
    PaymentRefused,
    ServerFailed,
    ServerMisbehaved,
    TermsUnacceptable,
    Unacknowledged,
    Unreachable,
    UnreadableFile,
    ValueUnchecked,
    WouldTakeBack,
    WrongState,
    WrongUrl,
)

_RESUME = "`paychan channel pay {name} --resume` sends the last payment again; it counts once."
_STATUS = "`paychan channel status {name}` asks the server for the channel's state."
_NEXT_STEPS: dict[type[ClientError], str] = {
    Unacknowledged: "`paychan channel open {name}` sends it again.",
    Unreachable: "Is the server running? If a payment was pending: " + _RESUME,
    ChannelMoving: "The move takes some blocks; then " + _RESUME,
    PaymentPending: (
        "The payment is kept: the next payment finishes it first, paid once, and so does "
        "`paychan channel pay {name} --resume`."
    ),
    ServerFailed: "Nothing is decided yet. If a payment was pending: " + _RESUME,
    CountedLess: "`paychan channel status {name}` compares the sums with the server's.",
    ServerMisbehaved: "Your signatures remain valid; the rest of the answer was ignored. " + _STATUS,
    PaymentRefused: _STATUS,
    ChannelUnknown: "If the server has lost the channel, "
    + _RESUME
    + " Otherwise the refund is yours after the expiry.",
    WouldTakeBack: _RESUME,
    ChannelGone: _STATUS,
    FundingMissing: "`paychan channel open {name}` waits for it.",
    FundingNotTold: (
        "Give it yourself: `paychan channel open {name} --outpoint TXID:VOUT --transaction HEX`, which proves the value, "
        "or with --value SAT --unchecked instead."
    ),
    ChannelConflict: "If it is settled, nothing is left to do; if not, the refund is yours after the expiry.",
    WrongUrl: "",
    TermsUnacceptable: "`paychan channel new --help` shows the options that change the accepted terms.",
    OverLimit: "--limit raises it.",
    OverBudget: "--max SAT is the highest price, --max-day SAT the highest sum of a day; `paychan wallet budget` shows the wallet's own.",
    NoChannel: "--open opens one.",
    AmbiguousName: "Give more of its characters.",
    ChannelForgotten: "`paychan channel key {name}` shows its key all the same.",
    NoSuchChannel: "`paychan channel list` shows the names.",
    ChannelInUse: "Wait until the other command ends.",
    DamagedBackup: "Use another backup, and keep this file: it may hold the only copy of a key.",
    DamagedFile: (
        "Restore a copy of this file (`paychan wallet restore BACKUP`): it holds a key, so don't delete it. "
        "Other channels are not affected."
    ),
    UnreadableFile: "Make it readable for this user, or run the command as its owner. Other channels are not affected.",
    LaterFile: "Update paychan. Other channels are not affected.",
    FundingDiffers: "Check the transaction in a wallet or explorer. --transaction proves the value, --unchecked uses your value.",
    FundingNotThere: "If the server has not seen it yet, wait; --transaction proves the output, --unchecked uses your value.",
    ValueUnchecked: (
        "`paychan channel refund {name} --transaction HEX` (the funding transaction) or --node or --electrum checks it; "
        "--unchecked signs without a check."
    ),
    FeeTooHigh: "--max-fee SAT raises the limit.",
}

_BY_STATE = {
    "new": (
        "`paychan channel open {name}` opens it; without coins, `paychan channel forget {name}` takes it off the list."
    ),
    "not funded": "`paychan channel open {name}` waits for the coins.",
    "open": "It needs no opening: `paychan channel pay {name} SAT` pays, `paychan channel close {name}` closes it.",
    "closing": "It takes no more payments: `paychan channel close {name}` asks for the settlement.",
    "closed": "It takes no more payments: `paychan channel new URL` makes a new channel.",
    "refunded": "It takes no more payments: `paychan channel new URL` makes a new channel.",
}
"""The next step after `WrongState`, by the state that the channel has."""


def advice(error: Exception, name: str) -> str:
    """Return the next step after a failure; "" if there is none."""
    step = next((text for kind, text in _NEXT_STEPS.items() if isinstance(error, kind)), "")
    if isinstance(error, WrongState):
        step = _BY_STATE.get(error.fields["state"], "`paychan channel list` shows the state.")
    if isinstance(error, ChannelForgotten):
        name = error.fields["name"]
    if not name and "{name}" in step:
        step = "Is the server running?" if isinstance(error, Unreachable) else ""
    if name and getattr(error, "code", "") == "not_economical":
        step = "`paychan channel close {name} --fee SAT` offers to pay for it (version 2)."
    if getattr(error, "code", "") == "expiry_too_soon":
        step = "The server's time, or that of its chain, is ahead of this clock: a longer --hours or a later --expires helps."
    if name and getattr(error, "code", "") == "payment_short":
        need = getattr(error, "fields", {}).get("need_sat", "SAT")
        step = f"`paychan channel open {{name}} --amount {need}` pays the server's present price."
    return step.format(name=name)
