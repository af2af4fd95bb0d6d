"""The payer: one server, one wallet, and the channels between them."""

from __future__ import annotations

import functools
import math
import os
import time
import weakref
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import urlsplit

from coincurve import PrivateKey
from msgspec import UNSET, Struct, structs

from paychan.client.channel import AsyncChannel, Channel
from paychan.client.channel_base import TransportSettings
from paychan.client.errors import Refused, ServerMisbehaved, TermsUnacceptable, Unreachable, WalletError
from paychan.client.flows.refund import key_address
from paychan.client.limits import (
    ASSUMED_MIN_HOURS,
    HOUR,
    Limits,
    agree,
    check_clock,
    check_limits,
    expiry_for,
    read_funding_info,
)
from paychan.client.record import ChannelRecord
from paychan.client.transport import routes
from paychan.client.transport.answers import refusal
from paychan.client.transport.effects import TIME_LIMIT_SECONDS, Flow, Patience, Request, Response, ask
from paychan.client.wallet import ChannelFile, Wallet
from paychan.protocol.address import decode_address
from paychan.protocol.expiry import check_expiry
from paychan.protocol.types import Network, Sat, UnixTime
from paychan.protocol.wire.rbpcp import Dialect, FundingInfo

if TYPE_CHECKING:
    import ssl

    import httpx

DEFAULT_HOURS = 7 * 24

_GUESS_SECONDS = 5 * 24 * 3600
"""Added to the payment hours in the first request for terms; the terms then tell the exact extra time."""


class ChannelRequest(Struct, frozen=True):
    """Parameters of a new channel."""

    url: str
    version: Literal[1, 2]
    dialect: Dialect
    network: Network | None
    key: PrivateKey
    key_index: int
    hours: float
    """Time for payments; ignored if `expires` is set."""
    expires: int | None
    now: UnixTime
    change_address: str
    amount_sat: int = 0
    movable: bool = False


def new_channel(wanted: ChannelRequest, limits: Limits, patience: Patience) -> Flow[ChannelRecord]:
    """Ask for the server's terms, check them, and return the record of a channel that may be funded."""
    if wanted.movable and wanted.version == 1:
        raise TermsUnacceptable(what="version of a movable channel", got=1, want=2)
    client_key = wanted.key.public_key.format()
    if not math.isfinite(wanted.hours):
        raise TermsUnacceptable(what="hours of paying", got=wanted.hours, want="a number")
    expiry = check_expiry(
        int(wanted.now + wanted.hours * HOUR + _GUESS_SECONDS) if wanted.expires is None else wanted.expires
    )
    try:
        info, response = yield from _ask_terms(wanted, client_key, expiry, patience)
    except Refused as error:
        latest = error.fields.get("need_unix")
        if wanted.expires is not None or error.code != "expiry_too_late" or not isinstance(latest, int):
            raise
        info, response = yield from _ask_terms(wanted, client_key, check_expiry(latest), patience)
    if wanted.expires is None:
        check_limits(info, limits)
        check_clock(response.headers.get("date", ""), wanted.now)
        expiry = expiry_for(info, wanted.hours, wanted.now)
        info, response = yield from _ask_terms(wanted, client_key, expiry, patience)
    agreed = agree(info, client_key, expiry, wanted.now, limits, wanted.network)
    home = wanted.change_address or key_address(client_key, agreed.network)
    decode_address(home, agreed.network)
    return ChannelRecord(
        name=client_key.hex()[2:10],
        url=wanted.url,
        version=wanted.version,
        dialect=wanted.dialect,
        network=agreed.network,
        private_key=wanted.key.to_hex(),
        key_index=wanted.key_index,
        server_key=agreed.terms.server_key.hex(),
        expiry=expiry,
        funding_address=agreed.address,
        created_at=wanted.now,
        open_price_sat=agreed.open_price_sat,
        dust_sat=agreed.dust_sat,
        min_confirmations=agreed.min_confirmations,
        settlement_period_hours=agreed.settlement_period_hours,
        change_address=agreed.address if wanted.movable else home,
        payout_address=wanted.change_address if wanted.movable else "",
        meant_sat=Sat(wanted.amount_sat),
        location=routes.opening_path(response, wanted.url, wanted.version, client_key, expiry),
    )


