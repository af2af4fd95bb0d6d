"""What a payer agrees to: the server's terms, judged before there is an address to pay to.

The script is rebuilt from the server's key, the payer's key and the expiry; the address that the server names must
follow from it, and is only compared.
"""

from __future__ import annotations

import math
from email.utils import parsedate_to_datetime

import msgspec
from msgspec import UNSET, Struct

from paychan.client.errors import ServerMisbehaved, TermsUnacceptable
from paychan.protocol.errors import KeyReuse, Malformed
from paychan.protocol.kinds.script import ChannelTerms, check_expiry, make_terms, parse_public_key
from paychan.protocol.types import Network, Sat, UnixTime
from paychan.protocol.wire.rbpcp import FundingInfo

HOUR = 3600

_BLOCK_SECONDS = 3 * 600
"""For each confirmation: one block in a hundred takes longer than 46 minutes, but several in a row never do so together."""

_LEAD_SECONDS = HOUR
"""For the payer's wallet, the funding's way into a block, and the clock: servers compare with whichever is later."""

ASSUMED_MIN_HOURS = 24
"""Least time for payments of a server that does not tell it; ours wants 12."""

CLOCK_LEEWAY_SECONDS = HOUR
"""Most that the payer's clock may differ from the server's when an expiry is counted from it."""

DUST_SAT = Sat(700)
"""Least change that v1 servers accept; they don't tell (RBPCP §7.1). More than any relay limit for P2PKH."""


class Limits(Struct, frozen=True, kw_only=True):
    """What a payer is willing to accept from any server; amounts in satoshi."""

    open_price_sat: int = 250_000
    """Largest price of opening, which is paid even if nothing is bought."""
    dust_sat: int = 10_000
    """Largest rest that can't be had back as change."""
    min_confirmations: int = 12
    settlement_period_hours: int = 72
    """Longest time before expiry in which the server may close already."""
    payment_sat: int = 1_000_000
    """Largest single payment, against a slip of the finger; draining a channel is not limited."""


class Agreement(Struct, frozen=True):
    """Terms that passed: what the record of the new channel takes over."""

    terms: ChannelTerms
    network: Network
    address: str
    open_price_sat: Sat
    dust_sat: Sat
    min_confirmations: int
    settlement_period_hours: int


def read_funding_info(body: bytes) -> FundingInfo:
    """Read the server's terms.

    Raises:
        ServerMisbehaved: not the JSON object of RBPCP §5.1 and §6.1.
    """
    try:
        return msgspec.json.decode(body, type=FundingInfo)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ServerMisbehaved(what="funding info", got=str(error)[:120], want="the documented JSON object") from None


def agree(
    info: FundingInfo, client_key: bytes, expiry: UnixTime, now: UnixTime, limits: Limits, network: Network | None
) -> Agreement:
    """Judge a server's terms for one channel. `network`: the only acceptable one, or any when None.

    Raises:
        ServerMisbehaved: key or address can't be right.
        TermsUnacceptable: right, but outside the payer's limits, or no time left to pay.
    """
    try:
        terms = make_terms(parse_public_key(info.server_pubkey, "server_pubkey"), client_key, expiry)
    except (Malformed, KeyReuse) as error:
        raise ServerMisbehaved(what="server key", got=info.server_pubkey[:66], want=str(error)) from None
    dust = check_limits(info, limits)
    need_seconds = lead_seconds(info) + HOUR * (info.settlement_period_hours + min_hours(info))
    if expiry - now < need_seconds:
        need = f"at least {-(-need_seconds // HOUR)}"
        raise TermsUnacceptable(what="hours until expiry", got=(expiry - now) // HOUR, want=need)
    chosen = _network(terms, info.funding_address_copy, network)
    return Agreement(
        terms=terms,
        network=chosen,
        address=terms.funding_address(chosen),
        open_price_sat=info.open_price,
        dust_sat=dust,
        min_confirmations=info.funding_tx_min_conf,
        settlement_period_hours=info.settlement_period_hours,
    )


def check_limits(info: FundingInfo, limits: Limits) -> Sat:
    """Hold a server's terms against the payer's limits; return the dust limit that counts.

    Raises:
        TermsUnacceptable: outside of them.
    """
    dust = DUST_SAT if info.dust_limit is UNSET else max(DUST_SAT, info.dust_limit)
    for what, got, limit in (
        ("open price in satoshi", info.open_price, limits.open_price_sat),
        ("dust limit in satoshi", dust, limits.dust_sat),
        ("number of confirmations", info.funding_tx_min_conf, limits.min_confirmations),
        ("settlement period in hours", info.settlement_period_hours, limits.settlement_period_hours),
    ):
        if not 0 <= got <= limit:
            raise TermsUnacceptable(what=what, got=got, want=f"0 to {limit}")
    return Sat(dust)


def lead_seconds(info: FundingInfo) -> int:
    """Time until a channel that is made now can be open: its funding must be paid and become deep enough."""
    return info.funding_tx_min_conf * _BLOCK_SECONDS + _LEAD_SECONDS


def min_hours(info: FundingInfo) -> int:
    """Least time for payments; 0 when the server does not tell."""
    return 0 if info.min_duration_hours is UNSET else info.min_duration_hours


def expiry_for(info: FundingInfo, hours: float, now: UnixTime) -> UnixTime:
    """Return the expiry of a channel that takes payments for `hours`, from when it can be open until it is settled.

    Raises:
        TermsUnacceptable: the server wants more hours than that.
        ExpiryNotATime: later than nLockTime can tell.
    """
    least = min_hours(info)
    if hours < least:
        raise TermsUnacceptable(what="hours of paying", got=f"{hours:g}", want=f"at least {least}")
    return check_expiry(now + lead_seconds(info) + math.ceil((hours + info.settlement_period_hours) * HOUR))


def check_clock(date: str, now: UnixTime) -> None:
    """Compare the payer's clock with the server's (HTTP date): an expiry that is counted from a wrong one locks coins up.

    Raises:
        TermsUnacceptable: they differ by more than an hour.
    """
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return
    if abs(now - theirs) > CLOCK_LEEWAY_SECONDS:
        want = f"at most {CLOCK_LEEWAY_SECONDS}; if yours is right, name the end as a Unix time (--expires)"
        raise TermsUnacceptable(what="difference of clocks in seconds", got=int(now - theirs), want=want)


def _network(terms: ChannelTerms, address: str, wanted: Network | None) -> Network:
    """Tell the network from the server's address; regtest looks like test, so it must be asked for."""
    for network in (Network.LIVE, wanted if wanted is Network.REGTEST else Network.TEST):
        if terms.funding_address(network) == address:
            if wanted not in (None, network):
                raise TermsUnacceptable(what="network", got=network.value, want=wanted.value)
            return network
    want = terms.funding_address(wanted or Network.TEST)
    raise ServerMisbehaved(what="funding address", got=address[:40], want=want)
