"""The wallet's own budget: limits in the wallet's directory that hold for all its programs, beside the budget of each.

`paychan wallet budget` writes it. It is read before each payment, under the lock of the spending log, so a change holds
from the next payment on. A file that can't be read stops all paying for requests.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from paychan.client.errors import DamagedFile, Declined, LaterFile, OverBudget
from paychan.client.files import read_private, write_private
from paychan.client.paying.budget import Budget, Sums
from paychan.protocol.types import MAX_MONEY_SAT

NAME = "budget"
"""Name of the file: without an end, since each `.json` in the directory is a channel."""

LIMITS = ("per_request", "per_host", "per_day", "total")


class WalletBudget(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits as for `Budget`; None is no limit. One without any limit is false."""

    format: Literal[1] = 1
    per_request: int | None = None
    per_host: int | None = None
    per_day: int | None = None
    total: int | None = None
    hosts: tuple[str, ...] | None = None

    def __bool__(self) -> bool:
        return self != WalletBudget()

    def budget(self) -> Budget | None:
        """Return the limits as a budget; None without any. Raises as `Budget`."""
        if not self:
            return None
        total = MAX_MONEY_SAT if self.total is None else self.total
        return Budget(self.per_request, self.per_host, self.per_day, total, hosts=self.hosts)

    def problem(self, host: str, price_sat: int, spent: Sums, paid_before_sat: int = 0) -> Declined | None:
        """Return why these limits do not cover a request, or None; as `Budget.problem`."""
        budget = self.budget()
        found = None if budget is None else budget.problem(host, price_sat, spent, paid_before_sat)
        if isinstance(found, OverBudget):
            return OverBudget(**{**found.fields, "limit": "wallet_" + found.fields["limit"]})
        return found


def read_wallet_budget(directory: Path) -> WalletBudget:
    """Read the limits of a wallet; without a file there are none.

    Raises:
        DamagedFile, LaterFile, LooseMode, UnreadableFile: nothing may be paid.
    """
    path = directory / NAME
    if not os.path.lexists(path):
        return WalletBudget()
    try:
        found = msgspec.json.decode(read_private(path), type=WalletBudget)
        found.budget()
    except (msgspec.MsgspecError, ValueError, TypeError, Declined, RecursionError) as error:
        later = "unknown field" in str(error) or "$.format" in str(error)
        raise (LaterFile if later else DamagedFile)(path=path, reason=error) from None
    return found


def write_wallet_budget(directory: Path, budget: WalletBudget) -> None:
    """Replace the limits of a wallet, durably.

    Raises:
        WrongNumber, TermsUnacceptable, ValueError: a limit is no amount, or a host is none; the file stays as it was.
    """
    budget.budget()
    write_private(directory / NAME, msgspec.json.format(msgspec.json.encode(budget)) + b"\n")
