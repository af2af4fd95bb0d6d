"""The payer: one server, one wallet, and the channels between them."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal, Self

from paychan.client.channel import AsyncChannel, Channel
from paychan.client.flows.find import least_sat
from paychan.client.limits import Limits
from paychan.client.payer_base import DEFAULT_HOURS, PayerBase
from paychan.client.record import ChannelRecord, State
from paychan.client.transport.effects import TIME_LIMIT_SECONDS, Patience
from paychan.client.wallet import ChannelFile
from paychan.protocol.types import Network
from paychan.protocol.wire.rbpcp import Dialect

if TYPE_CHECKING:
    import ssl

    import httpx


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return the TLS settings of all payers of this process: reading the authorities' certificates takes 20 ms."""
    import httpx

    return httpx.create_ssl_context()


class Payer(PayerBase):
    """Opens channels with blocking methods.

    A `with` block closes connections and releases the channels at its end; without one, that happens with the last
    channel.

    Args:
        url: base URL of the server; needed for new channels only, because an existing channel stores its own.
        wallet: directory of the channels; default `$PAYCHAN_WALLET`, or else `paychan.shared.places.wallet_place`.
        version: RBPCP version of new channels.
        dialect: dialect of new channels of version 2.
        network: the only Bitcoin network to accept. Regtest must be named: its addresses look like those of test.
        limits: highest prices, amounts and periods to accept; see `Limits`.
        patience: pauses and attempts with a server that is busy or silent; see `Patience`.
        time_limit_seconds: longest time of one call such as `pay`, `open` or `close`, with all that it sends again;
            for `wait_funded` that of one question, for `pay_many` that without an answer. After it, the call raises
            `Unreachable`, or `ServerFailed` if the server was busy.
        http: an HTTP client to use, which is closed with the payer; default: one that takes proxies from the
            environment.
    """

    def __init__(
        self,
        url: str = "",
        *,
        wallet: str | os.PathLike[str] | None = None,
        version: Literal[1, 2] = 2,
        dialect: Dialect = Dialect.S,
        network: Network | None = None,
        limits: Limits | None = None,
        patience: Patience | None = None,
        time_limit_seconds: float = TIME_LIMIT_SECONDS,
        http: httpx.Client | None = None,
    ) -> None:
        import httpx

        from paychan.client.transport.proxy import ProxyTransport

        super().__init__(
            url,
            wallet=wallet,
            version=version,
            dialect=dialect,
            network=network,
            limits=limits,
            patience=patience,
            time_limit_seconds=time_limit_seconds,
        )
        self._http = http or httpx.Client(transport=ProxyTransport(_tls))
        self._channels: weakref.WeakValueDictionary[str, Channel] = weakref.WeakValueDictionary()
        self._finding = threading.Lock()
        self._hang_up = weakref.finalize(self, self._http.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_channel(
        self,
        *,
        hours: float = DEFAULT_HOURS,
        expires: int | None = None,
        change_address: str = "",
        amount_sat: int = 0,
        movable: bool = False,
    ) -> Channel:
        """Agree on a new channel that takes payments for `hours`, or that ends at the Unix time `expires`.

        The expiry is later than `hours` from now: the funding must become deep first, and the server settles before the
        expiry. The key is durable in the wallet before this returns.

        Args:
            hours: time for payments; ignored if `expires` is set.
            expires: Unix time of the expiry.
            change_address: receives the change; default: the P2PKH address of the channel's key.
            amount_sat: amount that you plan to send to the address; default: the minimum that opens the channel.
            movable: let the server withdraw its earnings without ending the channel (version 2). The change funds the
                channel again, until a closing or a refund pays it to `change_address`. If the server closes the channel
                unasked, the rest stays locked until the expiry.

        Raises:
            TermsUnacceptable, ServerMisbehaved, Refused, Unreachable: no channel was made.
        """
        from paychan.client.transport.http import drive

        terms = self._new(hours, expires, change_address, amount_sat, movable=movable)
        record = drive(terms, self._http, _nothing_to_keep, self._settings.time_limit_seconds)
        return self._made(self.wallet.create(record), record)

    def restore_channel(
        self, expires: int, index: int = 0, *, change_address: str = "", movable: bool = False
    ) -> Channel:
        """Make the record of a channel again whose file is lost, from the wallet's seed and the server's terms.

        `Channel.fund_debug`, or `wait_funded`, and `Channel.open` with the first payment of that time then take over the
        newest payment that the server proves.

        Args:
            expires: Unix time of the channel's expiry.
            index: number of the channel's key below the seed: 0 for the wallet's first channel.
            change_address: as in `new_channel`, and as it was.
            movable: as in `new_channel`, and as it was.

        Raises:
            NoSeed: the wallet has no seed: restore it first.
            FileExistsError: the wallet has this channel.
            TermsUnacceptable, ServerMisbehaved, Refused, Unreachable: nothing was made; a server refuses terms for an
                expiry that is too near.
        """
        from paychan.client.transport.http import drive

        terms = self._new(1, expires, change_address, 0, movable=movable, index=index)
        record = drive(terms, self._http, _nothing_to_keep, self._settings.time_limit_seconds)
        return self._made(self.wallet.create(record), record)

    def channel(self, name: str) -> Channel:
        """Load a channel of the wallet, by the beginning of its name, and lock its file."""
        return self._made(*self.wallet.open(name))

    def channel_for(
        self,
        url: str = "",
        *,
        room_sat: int = 1,
        amount_sat: int = 0,
        hours: float = DEFAULT_HOURS,
        change_address: str = "",
        fund: Callable[[Channel], object] | None = None,
        wait_seconds: float | None = None,
    ) -> Channel:
        """Return a channel that can pay `room_sat` to a server: one of the wallet, or else a new one, funded and opened.

        Call it before each payment, or once: a channel that this payer holds already is returned again. One that
        another process uses is waited for until the time limit. A channel that is funded, or only has its address, is
        gone on with; so a crash makes no second channel.

        Args:
            url: base URL of the server; default: the payer's.
            room_sat: amount (satoshi) that the channel must be able to pay after its opening.
            amount_sat: amount to fund a new channel with; default: the least that suffices. The open price and the
                other terms are bounded by the payer's `limits`.
            hours: time for payments of a new channel.
            change_address: receives the change of a new channel; default: the address of the channel's key.
            fund: called once with a new channel, to pay `channel.amount_sat` to `channel.address` from any wallet.
                After a crash during the call it is not called again: the channel then waits for the coins. A server in
                debug mode needs no coins.
            wait_seconds: time to wait for the coins to be deep enough; default: without limit if `fund` is given,
                otherwise one look.

        Raises:
            FundingMissing: the coins are not there yet; the text names the address. Call again later.
            ChannelInUse: another process uses the only channels of this server.
            TermsUnacceptable: the server's terms are outside the limits, or an amount does not suffice or is more than
                all bitcoins.
            WrongNumber: an amount is not a whole number, or `hours` is no number.
            Refused, Unreachable, ServerMisbehaved, WalletError: see `paychan.client.errors`.
        """
        from paychan.client.transport.http import drive

        with self._finding:
            while True:
                finding = self._find(self._held, url, room_sat, amount_sat, hours, change_address)
                found = drive(finding, self._http, _nothing_to_keep, self._settings.time_limit_seconds)
                channel = found if isinstance(found, Channel) else self._made(*found)
                try:
                    if channel.record.state is State.NEW:
                        self._begin(channel, fund, wait_seconds, least_sat(channel.record, room_sat, amount_sat))
                    elif channel is not found:
                        channel.status()
                except BaseException:
                    if channel is not found:
                        channel.release()
                    raise
                if channel.record.state is State.OPEN:
                    return channel
                channel.release()

    def _begin(
        self,
        channel: Channel,
        fund: Callable[[Channel], object] | None,
        wait_seconds: float | None,
        enough_sat: int,
    ) -> None:
        """Fund a new channel, wait for the coins, and open it; each step only if it is not done yet."""
        if channel.record.signed_sat is None or channel.record.refused:
            if fund is not None and channel.begins_funding(enough_sat):
                fund(channel)
            channel.wait_funded(0 if fund is None and wait_seconds is None else wait_seconds, enough_sat=enough_sat)
        channel.open()

    def _made(self, file: ChannelFile, record: ChannelRecord) -> Channel:
        self._files.add(file)
        channel = Channel(file, record, self._settings, self._http, self)
        self._channels[record.name] = channel
        return channel

    def _held(self, name: str) -> Channel | None:
        """Return the object of a channel that this payer holds."""
        channel = self._channels.get(name)
        return None if channel is None or channel.released else channel

    def close(self) -> None:
        """Close connections and release the channels. The channels stay open at the server."""
        self._hang_up()
        self._release()


class AsyncPayer(PayerBase):
    """Opens channels with coroutines; otherwise like `Payer`, whose arguments it takes."""

    def __init__(
        self,
        url: str = "",
        *,
        wallet: str | os.PathLike[str] | None = None,
        version: Literal[1, 2] = 2,
        dialect: Dialect = Dialect.S,
        network: Network | None = None,
        limits: Limits | None = None,
        patience: Patience | None = None,
        time_limit_seconds: float = TIME_LIMIT_SECONDS,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        import asyncio

        import httpx

        from paychan.client.transport.proxy import AsyncProxyTransport

        super().__init__(
            url,
            wallet=wallet,
            version=version,
            dialect=dialect,
            network=network,
            limits=limits,
            patience=patience,
            time_limit_seconds=time_limit_seconds,
        )
        self._http = http or httpx.AsyncClient(transport=AsyncProxyTransport(_tls))
        self._channels: weakref.WeakValueDictionary[str, AsyncChannel] = weakref.WeakValueDictionary()
        self._finding = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def new_channel(
        self,
        *,
        hours: float = DEFAULT_HOURS,
        expires: int | None = None,
        change_address: str = "",
        amount_sat: int = 0,
        movable: bool = False,
    ) -> AsyncChannel:
        from paychan.client.transport.http import drive_async

        terms = self._new(hours, expires, change_address, amount_sat, movable=movable)
        record = await drive_async(terms, self._http, _nothing_to_keep, self._settings.time_limit_seconds)
        return self._made(self.wallet.create(record), record)

    async def restore_channel(
        self, expires: int, index: int = 0, *, change_address: str = "", movable: bool = False
    ) -> AsyncChannel:
        from paychan.client.transport.http import drive_async

        terms = self._new(1, expires, change_address, 0, movable=movable, index=index)
        record = await drive_async(terms, self._http, _nothing_to_keep, self._settings.time_limit_seconds)
        return self._made(self.wallet.create(record), record)

    def channel(self, name: str) -> AsyncChannel:
        return self._made(*self.wallet.open(name))

    async def channel_for(
        self,
        url: str = "",
        *,
        room_sat: int = 1,
        amount_sat: int = 0,
        hours: float = DEFAULT_HOURS,
        change_address: str = "",
        fund: Callable[[AsyncChannel], Awaitable[object]] | None = None,
        wait_seconds: float | None = None,
    ) -> AsyncChannel:
        """Do what `Payer.channel_for` does."""
        from paychan.client.transport.http import drive_async

        async with self._finding:
            while True:
                finding = self._find(self._held, url, room_sat, amount_sat, hours, change_address)
                found = await drive_async(finding, self._http, _nothing_to_keep, self._settings.time_limit_seconds)
                channel = found if isinstance(found, AsyncChannel) else self._made(*found)
                try:
                    if channel.record.state is State.NEW:
                        await self._begin(channel, fund, wait_seconds, least_sat(channel.record, room_sat, amount_sat))
                    elif channel is not found:
                        await channel.status()
                except BaseException:
                    if channel is not found:
                        channel.release()
                    raise
                if channel.record.state is State.OPEN:
                    return channel
                channel.release()

    async def _begin(
        self,
        channel: AsyncChannel,
        fund: Callable[[AsyncChannel], Awaitable[object]] | None,
        wait_seconds: float | None,
        enough_sat: int,
    ) -> None:
        """Fund a new channel, wait for the coins, and open it; each step only if it is not done yet."""
        if channel.record.signed_sat is None or channel.record.refused:
            if fund is not None and channel.begins_funding(enough_sat):
                await fund(channel)
            await channel.wait_funded(
                0 if fund is None and wait_seconds is None else wait_seconds, enough_sat=enough_sat
            )
        await channel.open()

    def _made(self, file: ChannelFile, record: ChannelRecord) -> AsyncChannel:
        self._files.add(file)
        channel = AsyncChannel(file, record, self._settings, self._http)
        self._channels[record.name] = channel
        return channel

    def _held(self, name: str) -> AsyncChannel | None:
        """Return the object of a channel that this payer holds."""
        channel = self._channels.get(name)
        return None if channel is None or channel.released else channel

    async def close(self) -> None:
        await self._http.aclose()
        self._release()


def _nothing_to_keep(_record: ChannelRecord) -> None:
    """Do nothing: agreeing on terms signs nothing, so the record is written later, with the channel's file."""
