"""What a payer agrees to: the server's terms, judged before there is an address to pay to.

The script is rebuilt from the server's key, the payer's key and the expiry; the address that the server names must
follow from it, and is only compared.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Struct

from paychan.client.errors import ServerMisbehaved, TermsUnacceptable
from paychan.protocol.errors import KeyReuse, Malformed
from paychan.protocol.rest import FundingInfo
from paychan.protocol.scripts import ChannelTerms, make_terms, parse_public_key
from paychan.protocol.types import Network, Sat, UnixTime

HOUR = 3600

DUST_SAT = Sat(700)
"""Least change that v1 servers accept; they don't tell (PROTOCOL §7.1). More than any relay limit for P2PKH."""


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
        ServerMisbehaved: not the JSON object of PROTOCOL §5.1 and §6.1.
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
    dust = DUST_SAT if info.dust_limit is UNSET else max(DUST_SAT, info.dust_limit)
    for what, got, limit in (
        ("open price in satoshi", info.open_price, limits.open_price_sat),
        ("dust limit in satoshi", dust, limits.dust_sat),
        ("number of confirmations", info.funding_tx_min_conf, limits.min_confirmations),
        ("settlement period in hours", info.settlement_period_hours, limits.settlement_period_hours),
    ):
        if not 0 <= got <= limit:
            raise TermsUnacceptable(what=what, got=got, want=f"0 to {limit}")
    _check_duration(info, expiry, now)
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


def _check_duration(info: FundingInfo, expiry: UnixTime, now: UnixTime) -> None:
    """PROTOCOL §7.2: later than settlement period and minimum duration from now; v1 does not tell the latter."""
    least = 0 if info.min_duration_hours is UNSET else info.min_duration_hours
    need = info.settlement_period_hours + least
    if expiry - now <= need * HOUR:
        raise TermsUnacceptable(what="hours until expiry", got=(expiry - now) // HOUR, want=f"more than {need}")


def _network(terms: ChannelTerms, address: str, wanted: Network | None) -> Network:
    """Tell the network from the server's address; regtest looks like test, so it must be asked for."""
    for network in (Network.LIVE, wanted if wanted is Network.REGTEST else Network.TEST):
        if terms.funding_address(network) == address:
            if wanted not in (None, network):
                raise TermsUnacceptable(what="network", got=network.value, want=wanted.value)
            return network
    want = terms.funding_address(wanted or Network.TEST)
    raise ServerMisbehaved(what="funding address", got=address[:40], want=want)
