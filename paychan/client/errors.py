"""Errors of the payer library: one tree. Every leaf has a stable `code`, typed `fields`, and a text with both numbers.

ClientError
├── Refused                 the server refused, with its own code, status and fields
│   ├── PaymentRefused      400 on a payment, opening or closing; the server may still use the signed payment
│   ├── ChannelUnknown      404
│   ├── ChannelConflict     409
│   ├── ChannelGone         410
│   ├── StillUnpaid         402 on a paid request; the server may still use the signed payment
│   └── ServerFailed        429, 5xx, after the last attempt
│       ├── ChannelMoving   the channel moves to another output, which must be deep in the chain first
│       └── PaymentPending  the application behind the server has not answered for a payment yet, which is kept
├── BodyUnpaid              an answer that is paid by units ends, because the next unit is not paid (`paying/errors.py`)
├── Unreachable             no answer; a payment in flight is kept, and the next `pay()` or `resume()` sends it again
├── ServerMisbehaved        the answer contradicts the signed payments or terms; the wallet keeps its own balance
│   ├── CountedLess         less of the payment was new than the wallet paid
│   └── FalseProof          the server shows a payment that this wallet did not sign
├── Declined                the client declined before it signed: terms, limits, amounts, the channel's state
│   ├── WrongUrl            the text that should name a server is no base URL
│   ├── WrongValue          a number outside its range (AmountTooSmall), or arguments that exclude each other
│   ├── OverBudget          a limit of the budget does not cover the price of a request
│   ├── HostNotAllowed      the budget does not name the host
│   ├── NotApproved         the budget's `approve` said no
│   ├── IdentityChanged     a seller names another identity key for the server of a channel (`paying/errors.py`)
│   ├── NoChannel           no channel of the wallet pays this server
│   └── BodyNotRepeatable   the body of the request was a stream, which can't be sent a second time
└── WalletError             a file of the wallet: missing, in use, damaged, unreadable, of a later version, for others to read
"""

from __future__ import annotations

from typing import Any, ClassVar

from paychan.shared.wording import grouped


class ClientError(Exception):
    """A failure with a stable `code`. Leaves declare `code` and `text`; the keyword arguments become `fields`."""

    code: str = ""
    text: ClassVar[str] = ""
    earlier_state: ClassVar[str] = "has no answer yet"
    """State of an earlier payment that had to be finished first and met this failure."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(grouped(self.text.format(**{name: _shown(name, value) for name, value in fields.items()})))
        self.fields = fields

    def concerns_earlier(self, pending_sat: int) -> None:
        """Say in text and fields that this is about an earlier payment, which had to be finished before a new one."""
        self.args = (self._about_earlier(pending_sat),)
        self.fields = {**self.fields, "earlier_sat": pending_sat}

    def _about_earlier(self, pending_sat: int) -> str:
        return f"nothing new was paid, because the earlier payment of {pending_sat:,} sat {self.earlier_state}: {self}"


def _shown(name: str, value: object) -> object:
    """Return a field as its text shows it: with grouped digits, if it is an amount or a number to compare."""
    counts = name.endswith("_sat") or name in ("got", "want")
    return f"{value:,}" if counts and isinstance(value, int) and not isinstance(value, bool) else value


# --- the server refused ---------------------------------------------------------------------------------------------


class Refused(ClientError):
    """A refusal: `code` is the server's stable code ("" without one), `fields` its numbers, `reason` its text."""

    text = "server refused with status {status}: {reason}"
    earlier_state = "was refused"

    def __init__(self, status: int, code: str, reason: str, fields: dict[str, Any]) -> None:
        super().__init__(status=status, reason=reason)
        self.code, self.status, self.reason, self.fields = code, status, reason, fields


class PaymentRefused(Refused):
    def _about_earlier(self, pending_sat: int) -> str:
        by_application = self.code == "application_error"
        refused_by = "application behind the server" if by_application else "server"
        text = f"the {refused_by} refused the earlier payment of {pending_sat:,} sat, and the new payment was not sent: {self}"
        return f"{text}. It can be sent now, if it is at least {pending_sat:,} sat" if by_application else text


class ChannelUnknown(Refused):
    earlier_state = "has no answer yet"


class ChannelConflict(Refused):
    pass


class ChannelGone(Refused):
    pass


class ServerFailed(Refused):
    earlier_state = "has no answer yet"


class ChannelMoving(ServerFailed):
    pass


