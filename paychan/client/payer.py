"""The payer: one server, one wallet, and the channels between them."""

from __future__ import annotations

import math
import os
import time
import weakref
from typing import Literal, Self, TypedDict, Unpack
from urllib.parse import urlsplit

import httpx
from coincurve import PrivateKey
from msgspec import UNSET, Struct, structs

from paychan.client.channel import AsyncChannel, Channel, TransportSettings
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
from paychan.client.transport.effects import Flow, Patience, Request, Response, ask
from paychan.client.transport.http import TIMEOUT, drive, drive_async
from paychan.client.wallet import ChannelFile, Wallet
from paychan.protocol.address import decode_address
from paychan.protocol.kinds.script import check_expiry
from paychan.protocol.types import Network, Sat, UnixTime
from paychan.protocol.wire.rbpcp import Dialect, FundingInfo

DEFAULT_HOURS = 7 * 24

_GUESS_SECONDS = 5 * 24 * 3600
"""Beyond the hours of paying, when the terms are asked for the first time: they say how much more it takes."""


class Wish(Struct, frozen=True):
    """What a new channel is asked for."""

    url: str
    version: Literal[1, 2]
    dialect: Dialect
    network: Network | None
    key: PrivateKey
    hours: float
    """Time for payments, unless `expires` names the end itself."""
    expires: int | None
    now: UnixTime
    change_address: str
    amount_sat: int = 0
    movable: bool = False


def new_channel(wish: Wish, limits: Limits, patience: Patience) -> Flow[ChannelRecord]:
    """Ask for the server's terms, judge them, and return the record of a channel that may be funded."""
    if wish.movable and wish.version == 1:
        raise TermsUnacceptable(what="version of a movable channel", got=1, want=2)
    client_key = wish.key.public_key.format()
    if not math.isfinite(wish.hours):
        raise TermsUnacceptable(what="hours of paying", got=wish.hours, want="a number")
    expiry = check_expiry(int(wish.now + wish.hours * HOUR + _GUESS_SECONDS) if wish.expires is None else wish.expires)
    try:
        info, response = yield from _ask_terms(wish, client_key, expiry, patience)
    except Refused as error:
        latest = error.fields.get("need_unix")
        if wish.expires is not None or error.code != "expiry_too_late" or not isinstance(latest, int):
            raise
        info, response = yield from _ask_terms(wish, client_key, check_expiry(latest), patience)
    if wish.expires is None:
        check_limits(info, limits)
        check_clock(response.headers.get("date", ""), wish.now)
        expiry = expiry_for(info, wish.hours, wish.now)
        info, response = yield from _ask_terms(wish, client_key, expiry, patience)
    agreed = agree(info, client_key, expiry, wish.now, limits, wish.network)
    home = wish.change_address or key_address(client_key, agreed.network)
    decode_address(home, agreed.network)
    return ChannelRecord(
        name=client_key.hex()[2:10],
        url=wish.url,
        version=wish.version,
        dialect=wish.dialect,
        network=agreed.network,
        private_key=wish.key.to_hex(),
        server_key=agreed.terms.server_key.hex(),
        expiry=expiry,
        funding_address=agreed.address,
        created_at=wish.now,
        open_price_sat=agreed.open_price_sat,
        dust_sat=agreed.dust_sat,
        min_confirmations=agreed.min_confirmations,
        settlement_period_hours=agreed.settlement_period_hours,
        change_address=agreed.address if wish.movable else home,
        payout_address=wish.change_address if wish.movable else "",
        meant_sat=Sat(wish.amount_sat),
        location=routes.opening_path(response, wish.url, wish.version, client_key, expiry),
    )


def _ask_terms(
    wish: Wish, client_key: bytes, expiry: UnixTime, patience: Patience
) -> Flow[tuple[FundingInfo, Response]]:
    """Ask for the terms of this key and expiry. v1 does not tell the least time for payments: then v2 is asked for that."""
    path = routes.info_path(wish.version, wish.dialect, client_key, expiry)
    reply = yield from ask(Request("GET", wish.url + path), patience)
    if reply.response.status != 200:
        raise refusal(reply.response)
    info = read_funding_info(reply.response.body)
    if info.min_duration_hours is UNSET:
        least = yield from _ask_least(wish, client_key, expiry, patience)
        info = structs.replace(info, min_duration_hours=least)
    return info, reply.response


def _ask_least(wish: Wish, client_key: bytes, expiry: UnixTime, patience: Patience) -> Flow[int]:
    other = Request("GET", wish.url + routes.info_path(2, Dialect.S, client_key, expiry))
    try:
        told = (yield from ask(other, patience)).response
        least = read_funding_info(told.body).min_duration_hours
    except (Unreachable, ServerMisbehaved):
        return ASSUMED_MIN_HOURS
    return least if isinstance(least, int) and told.status == 200 else ASSUMED_MIN_HOURS


