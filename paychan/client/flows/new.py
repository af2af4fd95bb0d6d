"""Agree on a new channel: ask for the server's terms, check them, and make the record of a channel that may be funded."""

from __future__ import annotations

from typing import Literal

from coincurve import PrivateKey
from msgspec import UNSET, Struct, structs

from paychan.client.amounts import satoshi
from paychan.client.errors import Refused, ServerMisbehaved, TermsUnacceptable, Unreachable
from paychan.client.flows.refund import key_address
from paychan.client.limits import (
    ASSUMED_MIN_HOURS,
    HOUR,
    Agreement,
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
from paychan.protocol.address import decode_address
from paychan.protocol.expiry import check_expiry
from paychan.protocol.types import Network, Sat, UnixTime
from paychan.protocol.wire.rbpcp import Dialect, FundingInfo

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
    """Amount to fund; 0 for the least that suffices."""
    room_sat: int = 0
    """Amount that the channel must be able to pay after its opening."""
    movable: bool = False
    any_clock: bool = False
    """`now` is the server's time, so it is not compared with it."""


def new_channel(wanted: ChannelRequest, limits: Limits, patience: Patience) -> Flow[ChannelRecord]:
    """Ask for the server's terms, check them, and return the record of a channel that may be funded.

    On regtest, where `paychan node pass` sets the chain's clock ahead, the hours count from the server's time.

    Raises:
        TermsUnacceptable, ServerMisbehaved, Refused, Unreachable: no channel was made.
    """
    try:
        return (yield from _agree_on(wanted, limits, patience))
    except Refused as error:
        soonest = error.fields.get("need_unix")
        if error.code != "expiry_too_soon" or not isinstance(soonest, int):
            raise
        if wanted.expires is not None or wanted.network is not Network.REGTEST:
            raise
    ahead = structs.replace(wanted, now=check_expiry(soonest), any_clock=True)
    record = yield from _agree_on(ahead, limits, patience)
    return structs.replace(record, created_at=wanted.now)


def _agree_on(wanted: ChannelRequest, limits: Limits, patience: Patience) -> Flow[ChannelRecord]:
    if wanted.movable and wanted.version == 1:
        raise TermsUnacceptable(what="version of a movable channel", got=1, want=2)
    client_key = wanted.key.public_key.format()
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
        if not wanted.any_clock:
            check_clock(response.headers.get("date", ""), wanted.now)
        expiry = expiry_for(info, wanted.hours, wanted.now)
        info, response = yield from _ask_terms(wanted, client_key, expiry, patience)
    agreed = agree(info, client_key, expiry, wanted.now, limits, wanted.network)
    home = wanted.change_address or key_address(client_key, agreed.network)
    decode_address(home, agreed.network)
    meant = _meant(wanted, agreed)
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
        meant_sat=meant,
        location=routes.opening_path(response, wanted.url, wanted.version, client_key, expiry),
    )


def _meant(wanted: ChannelRequest, agreed: Agreement) -> Sat:
    """Return the amount to fund with; 0 for the minimum.

    Raises:
        TermsUnacceptable: it does not suffice for the opening, the dust limit, and what the channel must be able to pay.
    """
    least = satoshi(agreed.open_price_sat + agreed.dust_sat + wanted.room_sat, "amount to fund")
    if not wanted.amount_sat:
        return Sat(least if wanted.room_sat else 0)
    if wanted.amount_sat < least:
        more = f" + {wanted.room_sat:,} to pay" if wanted.room_sat else ""
        want = f"at least {least:,}: {agreed.open_price_sat:,} to open + {agreed.dust_sat:,} that must stay{more}"
        raise TermsUnacceptable(what="amount to fund in satoshi", got=wanted.amount_sat, want=want)
    return Sat(wanted.amount_sat)


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