def _ask_terms(
    wanted: ChannelRequest, client_key: bytes, expiry: UnixTime, patience: Patience
) -> Flow[tuple[FundingInfo, Response]]:
    """Ask for the terms of this key and expiry. v1 does not report the minimum payment time, so v2 is asked for it."""
    path = routes.info_path(wanted.version, wanted.dialect, client_key, expiry)
    reply = yield from ask(Request("GET", wanted.url + path), patience)
    if reply.response.status != 200:
        raise refusal(reply.response)
    info = read_funding_info(reply.response.body)
    if info.min_duration_hours is UNSET:
        least = yield from _ask_least(wanted, client_key, expiry, patience)
        info = structs.replace(info, min_duration_hours=least)
    return info, reply.response


def _ask_least(wanted: ChannelRequest, client_key: bytes, expiry: UnixTime, patience: Patience) -> Flow[int]:
    other = Request("GET", wanted.url + routes.info_path(2, Dialect.S, client_key, expiry))
    try:
        answer = (yield from ask(other, patience)).response
        least = read_funding_info(answer.body).min_duration_hours
    except (Unreachable, ServerMisbehaved):
        return ASSUMED_MIN_HOURS
    return least if isinstance(least, int) and answer.status == 200 else ASSUMED_MIN_HOURS


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return the TLS settings of all payers of this process: reading the authorities' certificates takes 20 ms."""
    import httpx

    return httpx.create_ssl_context()


class PayerBase:
    """Methods that neither use the network nor block. `Payer` describes the arguments."""

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
    ) -> None:
        if not time_limit_seconds > 0:
            msg = f"time limit of {time_limit_seconds} s: want more than 0"
            raise ValueError(msg)
        self.url = check_url(url) if url else ""
        self.wallet = Wallet(wallet)
        self._version, self._dialect, self._network = version, dialect, network
        self._settings = TransportSettings(limits or Limits(), patience or Patience(), time_limit_seconds)
        self._files: weakref.WeakSet[ChannelFile] = weakref.WeakSet()

    def records(self) -> list[ChannelRecord]:
        """Read all readable channels of the wallet, including those in use; see `problems`."""
        return self.wallet.read_all()[0]

    def problems(self) -> dict[str, WalletError]:
        """Return the channels of the wallet that cannot be read: the error of each, by name."""
        return self.wallet.read_all()[1]

    def _new(
        self, hours: float, expires: int | None, change_address: str, amount_sat: int, *, movable: bool
    ) -> Flow[ChannelRecord]:
        key, key_index = self.wallet.seed.new_key()
        wanted = ChannelRequest(
            url=check_url(self.url),
            version=self._version,
            dialect=self._dialect,
            network=self._network,
            key=key,
            key_index=key_index,
            hours=hours,
            expires=expires,
            now=UnixTime(int(time.time())),
            change_address=change_address,
            amount_sat=amount_sat,
            movable=movable,
        )
        return new_channel(wanted, self._settings.limits, self._settings.patience)

    def _created(self, record: ChannelRecord) -> ChannelFile:
        """Make the key durable before the caller learns the address."""
        file = self.wallet.create(record)
        self._files.add(file)
        return file

    def _opened(self, name: str) -> tuple[ChannelFile, ChannelRecord]:
        file, record = self.wallet.open(name)
        self._files.add(file)
        return file, record

    def _release(self) -> None:
        for file in list(self._files):
            file.release()


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
        self._http = http or httpx.Client(transport=ProxyTransport(_tls()))
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
        return Channel(self._created(record), record, self._settings, self._http, self)

    def channel(self, name: str) -> Channel:
        """Load a channel of the wallet, by the beginning of its name, and lock its file."""
        return Channel(*self._opened(name), self._settings, self._http, self)

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
        self._http = http or httpx.AsyncClient(transport=AsyncProxyTransport(_tls()))

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
        return AsyncChannel(self._created(record), record, self._settings, self._http)

    def channel(self, name: str) -> AsyncChannel:
        return AsyncChannel(*self._opened(name), self._settings, self._http)

    async def close(self) -> None:
        await self._http.aclose()
        self._release()


def check_url(url: str) -> str:
    """Return a base URL without a trailing slash.

    Raises:
        TermsUnacceptable: not http or https, or more than host, port and path.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise TermsUnacceptable(what="server URL", got=repr(url), want="http:// or https://, host, port and path only")
    return url.rstrip("/")


def _nothing_to_keep(_record: ChannelRecord) -> None:
    """Do nothing: agreeing on terms signs nothing, so the record is written later, with the channel's file."""
