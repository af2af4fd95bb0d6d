"""Find the channel of a wallet that pays a server, or make one; several processes may do so at the same time.

A channel is never made beside another that would do. One that another process uses is waited for. A lock on the wallet
covers the time from the first look to the new file, so two processes do not both make one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from msgspec import Struct

from paychan.client.errors import ChannelInUse
from paychan.client.limits import HOUR
from paychan.client.record import ChannelRecord, State
from paychan.client.transport.effects import Flow, Retry
from paychan.client.wallet import ChannelFile, Wallet
from paychan.protocol.types import Network
from paychan.shared.urls import is_loopback

T = TypeVar("T")

_GATE = ".opening"
"""Name of the lock of the wallet; channels have no names that begin with a point."""

_PAUSE_SECONDS = 0.1

_LEAST_SECONDS = 600
"""Least time for which a channel must still take payments."""

_PORTS = {"http": 80, "https": 443}


class Need(Struct, frozen=True):
    """The properties that a channel must have: its server, its network (None: any), and the amount that it can still pay."""

    url: str
    network: Network | None
    room_sat: int

    def is_met(self, record: ChannelRecord, now: float) -> bool:
        """Say whether a channel takes payments of this amount, or will take them once it is funded and opened."""
        if not same_server(record.url, self.url) or self.network not in (None, record.network):
            return False
        if record.state not in (State.NEW, State.OPEN):
            return False
        if record.expiry - HOUR * record.settlement_period_hours < now + _LEAST_SECONDS:
            return False
        return room_sat(record) >= self.room_sat


def room_sat(record: ChannelRecord) -> int:
    """Return the amount (satoshi) that a channel can still pay with change left; that of a new one after its opening."""
    if record.state is State.NEW and record.signed_sat is None:
        held = record.funding_sat if record.funding_outpoint else record.amount_sat
        return held - record.open_price_sat - record.dust_sat
    return record.left_sat - record.dust_sat


def least_sat(record: ChannelRecord, room_sat: int, amount_sat: int) -> int:
    """Return the least funding (satoshi) of a channel that is to pay `room_sat`; at least `amount_sat`, if it is set.

    An earlier call may have planned more for the channel (`ChannelRecord.meant_sat`).
    """
    return max(amount_sat, record.min_funding_sat + room_sat)


def same_server(one: str, other: str) -> bool:
    """Compare two base URLs: scheme and host in any case, the port also if it is the scheme's own, and the path.

    All names of this machine itself are one host, such as localhost and 127.0.0.1.
    """
    return _server(one) == _server(other)


def _server(url: str) -> tuple[str, str, int | None, str]:
    parts = urlsplit(url)
    port = parts.port or _PORTS.get(parts.scheme)
    host = (parts.hostname or "").rstrip(".")
    return parts.scheme, "localhost" if is_loopback(host) else host, port, parts.path.rstrip("/")


def find(
    wallet: Wallet,
    need: Need,
    now: float,
    held: Callable[[str], T | None],
    make: Callable[[], Flow[ChannelRecord]],
) -> Flow[T | tuple[ChannelFile, ChannelRecord]]:
    """Return the channel that this process holds already, or the locked file of another one, or that of a new one.

    Args:
        wallet: where the channels are.
        need: what the channel must offer.
        now: Unix time.
        held: returns the object of a channel that this process holds, by name.
        make: agrees on a new channel.

    Raises:
        ChannelInUse: until the time limit another process used the only channels that meet the need.
        WalletError: no channel meets the need, and one that can't be read might.
    """
    while True:
        try:
            gate = ChannelFile(wallet.directory, _GATE)
        except ChannelInUse:
            gate = None
        if gate is not None:
            try:
                records, problems = wallet.read_all()
                fitting = sorted((each for each in records if need.is_met(each, now)), key=_rank)
                if not fitting:
                    for problem in problems.values():
                        raise problem
                    record = yield from make()
                    return wallet.create(record), record
                if (found := _take(wallet, need, now, held, fitting)) is not None:
                    return found
            finally:
                gate.release()
        if (yield Retry(_PAUSE_SECONDS)) is not None:
            raise ChannelInUse(name="of this server")


def _take(
    wallet: Wallet, need: Need, now: float, held: Callable[[str], T | None], fitting: list[ChannelRecord]
) -> T | tuple[ChannelFile, ChannelRecord] | None:
    """Take the first of these channels that no other process uses and that still meets the need; None if there is none."""
    for each in fitting:
        if (mine := held(each.name)) is not None:
            return mine
        try:
            file, record = wallet.open(each.name)
        except ChannelInUse:
            continue
        if need.is_met(record, now):
            return file, record
        file.release()
    return None


def _rank(record: ChannelRecord) -> tuple[int, int, str]:
    """Order channels: open ones first, then those with coins, and the fullest first."""
    stage = 0 if record.state is State.OPEN else 1 if record.funding_outpoint else 2
    return stage, -room_sat(record), record.name