class PaymentPending(ServerFailed):
    """The application behind the server has not answered for a payment; wallet and server keep it."""

    def kept(self, pending_sat: int) -> None:
        """Name the payment in text and fields, in place of the server's text, which names its change."""
        self.fields = {**self.fields, "pending_sat": pending_sat}
        kept = f"the payment of {pending_sat:,} sat is signed and kept"
        self.args = (f"{kept}: the application behind the server has not answered for it yet (status {self.status})",)

    def _about_earlier(self, pending_sat: int) -> str:
        kept = f"the earlier payment of {pending_sat:,} sat is kept, and has no answer yet"
        return f"nothing new was paid, because {kept} from the application behind the server (status {self.status})"


class StillUnpaid(Refused):
    """A server wants a payment for a request that the client has paid. `code` is the server's, "" without one."""

    def __init__(self, url: str, price_sat: int, code: str, reason: str) -> None:
        super().__init__(402, code, reason, {"url": url, "price_sat": price_sat})
        self.args = (f"the server took no payment of {price_sat:,} sat for {url}: {reason}",)


class Unreachable(ClientError):
    code, text = "unreachable", "no answer from {url}: {reason}"


class ServerMisbehaved(ClientError):
    """An answer that contradicts the record; the text gives both values. The wallet took over nothing from it."""

    code, text = "server_misbehaved", "server misbehaved: {what}: got {got}, want {want}"


class CountedLess(ServerMisbehaved):
    """The server counts less of a payment as new than the wallet paid.

    Another copy of this wallet may have paid the rest before: then both agree after `status` or `resume`. The client
    can't tell that from a server that counts wrongly, so it says so.
    """

    code = "counted_less"
    text = (
        "the payment counted, but only {got} sat of its {want} sat as new. In all {total_sat} sat are paid now, and "
        "{left_sat} sat are left. Don't repeat the payment. Another copy of this wallet may have paid the rest before; "
        "if there is none, the server counts wrongly"
    )


class FalseProof(ServerMisbehaved):
    """A server corrects the wallet by a payment that the wallet's key did not sign. Nothing was taken over."""

    code = "false_proof"
    text = (
        "the server at {url} shows a payment of channel {channel} that leaves {change_sat} sat, and its signature is "
        "not by this wallet's key. Don't pay this server"
    )


# --- the client declined --------------------------------------------------------------------------------------------


class Declined(ClientError):
    """The client signed nothing and sent nothing."""


class TermsUnacceptable(Declined):
    code, text = "terms_unacceptable", "terms not acceptable: {what} is {got}, want {want}"


class WrongUrl(TermsUnacceptable):
    """A text that names no server. `fix` is the URL that was probably meant, "" if there is none."""

    code, text = "wrong_url", "{url!r} is not the URL of a server: want {want}"


class WrongValue(Declined, ValueError):
    """A number outside its range, or arguments that exclude each other; `got` and `want` are texts."""

    code, text = "wrong_value", "{what}: got {got}, want {want}"


class AmountTooSmall(WrongValue):
    code, text = "amount_too_small", "payment of {got_sat} sat: want at least {need_sat} sat"


class WrongNumber(Declined, TypeError):
    """A value of the wrong type for a number: amounts are whole satoshi."""

    code, text = "wrong_number", "{what} is {got}, want {want}"


class FundingTooSmall(Declined):
    code, text = "funding_too_small", "funding too small: got {got_sat} sat, need at least {need_sat} sat"


class FundingMissing(Declined):
    code = "funding_missing"
    text = (
        "channel {name} is not funded yet: got {got}, need one output of at least {need_sat} sat at {address}, "
        "deep enough in the chain"
    )


class FundingNotTold(Declined):
    code, text = "funding_not_told", "the server at {url} does not list the outputs that fund a channel"


class FundingDiffers(Declined):
    """Two sources disagree on the value of an output. A refund or a payment would give the difference away."""

    code = "funding_differs"
    text = "{outpoint} does not hold the stated value: got {got_sat} sat, {source} has {want_sat} sat"


class FundingNotThere(Declined):
    code, text = "funding_not_there", "{outpoint} is not at {address}: {source} has {found} there"


class ValueUnchecked(Declined):
    code = "value_unchecked"
    text = "the value of {outpoint}, {value_sat} sat, is {source}: any excess would be lost as the refund's fee"


class FeeTooHigh(Declined):
    code, text = "fee_too_high", "fee too high: got {got_sat} sat, at most {most_sat} sat ({rule})"


class InsufficientFunds(Declined):
    code, text = "insufficient_funds", "not enough left: want to pay {want_sat} sat, {left_sat} sat left"


class WouldLeaveDust(Declined):
    code = "would_leave_dust"
    text = (
        "payment would leave {change_sat} sat, which is less than {dust_sat} sat and can't be paid back: "
        "pay at most {most_sat} sat, or everything that is left with drain"
    )


