"""A payer's channel, for programs that wait (`Channel`) and for programs on an event loop (`AsyncChannel`).

Both perform the same closing. A channel's file stays locked until `release` (or the end of a `with` block).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Concatenate, ParamSpec, Self, TypeVar

import httpx
from msgspec import Struct

from paychan.client.coins import Deposit, parse_outpoint
from paychan.client.errors import TermsUnacceptable
from paychan.client.flows import close as closing
from paychan.client.flows import deposits
from paychan.client.flows import open as funding
from paychan.client.flows import pay as paying
from paychan.client.flows import refund as recovery
from paychan.client.flows import stream as streaming
from paychan.client.flows.close import Settled
from paychan.client.flows.open import FundingOutput, Said, Watcher
from paychan.client.flows.pay import Receipt
from paychan.client.flows.refund import RefundTerms
from paychan.client.limits import Limits
from paychan.client.record import ChannelRecord
from paychan.client.transport.effects import Flow, Patience
from paychan.client.transport.http import drive, drive_async
from paychan.client.wallet import ChannelFile
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.kinds.refund import Refund
from paychan.protocol.types import Network, OutPoint, Sat

T = TypeVar("T")
P = ParamSpec("P")


class TransportSettings(Struct, frozen=True):
    """How a payer deals with every server."""

    limits: Limits = Limits()
    patience: Patience = Patience()


class ChannelBase:
    """What needs neither network nor waiting."""

    def __init__(self, file: ChannelFile, record: ChannelRecord, ways: TransportSettings) -> None:
        self._file, self._ways = file, ways
        self.record = record
        """The newest durable state."""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def address(self) -> str:
        """Where to send the funding: `amount_sat`, in one output."""
        return self.record.funding_address

    @property
    def min_funding_sat(self) -> Sat:
        return self.record.min_funding_sat

    @property
    def amount_sat(self) -> Sat:
        """What to send: what was meant for the channel, or the least that opens it."""
        return self.record.amount_sat

    @property
    def left_sat(self) -> Sat:
        """What certainly still belongs to the payer."""
        return self.record.left_sat

    @property
    def paid_sat(self) -> Sat:
        """What was signed away, acknowledged or not."""
        return self.record.paid_sat

    def bip21(self, amount_sat: int | None = None) -> str:
        """URI that a wallet pays from (BIP21); the amount, by default `amount_sat`, is in whole bitcoins there."""
        amount = self.amount_sat if amount_sat is None else amount_sat
        whole, rest = divmod(amount, 100_000_000)
        return f"bitcoin:{self.address}?amount={whole}.{rest:08d}"

    def refund(
        self,
        sat_per_vb: int = recovery.REFUND_SAT_PER_VB,
        address: str = "",
        *,
        max_fee_sat: int | None = None,
        unchecked: bool = False,
    ) -> Refund:
        """Sign the transaction that takes everything back once the expiry has passed.

        A fee of more than 10 % or 200 sat per byte needs `max_fee_sat`. `unchecked` signs for values that are the server's
        word or were typed: should an output hold more, the difference is lost as fee.
        """
        terms = RefundTerms(sat_per_vb, address, max_fee_sat=max_fee_sat, unchecked=unchecked)
        return recovery.refund(self.record, terms)

    def wif(self) -> str:
        """The channel's private key as wallets import it, to sweep change that was paid to the default address."""
        return recovery.wif(self.record)

    def release(self) -> None:
        """Unlock the file for other programs; this object is of no use afterwards."""
        self._file.release()

    def _keep(self, record: ChannelRecord) -> None:
        self._file.save(record)
        self.record = record

    def _debug_funding(self) -> tuple[OutPoint, Sat]:
        if self.record.network is Network.LIVE:
            raise TermsUnacceptable(what="network of debug funding", got="live", want="test")
        outpoint = debug_outpoint(self.record.terms.client_key, self.record.expiry)
        return outpoint, DEBUG_FUNDING_SAT


