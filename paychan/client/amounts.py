"""Check the numbers that a program gives the library, before anything is signed, written or sent."""

from __future__ import annotations

import math
import operator
from numbers import Real

from paychan.client.errors import TermsUnacceptable, WrongNumber
from paychan.protocol.types import MAX_MONEY_SAT, Sat

MAX_HOURS = 2**32 // 3600
"""No expiry is later than nLockTime can express, 32 bits of seconds."""


def whole(value: object, what: str) -> int:
    """Return a whole number as an `int`: an `int`, or what Python takes as an index, such as an integer of numpy.

    Raises:
        WrongNumber: anything else, such as a bool, a float (also 3.0), a `Decimal`, a text or None.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise WrongNumber(what=what, got=repr(value)[:40], want="a whole number (int)")


def satoshi(value: object, what: str) -> Sat:
    """Return an amount that an output can hold.

    Raises:
        WrongNumber: not a whole number.
        TermsUnacceptable: below 0, or more than all bitcoins.
    """
    amount = whole(value, what)
    if not 0 <= amount <= MAX_MONEY_SAT:
        raise TermsUnacceptable(what=f"{what} in satoshi", got=amount, want=f"0 to {MAX_MONEY_SAT:,}")
    return Sat(amount)


def hours_of_paying(value: object) -> float:
    """Return a time in hours, which may have a fraction.

    Raises:
        WrongNumber: not a real number, such as a bool, a `Decimal`, a text or None.
        TermsUnacceptable: negative, longer than a channel can last, infinite, or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise WrongNumber(what="hours", got=repr(value)[:40], want="a number (int or float)")
    try:
        hours = float(value)
    except OverflowError:
        hours = math.inf
    if not 0 <= hours <= MAX_HOURS:
        raise TermsUnacceptable(what="hours of paying", got=f"{hours:,g}", want=f"0 to {MAX_HOURS:,}")
    return hours