class OverLimit(Declined):
    code, text = "over_limit", "payment of {got_sat} sat is above your own limit of {limit_sat} sat"


class WouldTakeBack(Declined):
    code = "would_take_back"
    text = (
        "payment of {got_sat} sat is less than the {need_sat} sat already signed: the server refused that payment, "
        "but may use it"
    )


class Unacknowledged(Declined):
    code = "unacknowledged"
    text = (
        "an opening payment of {pending_sat} sat was sent but never acknowledged: open without another amount, which "
        "sends the same again, paid once"
    )


class WrongState(Declined):
    code, text = "wrong_state", "channel {name} is {state}, need {need}"


class OverBudget(Declined):
    """A limit of a budget does not cover a request: per_request, per_host, per_day, total, or that of the wallet (`wallet_…`)."""

    code = "over_budget"
    text = (
        "{host} wants {price_sat} sat, and the budget's {limit} has {left_sat} sat left: {spent_sat} sat of "
        "{limit_sat} sat are spent"
    )


class HostNotAllowed(Declined):
    code = "host_not_allowed"
    text = "{host} wants {price_sat} sat, and the budget allows these hosts only: {hosts}"


class NotApproved(Declined):
    code, text = "not_approved", "{host} wants {price_sat} sat, and the budget's approve did not allow it"


class NoChannel(Declined):
    code = "no_channel"
    text = (
        "no channel of the wallet can pay {price_sat} sat to {pay_url}: open one with Payer({pay_url!r}).channel_for() "
        "or paychan channel new {pay_url}"
    )


class BodyNotRepeatable(Declined):
    code = "body_not_repeatable"
    text = (
        "{host} wants {price_sat} sat, and the request's body is a stream of more than {limit_bytes} bytes, which can't "
        "be sent a second time: give the body as bytes, or raise buffer_bytes"
    )


class MayHoldCoins(Declined):
    code, text = "may_hold_coins", "channel {name} is not forgotten, because it may hold coins: {reason}"


class ProxyUnusable(Declined):
    code, text = "proxy_unusable", "the proxy {proxy} of the environment can't be used: {reason}"


# --- the wallet -----------------------------------------------------------------------------------------------------


class WalletError(ClientError):
    pass


class NoSuchChannel(WalletError):
    code, text = "no_such_channel", "no channel {name} in {directory}"


class AmbiguousName(NoSuchChannel):
    code, text = "ambiguous_name", "{name} is the beginning of several channels' names: {names}"


class ChannelForgotten(NoSuchChannel):
    code = "channel_forgotten"
    text = "channel {name} was forgotten: its file is {path}, and moved back to {directory} it is a channel again"


class ChannelInUse(WalletError):
    code, text = "channel_in_use", "channel {name} is in use by another program"


class RecordNotWritten(WalletError):
    """A record that no reader could read again. The file stays as it was."""

    code, text = "record_not_written", "{path} stays as it was, because the new record is not valid: {reason}"


class DamagedFile(WalletError):
    code, text = "damaged_file", "{path} can't be trusted: {reason}"


class UnreadableFile(WalletError):
    code, text = "unreadable_file", "{path} can't be read: {reason}"


class LooseMode(WalletError):
    """Others than the owner may use a file or the directory, which hold keys."""

    code = "loose_mode"
    text = "{path} holds keys, and others may use it (mode {got}): chmod {want} '{path}'"


class NotADirectory(WalletError):
    code, text = "not_a_directory", "{path} is a file, and a wallet is a directory"


class NoPlace(WalletError):
    code, text = "no_place", "the wallet's directory {path} can't be made: {reason}; PAYCHAN_WALLET names another"


class BackupExists(WalletError):
    code, text = "backup_exists", "{path} exists already and stays as it is: give another name, or a directory"


class NoBackup(WalletError):
    code, text = "no_backup", "there is no backup to read at {path}: {reason}"


class NotABackup(NoBackup):
    code, text = "not_a_backup", "{path} is not a backup of a wallet"


class DamagedBackup(DamagedFile):
    code = "damaged_backup"


class BackupNotWritten(WalletError):
    code, text = "backup_not_written", "{path} can't be written: {reason}"


class NoSeed(WalletError):
    code, text = "no_seed", "the wallet {directory} has no seed: it is made together with the next new channel"


class OtherSeed(WalletError):
    code, text = "other_seed", "the wallet {directory} has another seed: restore into another directory"


class LogInUse(WalletError):
    code, text = "log_in_use", "{path} is in use by another program: no answer within {seconds:g} s"


class LaterFile(WalletError):
    code, text = "later_file", "{path} was written by a later version of paychan: {reason}"
