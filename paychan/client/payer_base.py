"""The part of a payer that neither uses the network nor waits: settings, the wallet, and the flows to run."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from paychan.client.amounts import hours_of_paying, satoshi, whole
from paychan.client.channel_base import TransportSettings
from paychan.client.errors import WalletError, WrongUrl, WrongValue
from paychan.client.flows.find import Need, find
from paychan.client.flows.new import ChannelRequest, new_channel
from paychan.client.limits import Limits
from paychan.client.record import ChannelRecord
from paychan.client.transport.effects import TIME_LIMIT_SECONDS, Flow, Patience
from paychan.client.wallet import ChannelFile, Wallet
from paychan.protocol.expiry import check_expiry
from paychan.protocol.types import Network, UnixTime
from paychan.protocol.wire.rbpcp import Dialect
from paychan.shared.urls import is_loopback, url_trouble

T = TypeVar("T")

DEFAULT_HOURS = 7 * 24
"""Time for payments of a new channel, unless the caller names another."""


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
            raise WrongValue(what="time limit", got=f"{time_limit_seconds} s", want="more than 0")
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
        self,
        hours: float,
        expires: int | None,
        change_address: str,
        amount_sat: int,
        *,
        movable: bool,
        url: str = "",
        room_sat: int = 0,
        index: int | None = None,
    ) -> Flow[ChannelRecord]:
        hours = hours_of_paying(hours)
        expires = None if expires is None else check_expiry(whole(expires, "expires"))
        amount_sat = satoshi(amount_sat, "amount_sat")
        url = check_url(url or self.url)
        key, key_index = self.wallet.seed.new_key() if index is None else self.wallet.seed.key_again(index)
        wanted = ChannelRequest(
            url=url,
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
            room_sat=room_sat,
            movable=movable,
        )
        return new_channel(wanted, self._settings.limits, self._settings.patience)

    def _find(
        self,
        held: Callable[[str], T | None],
        url: str,
        room_sat: int,
        amount_sat: int,
        hours: float,
        change_address: str,
    ) -> Flow[T | tuple[ChannelFile, ChannelRecord]]:
        hours, amount_sat = hours_of_paying(hours), satoshi(amount_sat, "amount_sat")
        room_sat = whole(room_sat, "room_sat")
        if room_sat < 0:
            raise WrongValue(what="room_sat", got=f"{room_sat} sat", want="0 or more")
        room_sat = satoshi(room_sat, "room_sat")
        url = check_url(url or self.url)

        def make() -> Flow[ChannelRecord]:
            return self._new(hours, None, change_address, amount_sat, movable=False, url=url, room_sat=room_sat)

        return find(self.wallet, Need(url, self._network, room_sat), time.time(), held, make)

    def _release(self) -> None:
        for file in list(self._files):
            file.release()


def check_url(url: str) -> str:
    """Return a base URL without a trailing slash.

    Raises:
        WrongUrl: not http or https, or more than host, port and path; with the URL that was probably meant.
    """
    url = url.strip()
    if url_trouble(url, ("http", "https"), path=True) == "" and not urlsplit(url).username:
        return url.rstrip("/")
    fix = meant_url(url)
    raise WrongUrl(url=url, fix=fix, want=fix or "http:// or https://, host, port and path only")


def meant_url(text: str) -> str:
    """Return the base URL that a text without a scheme probably means; "" without a guess.

    A host of this machine, or one with a port, is spoken to by http; another one by https.
    """
    if "://" in text:
        return ""
    host = text.partition("/")[0]
    named, _, port = host.partition(":")
    scheme = "http" if port or is_loopback(named) else "https"
    return f"{scheme}://{text}" if host and url_trouble(f"{scheme}://{text}", (scheme,), path=True) == "" else ""
