"""A payer's channel, with blocking methods (`Channel`) or with coroutines (`AsyncChannel`).

Both classes run the same flows (`paychan.client.flows`). A channel's file stays locked until `release`, or until the
end of a `with` block. All amounts are in satoshi.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self, TypeVar

from msgspec import structs

from paychan.client.amounts import satoshi, whole
from paychan.client.channel_base import ChannelBase, TransportSettings
from paychan.client.coins import Deposit, parse_outpoint
from paychan.client.errors import AmountTooSmall, WrongValue
from paychan.client.flows import close as closing
from paychan.client.flows import deposits
from paychan.client.flows import forget as forgetting
from paychan.client.flows import open as funding
from paychan.client.flows import pay as paying
from paychan.client.flows import refund as recovery
from paychan.client.flows import stream as streaming
from paychan.client.flows.close import Settled
from paychan.client.flows.open import FundingClaim, FundingOutput, Watcher
from paychan.client.flows.pay import Receipt
from paychan.client.flows.refund import RefundTerms
from paychan.client.record import ChannelRecord
from paychan.client.transport.effects import Flow
from paychan.client.wallet import ChannelFile
from paychan.protocol.kinds.refund import Refund
from paychan.protocol.types import Sat

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
P = ParamSpec("P")


class Channel(ChannelBase):
    """A channel with blocking methods. Threads may share it; a lock sends one payment at a time."""

    def __init__(
        self,
        file: ChannelFile,
        record: ChannelRecord,
        settings: TransportSettings,
        http: httpx.Client,
        owner: object = None,
    ) -> None:
        """Keep `owner` alive as long as the channel: its finalizer closes `http`."""
        super().__init__(file, record, settings)
        self._http, self._owner, self._lock = http, owner, threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def fund(self, outpoint: str, value_sat: int, *, transaction: str = "", unchecked: bool = False) -> None:
        """Record which output (`txid:vout`) funds the channel, and its value in satoshi.

        The value is compared with the funding `transaction` (hex), or without one with the server's list of outputs.
        With `unchecked` it is not compared: if the output holds more, the server or the refund's fee takes the
        difference.

        Raises:
            WrongState, FundingTooSmall, FundingDiffers, FundingNotThere, FundingNotTold, Malformed: see
                `flows.open.fund`.
        """
        self._run(funding.fund, FundingClaim(outpoint, value_sat, transaction, unchecked), self._settings.patience)

    def chain_shows(self, found: Sequence[Deposit], pending: Collection[str] = ()) -> ChannelRecord:
        """Record all unspent outputs at the address, as the payer's node reports them (see `deposits.with_chain`)."""
        return self._run(deposits.chain_shows, found, pending)

    def prove(self, transaction: str) -> ChannelRecord:
        """Check the recorded values against the transaction (hex) that holds the outputs (see `deposits.prove`)."""
        return self._run(deposits.prove, transaction)

    def look_for_others(self) -> ChannelRecord:
        """Ask the server for further outputs at the address: second, too small and late payments."""
        return self._run(funding.look_for_others)

    def fund_debug(self) -> None:
        """Use the funding that a debug server derives from key and expiry. No bitcoin is involved."""
        self._run(funding.fund_debug, *self._debug_funding())

    def funding(self) -> tuple[FundingOutput, ...]:
        """Ask the server which outputs fund the channel. Only a node of the payer's own can verify the answer."""
        return self._run(funding.outputs, self._settings.patience)

    def wait_funded(
        self, timeout_seconds: float | None = None, watcher: Watcher | None = None, *, enough_sat: int | None = None
    ) -> FundingOutput:
        """Poll the server until an output funds the channel and is deep enough in the chain.

        An output of at least `amount_sat` is recorded, with its signed refund, as soon as the server lists it. The
        depth is the server's claim, which only a node can verify (see `funding`). A busy or silent server is asked
        again.

        Args:
            timeout_seconds: sum of the pauses between two requests; 0 asks once, None waits without limit.
            watcher: called with the result of every request.
            enough_sat: least output to accept if its value is proven; default: `amount_sat`. For debug funding, in
                which there are no coins, the default is the least that opens the channel.

        Raises:
            FundingMissing: no such output within `timeout_seconds`.
            FundingNotTold: the server does not offer this request; use `fund`.
        """
        return self._run(funding.wait, self._settings.patience, timeout_seconds, watcher, enough_sat)

    def open(self, amount_sat: int | None = None) -> Receipt:
        """Open the channel with a first payment; default: the server's open price.

        Raises:
            WrongState: not funded, or already open.
            WrongNumber, TermsUnacceptable: not a whole number, or less than the open price.
            Unacknowledged: an opening payment of another amount was sent and got no answer.
            InsufficientFunds, WouldLeaveDust, OverLimit: the amount does not fit the funding or the payer's limit.
            Refused, Unreachable, ServerMisbehaved: see `paychan.client.errors`.
        """
        return self._run(paying.open_channel, amount_sat, self._settings.limits, self._settings.patience)

    def pay(self, amount_sat: int = 0, *, drain: bool = False, application_data: str = "") -> Receipt:
        """Pay `amount_sat`; or with `drain` everything that is left, which closes the channel.

        If an earlier payment got no answer, for example because this program was killed, it is finished first, paid
        once; `Receipt.earlier` is its receipt. If it fails again, nothing new is paid, and the error says so.

        Raises:
            WrongNumber, WrongState, InsufficientFunds, WouldLeaveDust, WouldTakeBack, OverLimit: declined; nothing was
                signed.
            Unreachable: no answer within the time limit. The payment is kept; `pay` or `resume` sends it again.
            PaymentPending: the application has not answered for the payment yet, which is kept likewise.
            Refused, ServerMisbehaved: see `paychan.client.errors`.
            ValueError: the amount is not positive, or there is one beside `drain`.
        """
        settings = self._settings
        return self._run(
            paying.pay, amount_sat, settings.limits, settings.patience, drain=drain, application_data=application_data
        )

    def pay_many(
        self,
        amount_sat: int,
        times: int,
        *,
        every_seconds: float = 0.0,
        application_data: str = "",
        watcher: streaming.Watcher | None = None,
    ) -> Receipt:
        """Pay `amount_sat` `times` times, at full speed or once every `every_seconds`; return the last receipt.

        The payments go over a stream if protocol version and server support one: many per frame. Otherwise, and with
        `application_data`, each payment is one request. If this call is interrupted, the next `pay` or `resume` completes
        the payments that were already signed: at most 128, or one if `every_seconds` is set. `watcher` is called with the number of
        payments made so far.
        """
        series, (done, receipt) = _series(amount_sat, times, every_seconds, watcher), (0, None)
        limits, patience = self._settings.limits, self._settings.patience
        _, earlier = self._run(paying.finish_earlier, series.amount_sat, limits, patience)
        if series.times > 1 and not application_data:
            done, receipt = self._run(streaming.pay_series, series, limits, patience)
        while done < series.times or receipt is None:
            receipt = self._run(streaming.pay_later, receipt, series, limits, patience, application_data)
            done += 1
            series.tell(done)
        return receipt if earlier is None else structs.replace(receipt, earlier=earlier)

    def resume(self) -> Receipt:
        """Send the newest signed payment again after a lost answer or a refusal. The server books it at most once."""
        return self._run(paying.resume, self._settings.patience)

    def status(self) -> ChannelRecord:
        """Ask the server for the channel's status, and return the updated record."""
        return self._run(closing.probe, self._settings.patience)

    def keep_refund(self, terms: RefundTerms) -> Refund:
        """Sign a refund and save it. Call this before publishing a refund, so that the wallet recognises it later."""
        return self._run(recovery.keep_refund, terms)

    def coins_at(self, outpoint: str, value_sat: int) -> ChannelRecord:
        """Record the output that holds the coins of a movable channel after it stopped taking payments.

        The output (`txid:vout`) and its value come from the payer's own view of the chain.
        """
        return self._run(recovery.coins_at, parse_outpoint(outpoint), satoshi(value_sat, "value_sat"))

    def spent(self, txid: str) -> ChannelRecord:
        """Record the transaction that spent the funding, as the payer's own view of the chain shows it.

        The channel has ended.
        """
        return self._run(recovery.spent, txid)

    def close(
        self,
        fee_sat: int = 0,
        change_address: str = "",
        *,
        max_fee_sat: int | None = None,
        waits: closing.Watcher | None = None,
    ) -> Settled:
        """Ask the server to settle the channel.

        The change of a movable channel goes to its home address by default.

        Args:
            fee_sat: settlement fee to offer (version 2). It is a payment to the server, which should spend it as fee.
            change_address: other address for the change (version 2).
            max_fee_sat: highest `fee_sat` to accept. Without it, more than 10 % of the rest or 100 sat per byte is
                declined.
            waits: called with the server's code each time that it has no settlement yet; `signer_unavailable` and
                `channel_closing` come after it has accepted the closing.
        """
        return self._run(
            closing.close,
            self._settings.patience,
            fee_sat=fee_sat,
            change_address=change_address,
            max_fee_sat=max_fee_sat,
            waits=waits,
        )

    def forget(self, *, chain_was_asked: bool = False) -> Path:
        """Take a channel without coins off the wallet's list, and release it; return the place of its file, which is kept.

        Args:
            chain_was_asked: the record holds all outputs that the payer's own chain shows (see `chain_shows`), so the
                server is not asked for them.

        Raises:
            MayHoldCoins: there are coins, or nothing shows that there are none.
        """
        self._run(forgetting.check_empty, self._settings.patience, chain_was_asked=chain_was_asked)
        return self._file.forget()

    def _run(self, start: Callable[Concatenate[ChannelRecord, P], Flow[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        from paychan.client.transport.http import drive

        with self._lock:
            flow = start(self.record, *args, **kwargs)
            return drive(flow, self._http, self._keep, self._settings.time_limit_seconds)


class AsyncChannel(ChannelBase):
    """A channel with coroutines. Tasks may share it; a lock sends one payment at a time.

    Every method does what the method of the same name in `Channel` does.
    """

    def __init__(
        self, file: ChannelFile, record: ChannelRecord, settings: TransportSettings, http: httpx.AsyncClient
    ) -> None:
        import asyncio

        super().__init__(file, record, settings)
        self._http, self._lock = http, asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    async def fund(self, outpoint: str, value_sat: int, *, transaction: str = "", unchecked: bool = False) -> None:
        await self._run(
            funding.fund, FundingClaim(outpoint, value_sat, transaction, unchecked), self._settings.patience
        )

    async def chain_shows(self, found: Sequence[Deposit], pending: Collection[str] = ()) -> ChannelRecord:
        return await self._run(deposits.chain_shows, found, pending)

    async def prove(self, transaction: str) -> ChannelRecord:
        return await self._run(deposits.prove, transaction)

    async def look_for_others(self) -> ChannelRecord:
        return await self._run(funding.look_for_others)

    async def fund_debug(self) -> None:
        await self._run(funding.fund_debug, *self._debug_funding())

    async def funding(self) -> tuple[FundingOutput, ...]:
        return await self._run(funding.outputs, self._settings.patience)

    async def wait_funded(
        self, timeout_seconds: float | None = None, watcher: Watcher | None = None, *, enough_sat: int | None = None
    ) -> FundingOutput:
        return await self._run(funding.wait, self._settings.patience, timeout_seconds, watcher, enough_sat)

    async def open(self, amount_sat: int | None = None) -> Receipt:
        return await self._run(paying.open_channel, amount_sat, self._settings.limits, self._settings.patience)

    async def pay(self, amount_sat: int = 0, *, drain: bool = False, application_data: str = "") -> Receipt:
        settings = self._settings
        return await self._run(
            paying.pay, amount_sat, settings.limits, settings.patience, drain=drain, application_data=application_data
        )

    async def pay_many(
        self,
        amount_sat: int,
        times: int,
        *,
        every_seconds: float = 0.0,
        application_data: str = "",
        watcher: streaming.Watcher | None = None,
    ) -> Receipt:
        series, (done, receipt) = _series(amount_sat, times, every_seconds, watcher), (0, None)
        limits, patience = self._settings.limits, self._settings.patience
        _, earlier = await self._run(paying.finish_earlier, series.amount_sat, limits, patience)
        if series.times > 1 and not application_data:
            done, receipt = await self._run(streaming.pay_series, series, limits, patience)
        while done < series.times or receipt is None:
            receipt = await self._run(streaming.pay_later, receipt, series, limits, patience, application_data)
            done += 1
            series.tell(done)
        return receipt if earlier is None else structs.replace(receipt, earlier=earlier)

    async def resume(self) -> Receipt:
        return await self._run(paying.resume, self._settings.patience)

    async def status(self) -> ChannelRecord:
        return await self._run(closing.probe, self._settings.patience)

    async def keep_refund(self, terms: RefundTerms) -> Refund:
        return await self._run(recovery.keep_refund, terms)

    async def coins_at(self, outpoint: str, value_sat: int) -> ChannelRecord:
        return await self._run(recovery.coins_at, parse_outpoint(outpoint), satoshi(value_sat, "value_sat"))

    async def spent(self, txid: str) -> ChannelRecord:
        return await self._run(recovery.spent, txid)

    async def close(
        self,
        fee_sat: int = 0,
        change_address: str = "",
        *,
        max_fee_sat: int | None = None,
        waits: closing.Watcher | None = None,
    ) -> Settled:
        return await self._run(
            closing.close,
            self._settings.patience,
            fee_sat=fee_sat,
            change_address=change_address,
            max_fee_sat=max_fee_sat,
            waits=waits,
        )

    async def forget(self, *, chain_was_asked: bool = False) -> Path:
        await self._run(forgetting.check_empty, self._settings.patience, chain_was_asked=chain_was_asked)
        return self._file.forget()

    async def _run(
        self, start: Callable[Concatenate[ChannelRecord, P], Flow[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        from paychan.client.transport.http import drive_async

        async with self._lock:
            flow = start(self.record, *args, **kwargs)
            return await drive_async(flow, self._http, self._keep, self._settings.time_limit_seconds)


def _series(amount_sat: int, times: int, every_seconds: float, watcher: streaming.Watcher | None) -> streaming.Series:
    amount_sat, times = whole(amount_sat, "amount_sat"), whole(times, "times")
    if amount_sat <= 0:
        raise AmountTooSmall(got_sat=amount_sat, need_sat=1)
    if times < 1:
        raise WrongValue(what="number of payments", got=f"{times:,}", want="at least 1")
    return streaming.Series(Sat(amount_sat), times, every_seconds, watcher)
