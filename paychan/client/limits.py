"""Check the server's terms before the payer gets an address to pay to.

The client rebuilds the script from the server's key, its own key and the expiry. The address that the server names must
follow from that script, and is only compared.
"""

from __future__ import annotations

import math

import msgspec
from msgspec import UNSET, Struct, structs

from paychan.client.amounts import whole
from paychan.client.errors import ServerMisbehaved, TermsUnacceptable
from paychan.protocol.errors import KeyReuse, Malformed
from paychan.protocol.expiry import check_expiry
from paychan.protocol.keys import parse_public_key
from paychan.protocol.kinds.base import ChannelTerms, make_terms
from paychan.protocol.types import Network, Sat, UnixTime
from paychan.protocol.wire.rbpcp import FundingInfo

HOUR = 3600

_BLOCK_SECONDS = 3 * 600
"""Time for each confirmation. One block in a hundred takes longer than 46 minutes; several in a row never all do."""

_LEAD_SECONDS = HOUR
"""Time to send the funding, for it to reach a block, and for clocks: a server uses the later of two times."""

ASSUMED_MIN_HOURS = 24
"""Assumed minimum payment time if the server names none; paychan's default is 12."""

CLOCK_LEEWAY_SECONDS = HOUR
"""Largest difference between the clocks of payer and server when the client computes an expiry from its own clock."""

DUST_SAT = Sat(700)
"""Minimum change that v1 servers accept; they do not report it (RBPCP §7.1). Above every relay limit for P2PKH."""


class Limits(Struct, frozen=True, kw_only=True):
    """Terms and amounts that a payer accepts from any server; amounts in satoshi.

    Raises:
        WrongNumber: a limit is not a whole number.
    """

    open_price_sat: int = 250_000
    """Highest open price. It is paid even if the payer buys nothing."""
    dust_sat: int = 10_000
    """Highest dust limit: a rest below it cannot be paid back as change."""
    min_confirmations: int = 12
    settlement_period_hours: int = 72
    """Longest period before the expiry in which the server may already close the channel."""
    payment_sat: int = 1_000_000
    """Largest single payment, draining included, against typing errors."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            structs.force_setattr(self, name, whole(getattr(self, name), name))


class Agreement(Struct, frozen=True):
    """Accepted terms, for the record of the new channel."""

    terms: ChannelTerms
    network: Network
    address: str
    open_price_sat: Sat
    dust_sat: Sat
    min_confirmations: int
    settlement_period_hours: int


def read_funding_info(body: bytes) -> FundingInfo:
    """Parse the server's terms.

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
    """Check a server's terms for one channel. `network` is the only acceptable one; None accepts any.

    Raises:
        ServerMisbehaved: the key or the address cannot be right.
        TermsUnacceptable: outside the payer's limits, or too little time to pay.
    """
    try:
        terms = make_terms(parse_public_key(info.server_pubkey, "server_pubkey"), client_key, expiry)
    except (Malformed, KeyReuse) as error:
        raise ServerMisbehaved(what="server key", got=info.server_pubkey[:66], want=str(error)) from None
    dust = check_limits(info, limits)
    need_seconds = lead_seconds(info) + HOUR * (info.settlement_period_hours + min_hours(info))
    if expiry - now < need_seconds:
        need = f"at least {-(-need_seconds // HOUR):,}"
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
    """Compare a server's terms with the payer's limits; return the dust limit that applies, in satoshi.

    Raises:
        TermsUnacceptable: a term is outside its limit.
    """
    dust = DUST_SAT if info.dust_limit is UNSET else max(DUST_SAT, info.dust_limit)
    for what, got, limit in (
        ("open price in satoshi", info.open_price, limits.open_price_sat),
        ("dust limit in satoshi", dust, limits.dust_sat),
        ("number of confirmations", info.funding_tx_min_conf, limits.min_confirmations),
        ("settlement period in hours", info.settlement_period_hours, limits.settlement_period_hours),
    ):
        if not 0 <= got <= limit:
            raise TermsUnacceptable(what=what, got=got, want=f"0 to {limit:,}")
    return Sat(dust)


def lead_seconds(info: FundingInfo) -> int:
    """Return the seconds until a new channel can be open: its funding must be paid and become deep enough."""
    return info.funding_tx_min_conf * _BLOCK_SECONDS + _LEAD_SECONDS


def min_hours(info: FundingInfo) -> int:
    """Return the server's minimum payment time; 0 if it names none."""
    return 0 if info.min_duration_hours is UNSET else info.min_duration_hours


def expiry_for(info: FundingInfo, hours: float, now: UnixTime) -> UnixTime:
    """Return the expiry (Unix time) of a channel that takes payments for `hours` between opening and settlement.

    Raises:
        TermsUnacceptable: the server wants more hours.
        ExpiryNotATime: later than nLockTime can express.
    """
    least = min_hours(info)
    if hours < least:
        raise TermsUnacceptable(what="hours of paying", got=f"{hours:,g}", want=f"at least {least:,}")
    return check_expiry(now + lead_seconds(info) + math.ceil((hours + info.settlement_period_hours) * HOUR))


def check_clock(date: str, now: UnixTime) -> None:
    """Compare the payer's clock with the server's (HTTP date): a wrong clock gives an expiry that locks coins up.

    Raises:
        TermsUnacceptable: they differ by more than an hour.
    """
    from email.utils import parsedate_to_datetime

    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return
    if abs(now - theirs) > CLOCK_LEEWAY_SECONDS:
        want = f"at most {CLOCK_LEEWAY_SECONDS}; if yours is right, name the end as a Unix time (--expires)"
        raise TermsUnacceptable(what="difference of clocks in seconds", got=int(now - theirs), want=want)


def _network(terms: ChannelTerms, address: str, wanted: Network | None) -> Network:
    """Derive the network from the server's address.

    Regtest addresses look like test ones, so regtest must be requested.
    """
    for network in (Network.LIVE, wanted if wanted is Network.REGTEST else Network.TEST):
        if terms.funding_address(network) == address:
            if wanted not in (None, network):
                raise TermsUnacceptable(what="network", got=network.value, want=wanted.value)
            return network
    want = terms.funding_address(wanted or Network.TEST)
    raise ServerMisbehaved(what="funding address", got=address[:40], want=want)
