"""Requests to the signer for settlements, and the meaning of its refusals: for the server and `settle --offline`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import structlog

from actors.context import Context
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Accepted, Adopt, Channel
from paychan.protocol.errors import SignerUnavailable, SigningFailed
from paychan.protocol.fees import most_sat
from paychan.protocol.settlement import Reserve, Settlement, outpoints_of, settlement_size
from paychan.protocol.settlement_plan import ChildPays, Conditions, Sign, lowered, lowered_child
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Sat
from paychan.protocol.wire.signer_messages import Newest
from paychan.signer_client.base import (
    OUTDATED,
    TOO_DEAR,
    Signer,
    SignerAbsent,
    SignerRefused,
    Transactions,
    news,
    sign_for_no_less,
)

log = structlog.get_logger("signing")


class Newer(Exception):
    """The signer refuses the record's claim, because it has signed a newer one; the channel must adopt that first."""

    def __init__(self, adopt: Adopt) -> None:
        super().__init__(str(adopt.claim.outpoint))
        self.adopt = adopt


def conditions_of(context: Context) -> Conditions:
    """Return the conditions by which the server plans settlements now."""
    return Conditions(context.rules, context.paying_time(), context.chain_view.fees)


# --- requests -------------------------------------------------------------------------------------------------------


async def destination_of(channel: Channel, signer: Signer) -> bytes:
    """Return the script to which a settlement pays the server. Raises `SignerRefused`, `SignerAbsent`."""
    terms = channel.terms
    return (await signer.public_key(terms.client_key, terms.expiry.unix_time, settling=True)).destination_script


async def sign(
    attempt: Sign,
    members: Sequence[Channel],
    destination_script: bytes,
    conditions: Conditions,
    signer: Signer,
    transactions: Transactions | None,
    reserve: Reserve | None = None,
) -> Settlement:
    """Have a settlement signed for the fee of the attempt, or for the highest that the signer allows.

    Raises:
        SignerRefused, SignerAbsent, ChainFailed: see `sign_for_no_less`.
    """
    claims, rules = [member.claim for member in members], conditions.rules_for(members)
    most = most_sat(claims, settlement_size(claims, destination_script), rules, destination_script)

    async def signed(fee_sat: Sat) -> Settlement:
        return await sign_for_no_less(signer, claims, destination_script, fee_sat, most, reserve, transactions)

    try:
        return await signed(attempt.fee_sat)
    except SignerRefused as error:
        allowed = lowered(attempt, error.need_sat, claims, rules, is_funded=reserve is not None)
        if error.tag != TOO_DEAR or allowed is None:
            raise
    log.warning(
        "the signer allows a lower fee",
        channel=str(claims[0].outpoint),
        fee_sat=attempt.fee_sat,
        allowed_sat=allowed.fee_sat,
    )
    return await signed(allowed.fee_sat)


async def sign_child(attempt: ChildPays, members: Sequence[Channel], paid: Settlement, signer: Signer) -> Settlement:
    """Have a child of these channels' settlement signed for the fee of the attempt, or for what the signer allows.

    Raises:
        SignerRefused, SignerAbsent: no child was signed.
    """
    claims, script = [member.claim for member in members], await destination_of(members[0], signer)
    try:
        child = await signer.sign_child(claims, script, paid.fee_sat, attempt.fee_sat)
    except SignerRefused as error:
        allowed = lowered_child(attempt, error.need_sat, paid)
        if error.tag != TOO_DEAR or allowed is None:
            raise
        child = await signer.sign_child(claims, script, paid.fee_sat, allowed.fee_sat)
    if {outpoint.txid for outpoint in outpoints_of(child.transaction)} != {paid.txid}:
        tag, reason = "policy-template", "the signer made a child of another transaction"
        raise SignerRefused(tag, reason)
    return child


# --- what the signer has signed before ------------------------------------------------------------------------------


async def newest_claim(channel: Channel, context: Context) -> Adopt | None:
    """Ask the signer for its claim of a closing channel: the record may be from a backup, or a crash lost a reply.

    None if the signer has no claim, or none that changes the record.

    Raises:
        SignerUnavailable, SigningFailed: the signer gives no answer.
    """
    with signer_errors():
        found = await news(context.signer, [Newest(channel.outpoint, channel.payment.change_sat)])
    view = context.view(channel.outpoint)
    return next((each for each in found if apply(channel, each, view) != Accepted(channel)), None)


async def is_signed(channel: Channel, context: Context) -> bool:
    """Ask whether the signer has signed anything for a channel. Raises `SignerUnavailable`, `SigningFailed`.

    A signed settlement may have been broadcast, even if the signer's reply was lost; a refused one was not.
    """
    with signer_errors():
        return bool(await context.signer.behind([Newest(channel.outpoint, Sat(0))]))


async def newer_claim(refusal: SignerRefused, members: Sequence[Channel], signer: Signer) -> Newer | None:
    """Return the claim that the signer has signed, if it refused because that is newer than the channel's record."""
    if refusal.tag != OUTDATED or len(members) > 1:
        return None
    return Newer(await signer.sign_again(members[0].outpoint))


@contextlib.contextmanager
def signer_errors() -> Iterator[None]:
    """Turn failures of signer and chain into the errors of a settlement that waits."""
    try:
        yield
    except SignerAbsent as error:
        raise SignerUnavailable(reason=str(error)) from error
    except SignerRefused as error:
        raise SigningFailed(reason=str(error)) from error
    except ChainFailed as error:
        raise SigningFailed(reason=f"the signer must see the spent transaction: {error}") from error
