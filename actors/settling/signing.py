"""Requests to the signer for settlements: the rate, the destination, and the meaning of a refusal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import structlog

from actors.context import Context
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Accepted, Adopt, Channel, Rules
from paychan.protocol.errors import NotEconomical, SignerUnavailable, SigningFailed
from paychan.protocol.fees import Shortfall, is_starved, most_sat, plan_closing, plan_reserve_fee, pressed, wanted_rate
from paychan.protocol.settlement import (
    CHILD_BYTES,
    Claim,
    Coin,
    Reserve,
    Settlement,
    outpoints_of,
    received_sat,
    settlement_size,
)
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Sat
from paychan.protocol.wire.signer_messages import Newest
from paychan.signer_client.base import OUTDATED, TOO_DEAR, SignerAbsent, SignerRefused, news, sign_for_no_less

log = structlog.get_logger("signing")


class Newer(Exception):
    """The signer refuses the record's claim, because it has signed a newer one; the channel must adopt that first."""

    def __init__(self, adopt: Adopt) -> None:
        super().__init__(str(adopt.claim.outpoint))
        self.adopt = adopt


async def newest_claim(channel: Channel, context: Context) -> Adopt | None:
    """Ask the signer for its claim of a closing channel: the record may be from a backup, or a crash lost a reply.

    None if the signer has no claim, or none that changes the record.

    Raises:
        SignerUnavailable, SigningFailed: the signer gives no answer.
    """
    with _signer_errors():
        found = await news(context.signer, [Newest(channel.outpoint, channel.payment.change_sat)])
    view = context.view(channel.outpoint)
    return next((each for each in found if apply(channel, each, view) != Accepted(channel)), None)


async def is_signed(channel: Channel, context: Context) -> bool:
    """Ask whether the signer has signed anything for a channel. Raises `SignerUnavailable`, `SigningFailed`.

    A signed settlement may have been broadcast, even if the signer's reply was lost; a refused one was not.
    """
    with _signer_errors():
        return bool(await context.signer.behind([Newest(channel.outpoint, Sat(0))]))


def rate_of(members: Sequence[Channel], context: Context) -> int:
    """Rate for these channels together, in satoshi per virtual byte: the highest that one of them needs."""
    return max(wanted_rate(member, context.rules, context.paying_time(), context.chain_view.fees) for member in members)


def rules_of(members: Sequence[Channel], context: Context) -> Rules:
    """Rules for settling these channels now, see `fees.pressed`."""
    return pressed(context.rules, members, context.paying_time(), context.chain_view.fees)


async def destination_of(channel: Channel, context: Context) -> bytes:
    """Return the script to which a settlement pays the server. Raises `SignerUnavailable`, `SigningFailed`."""
    terms = channel.terms
    with _signer_errors():
        return (await context.signer.public_key(terms.client_key, terms.expiry, settling=True)).destination_script


async def sign(members: Sequence[Channel], context: Context, least_sat: Sat = Sat(0)) -> Settlement:
    """Have one settlement of these channels signed, at their rate, but with a fee of at least `least_sat`.

    If the signer allows only a lower fee, the settlement pays that. The two may differ: past the deadline the server
    pays more than the share (`fees.pressed`), but the signer only from six hours before expiry, by its own clock and
    limits.

    Raises:
        SignerUnavailable, SigningFailed: the signer is away, or refuses.
        NotEconomical: the channels received less than the cheapest settlement costs.
        Newer: the signer has signed a newer claim of the single channel.
    """
    rate, rules, claims = rate_of(members, context), rules_of(members, context), [member.claim for member in members]
    with _signer_errors():
        script = await destination_of(members[0], context)
        plan = plan_closing(members, script, rules, rate)
        if isinstance(plan, Shortfall):
            raise NotEconomical(got_sat=plan.received_sat, need_sat=plan.needed_sat)
        fee = max(plan, least_sat)
        if is_starved(claims, script, fee, rate, rules):
            funded = await fund_from_reserve(members, rate, context, least_sat)
            if funded is not None:
                return funded
        try:
            return await _sign(claims, script, fee, rules, context, least_sat)
        except SignerRefused as error:
            if error.tag != OUTDATED or len(claims) > 1:
                raise
            raise Newer(await context.signer.sign_again(claims[0].outpoint)) from error


async def fund_from_reserve(
    members: Sequence[Channel], rate_sat_per_vb: int, context: Context, least_sat: Sat
) -> Settlement | None:
    """Sign with the smallest sufficient coin of the reserve; None if there is none. Raises as `sign`."""
    claims, rules = [member.claim for member in members], rules_of(members, context)
    with _signer_errors():
        key = await context.signer.reserve_key()
        try:
            coins = await context.chain.funding(Reserve(key))
        except ChainFailed:
            return None
        for coin in sorted((coin for coin in coins if coin.confirmations), key=lambda coin: coin.value_sat):
            reserve = Reserve(key, (Coin(coin.outpoint, coin.value_sat),))
            fee, script = plan_reserve_fee(claims, reserve, rate_sat_per_vb, rules), reserve.funding_script
            if fee is not None and fee >= least_sat:
                return await _sign(claims, script, fee, rules, context, least_sat, reserve)
    return None


async def sign_child(members: Sequence[Channel], paid: Settlement, fee_sat: Sat, context: Context) -> Settlement:
    """Have a child of these channels' settlement signed for this fee.

    If the signer allows only a lower fee, the child pays that, provided it still raises the rate of its parent.

    Raises:
        SignerRefused, SignerAbsent, SignerUnavailable, SigningFailed: no child was signed.
    """
    claims, script = [member.claim for member in members], await destination_of(members[0], context)
    try:
        child = await context.signer.sign_child(claims, script, paid.fee_sat, fee_sat)
    except SignerRefused as error:
        lifts = error.need_sat * paid.size > paid.fee_sat * CHILD_BYTES
        if error.tag != TOO_DEAR or not lifts or error.need_sat >= fee_sat:
            raise
        child = await context.signer.sign_child(claims, script, paid.fee_sat, error.need_sat)
    if {outpoint.txid for outpoint in outpoints_of(child.transaction)} != {paid.txid}:
        tag, reason = "policy-template", "the signer made a child of another transaction"
        raise SignerRefused(tag, reason)
    return child


async def _sign(
    claims: Sequence[Claim],
    script: bytes,
    fee: Sat,
    rules: Rules,
    context: Context,
    least_sat: Sat,
    reserve: Reserve | None = None,
) -> Settlement:
    """Sign for this fee, or for the highest that the signer allows, if it is at least `least_sat` and no dust remains."""
    most = most_sat(claims, settlement_size(claims, script), rules, script)

    async def signed(fee_sat: Sat) -> Settlement:
        return await sign_for_no_less(context.signer, claims, script, fee_sat, most, reserve, context.chain.transaction)

    try:
        return await signed(fee)
    except SignerRefused as error:
        allowed, left = error.need_sat, received_sat(claims) - error.need_sat
        if error.tag != TOO_DEAR or not max(least_sat, 1) <= allowed < fee or (left < rules.dust_sat and not reserve):
            raise
        log.warning("the signer allows a lower fee", channel=str(claims[0].outpoint), fee_sat=fee, allowed_sat=allowed)
        return await signed(allowed)


@contextlib.contextmanager
def _signer_errors() -> Iterator[None]:
    try:
        yield
    except SignerAbsent as error:
        raise SignerUnavailable(reason=str(error)) from error
    except SignerRefused as error:
        raise SigningFailed(reason=str(error)) from error
    except ChainFailed as error:
        raise SigningFailed(reason=f"the signer must see the spent transaction: {error}") from error