class Settings(TypedDict, total=False):
    """Arguments of `PayerBase` by name."""

    wallet: str | os.PathLike[str] | None
    version: Literal[1, 2]
    dialect: Dialect
    network: Network | None
    limits: Limits | None
    patience: Patience | None


class PayerBase:
    """What needs neither network nor waiting.

    Args:
        url: base URL of the server; only a new channel needs it, an existing one knows its own.
        wallet: directory of the channels; default `$PAYCHAN_WALLET`, or else `~/.paychan/wallet`.
        version: RBPCP version of new channels, and `dialect` that of version 2.
        network: the only Bitcoin network to accept. Regtest must be named, its addresses look like test's.
        limits: terms and amounts to accept.
        patience: how long to ask a server that is busy or silent.
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
    ) -> None:
        self.url = check_url(url) if url else ""
        self.wallet = Wallet(wallet)
        self._version, self._dialect, self._network = version, dialect, network
        self._ways = TransportSettings(limits or Limits(), patience or Patience())
        self._files: weakref.WeakSet[ChannelFile] = weakref.WeakSet()

    def records(self) -> list[ChannelRecord]:
        """Read all channels of the wallet that can be read, also those in use; see `problems`."""
        return self.wallet.read_all()[0]

    def problems(self) -> dict[str, WalletError]:
        """Say by name which channels of the wallet can't be read, and why."""
        return self.wallet.read_all()[1]

    def _new(
        self, hours: float, expires: int | None, change_address: str, amount_sat: int, *, movable: bool
    ) -> Flow[ChannelRecord]:
        wish = Wish(
            url=check_url(self.url),
            version=self._version,
            dialect=self._dialect,
            network=self._network,
            key=PrivateKey(),
            hours=hours,
            expires=expires,
            now=UnixTime(int(time.time())),
            change_address=change_address,
            amount_sat=amount_sat,
            movable=movable,
        )
        return new_channel(wish, self._ways.limits, self._ways.patience)

    def _created(self, record: ChannelRecord) -> ChannelFile:
        """The key is on the disk before anybody learns the address."""
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
    """Opens channels whose methods wait. See `PayerBase`.

    `with` closes connections and releases the channels at its end; else that happens with the last channel.
    """

    def __init__(self, url: str = "", *, http: httpx.Client | None = None, **settings: Unpack[Settings]) -> None:
        super().__init__(url, **settings)
        self._http = http or httpx.Client(timeout=TIMEOUT)
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
        """Agree on a new channel that takes payments for `hours`, or ends at the Unix time `expires`.

        Its expiry is later than the hours: the funding must become deep first, and the server settles before the expiry.

        `amount_sat` is what you mean to send to its address; by default the least that opens it.
        A `movable` channel (version 2) lets the server withdraw what it earned without ending it: the change funds the
        channel again, until a closing or a refund brings it to `change_address`. If the server closes it on its own,
        what is left stays locked until the expiry.

        Raises:
            TermsUnacceptable, ServerMisbehaved, Refused, Unreachable: there is no channel.
        """
        terms = self._new(hours, expires, change_address, amount_sat, movable=movable)
        record = drive(terms, self._http, keep=_nothing_to_keep)
        return Channel(self._created(record), record, self._ways, self._http, self)

    def channel(self, name: str) -> Channel:
        """Go on with a channel of the wallet, named by the beginning of its name."""
        return Channel(*self._opened(name), self._ways, self._http, self)

    def close(self) -> None:
        """Close connections and release the channels; the channels themselves stay as they are."""
        self._hang_up()
        self._release()


class AsyncPayer(PayerBase):
    """Opens channels whose methods are awaited; else like `Payer`."""

    def __init__(self, url: str = "", *, http: httpx.AsyncClient | None = None, **settings: Unpack[Settings]) -> None:
        super().__init__(url, **settings)
        self._http = http or httpx.AsyncClient(timeout=TIMEOUT)

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
        terms = self._new(hours, expires, change_address, amount_sat, movable=movable)
        record = await drive_async(terms, self._http, keep=_nothing_to_keep)
        return AsyncChannel(self._created(record), record, self._ways, self._http)

    def channel(self, name: str) -> AsyncChannel:
        return AsyncChannel(*self._opened(name), self._ways, self._http)

    async def close(self) -> None:
        await self._http.aclose()
        self._release()


def check_url(url: str) -> str:
    """Pass a base URL without a slash at its end.

    Raises:
        TermsUnacceptable: not http or https, or with anything but host, port and path.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise TermsUnacceptable(what="server URL", got=repr(url), want="http:// or https://, host, port and path only")
    return url.rstrip("/")


def _nothing_to_keep(_record: ChannelRecord) -> None:
    """Agreeing on terms signs nothing, so nothing is written until the file exists."""