class Channel(ChannelBase):
    """A channel whose methods wait. Threads may share it: one payment leaves after the other."""

    def __init__(
        self,
        file: ChannelFile,
        record: ChannelRecord,
        ways: TransportSettings,
        http: httpx.Client,
        owner: object = None,
    ) -> None:
        """`owner` closes `http` when it goes, so it lives as long as the channel."""
        super().__init__(file, record, ways)
        self._http, self._owner, self._lock = http, owner, threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def fund(self, outpoint: str, value_sat: int, *, transaction: str = "", unchecked: bool = False) -> None:
        """Tell which output (`txid:vout`) pays to the address, and its value in satoshi.

        The value is compared with the funding `transaction` (hex) if given, else with what the server shows. With
        `unchecked` it is taken as it is: should the output hold more, the server or a refund's fee gets the difference.
        """
        self._run(funding.fund, Said(outpoint, value_sat, transaction, unchecked), self._ways.patience)

    def chain_shows(self, found: Sequence[Deposit], pending: Collection[str] = ()) -> ChannelRecord:
        """Note all unspent outputs at the address, as a node of the payer's shows them (see `deposits.chain_shows`)."""
        return self._run(deposits.chain_shows, found, pending)

    def prove(self, transaction: str) -> ChannelRecord:
        """Check the values of noted outputs with the transaction (hex) that they are in (see `deposits.prove`)."""
        return self._run(deposits.prove, transaction)

    def look_for_others(self) -> ChannelRecord:
        """Ask the server for outputs at the address beside the funding: second, small and late ones."""
        return self._run(funding.look_for_others)

    def fund_debug(self) -> None:
        """Use the funding that a debug server derives from key and expiry: no bitcoin is involved."""
        self._run(funding.fund_debug, *self._debug_funding())

    def funding(self) -> tuple[FundingOutput, ...]:
        """Ask the server which outputs fund the channel. Without a node of one's own that can't be verified."""
        return self._run(funding.outputs, self._ways.patience)

    def wait_funded(self, timeout_seconds: float | None = None, watcher: Watcher | None = None) -> FundingOutput:
        """Wait until an output funds the channel deep enough; with 0 look once, with None wait for ever.

        The seconds are those between two questions; `watcher` is told the answer to each.
        An output of `amount_sat` or more is noted, and its refund kept, as soon as the server tells of it. It is the
        server's word, which only a node could verify (see `funding`); a server that is busy or away is asked again.

        Raises:
            FundingMissing: not in time.
            FundingNotTold: the server knows no such question; see `fund`.
        """
        return self._run(funding.wait, self._ways.patience, timeout_seconds, watcher)

    def open(self, amount_sat: int | None = None) -> Receipt:
        """Open with a first payment, by default the server's open price."""
        return self._run(paying.open_channel, amount_sat, self._ways.limits, self._ways.patience)

    def pay(self, amount_sat: int = 0, *, drain: bool = False, application_data: str = "") -> Receipt:
        """Pay an amount; or with `drain` everything that is left, which closes the channel."""
        ways = self._ways
        return self._run(
            paying.pay, amount_sat, ways.limits, ways.patience, drain=drain, application_data=application_data
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
        """Pay an amount so many times, as fast as it goes or once every so many seconds; return the last receipt.

        Over a stream where version and server have one, which takes many payments at a time; else, and with
        `application_data`, one by one. What was signed when this is interrupted is completed by `resume`: up to 128
        payments, or one of those that have seconds between them. `watcher` is told how many have been made.
        """
        series, (done, receipt) = _series(amount_sat, times, every_seconds, watcher), (0, None)
        limits, patience = self._ways.limits, self._ways.patience
        if times > 1 and not application_data:
            done, receipt = self._run(streaming.pay_series, series, limits, patience)
        while done < times or receipt is None:
            wait = every_seconds if done else 0.0
            receipt = self._run(streaming.pay_later, wait, amount_sat, limits, patience, application_data)
            done += 1
            series.tell(done)
        return receipt

    def resume(self) -> Receipt:
        """Send the newest payment again, when its answer was lost or was a no: it is booked once at most."""
        return self._run(paying.resume, self._ways.patience)

    def status(self) -> ChannelRecord:
        """Ask the server how the channel stands."""
        return self._run(closing.probe, self._ways.patience)

    def keep_refund(self, terms: RefundTerms) -> Refund:
        """Sign a refund and keep it: to be called before one is published."""
        return self._run(recovery.keep_refund, terms)

    def coins_at(self, outpoint: str, value_sat: int) -> ChannelRecord:
        """Note where a chain of the payer's shows the coins of a movable channel that takes no more payments."""
        return self._run(recovery.coins_at, parse_outpoint(outpoint), Sat(value_sat))

    def spent(self, txid: str) -> ChannelRecord:
        """Note which transaction spent the funding, as a chain of the payer's shows it: the channel has ended."""
        return self._run(recovery.spent, txid)

    def close(self, fee_sat: int = 0, change_address: str = "", *, max_fee_sat: int | None = None) -> Settled:
        """Have the channel settled; v2 knows a fee to offer and another address for the change.

        That of a movable channel goes to its home address by itself. A fee is a payment, which the server is meant to pass
        on: more than 10 % of what is left or 100 sat per byte needs `max_fee_sat`.
        """
        return self._run(
            closing.close, self._ways.patience, fee_sat=fee_sat, change_address=change_address, max_fee_sat=max_fee_sat
        )

    def _run(self, start: Callable[Concatenate[ChannelRecord, P], Flow[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return drive(start(self.record, *args, **kwargs), self._http, self._keep)


class AsyncChannel(ChannelBase):
    """A channel whose methods are awaited. Tasks may share it: one payment leaves after the other.

    Every method does what its namesake of `Channel` does.
    """

    def __init__(
        self, file: ChannelFile, record: ChannelRecord, ways: TransportSettings, http: httpx.AsyncClient
    ) -> None:
        super().__init__(file, record, ways)
        self._http, self._lock = http, asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    async def fund(self, outpoint: str, value_sat: int, *, transaction: str = "", unchecked: bool = False) -> None:
        await self._run(funding.fund, Said(outpoint, value_sat, transaction, unchecked), self._ways.patience)

    async def chain_shows(self, found: Sequence[Deposit], pending: Collection[str] = ()) -> ChannelRecord:
        return await self._run(deposits.chain_shows, found, pending)

    async def prove(self, transaction: str) -> ChannelRecord:
        return await self._run(deposits.prove, transaction)

    async def look_for_others(self) -> ChannelRecord:
        return await self._run(funding.look_for_others)

    async def fund_debug(self) -> None:
        await self._run(funding.fund_debug, *self._debug_funding())

    async def funding(self) -> tuple[FundingOutput, ...]:
        return await self._run(funding.outputs, self._ways.patience)

    async def wait_funded(self, timeout_seconds: float | None = None, watcher: Watcher | None = None) -> FundingOutput:
        return await self._run(funding.wait, self._ways.patience, timeout_seconds, watcher)

    async def open(self, amount_sat: int | None = None) -> Receipt:
        return await self._run(paying.open_channel, amount_sat, self._ways.limits, self._ways.patience)

    async def pay(self, amount_sat: int = 0, *, drain: bool = False, application_data: str = "") -> Receipt:
        ways = self._ways
        return await self._run(
            paying.pay, amount_sat, ways.limits, ways.patience, drain=drain, application_data=application_data
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
        limits, patience = self._ways.limits, self._ways.patience
        if times > 1 and not application_data:
            done, receipt = await self._run(streaming.pay_series, series, limits, patience)
        while done < times or receipt is None:
            wait = every_seconds if done else 0.0
            receipt = await self._run(streaming.pay_later, wait, amount_sat, limits, patience, application_data)
            done += 1
            series.tell(done)
        return receipt

    async def resume(self) -> Receipt:
        return await self._run(paying.resume, self._ways.patience)

    async def status(self) -> ChannelRecord:
        return await self._run(closing.probe, self._ways.patience)

    async def keep_refund(self, terms: RefundTerms) -> Refund:
        return await self._run(recovery.keep_refund, terms)

    async def coins_at(self, outpoint: str, value_sat: int) -> ChannelRecord:
        return await self._run(recovery.coins_at, parse_outpoint(outpoint), Sat(value_sat))

    async def spent(self, txid: str) -> ChannelRecord:
        return await self._run(recovery.spent, txid)

    async def close(self, fee_sat: int = 0, change_address: str = "", *, max_fee_sat: int | None = None) -> Settled:
        return await self._run(
            closing.close, self._ways.patience, fee_sat=fee_sat, change_address=change_address, max_fee_sat=max_fee_sat
        )

    async def _run(
        self, start: Callable[Concatenate[ChannelRecord, P], Flow[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        async with self._lock:
            return await drive_async(start(self.record, *args, **kwargs), self._http, self._keep)


def _series(amount_sat: int, times: int, every_seconds: float, watcher: streaming.Watcher | None) -> streaming.Series:
    if amount_sat <= 0 or times < 1:
        msg = f"{times} payments of {amount_sat} sat: want at least one of 1 sat"
        raise ValueError(msg)
    return streaming.Series(Sat(amount_sat), times, every_seconds, watcher)
