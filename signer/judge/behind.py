"""Facts that the ledger has and a server with a store from an old backup may not have."""

from __future__ import annotations

from collections.abc import Sequence

from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, UnixTime
from paychan.protocol.wire.signer_messages import Newest
from signer.ledger.base import Ledger
from signer.ledger.entries import DamagedEntry, Signed

_PAGE = 500
"""Channels read for one reply, some milliseconds of work."""


def behind(payments: Sequence[Newest], ledger: Ledger) -> tuple[OutPoint, ...]:
    """Return the channels that were signed for, or whose newer payment was shown. Raises `LedgerFailed`."""
    return tuple(payment.outpoint for payment in payments if _is_behind(payment, ledger))


def _is_behind(payment: Newest, ledger: Ledger) -> bool:
    """Compare one payment; an unreadable entry counts as signed for."""
    outpoint = payment.outpoint
    try:
        shown = ledger.newest([outpoint]).get(outpoint)
        return bool(ledger.read([outpoint])) or (shown is not None and shown.payment.change_sat < payment.change_sat)
    except DamagedEntry:
        return True


def shown(
    expires_after: UnixTime, after: OutPoint | None, ledger: Ledger
) -> tuple[tuple[OutPoint, ...], OutPoint | None]:
    """Return a page of the channels that were shown and expire later, and where the next page begins, if there is one.

    Raises:
        LedgerFailed: the ledger can't be read.
    """
    page = ledger.shown_after(after, _PAGE)
    outpoints = tuple(
        outpoint for outpoint, claim in page if claim is None or claim.terms.expiry.lock_time > expires_after
    )
    return outpoints, page[-1][0] if len(page) == _PAGE else None


def newer_than_signed(outpoint: OutPoint, signed: Signed | None, ledger: Ledger) -> Claim | None:
    """Return the newest claim that was shown, if it leaves the client less than the signed settlement does."""
    shown = ledger.newest([outpoint]).get(outpoint)
    return shown if shown and (signed is None or shown.payment.change_sat < signed.change_sat) else None
