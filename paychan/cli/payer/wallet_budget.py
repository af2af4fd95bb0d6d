"""`paychan wallet budget`: the limits of a wallet, which hold for all its programs, and the rest of each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

from paychan.cli.terminal import fail, say, show_facts, show_json
from paychan.client.paying.account import Account
from paychan.client.paying.spending import SpendingLog
from paychan.client.paying.walletbudget import LIMITS, WalletBudget, read_wallet_budget, write_wallet_budget
from paychan.client.transport.answers import printable
from paychan.client.wallet import Wallet
from paychan.shared.wording import sat


def set_budget(
    directory: Path | None, changes: dict[str, int | None], hosts: list[str], as_json: bool, *, anew: bool
) -> None:
    """Write the limits that are given, and show all. `anew` takes away those that are not given."""
    wallet = Wallet(directory)
    budget = WalletBudget() if anew else read_wallet_budget(wallet.directory)
    given: dict[str, Any] = {name: limit for name, limit in changes.items() if limit is not None}
    if hosts:
        given["hosts"] = tuple(hosts)
    if given or anew:
        budget = msgspec.structs.replace(budget, **given)
        try:
            write_wallet_budget(wallet.directory, budget)
        except ValueError as error:
            fail(str(error), 2)
    log = SpendingLog(wallet.directory)
    account = log.account() if log.path.exists() else Account()
    if as_json:
        show_json({"directory": str(wallet.directory), **budget_json(budget, account)})
    elif budget:
        show_budget(budget, account)
    else:
        say("This wallet has no limits of its own: `paychan wallet budget --per-day SAT` sets one.")


def budget_json(budget: WalletBudget, account: Account) -> dict[str, Any]:
    """Return limits and the rest of each, in satoshi; None is no limit."""
    limits = {f"{name}_sat": getattr(budget, name) for name in LIMITS}
    return {
        **limits,
        "hosts": None if budget.hosts is None else list(budget.hosts),
        "left_per_day_sat": left_sat(budget.per_day, _day_sat(account)),
        "left_total_sat": left_sat(budget.total, account.total_sat),
        "left_by_host": [
            {"host": host, "left_sat": left_sat(budget.per_host, spent)} for host, spent in account.by_host.items()
        ],
    }


def show_budget(budget: WalletBudget, account: Account) -> None:
    """Show limits and the rests; the rest for each host stands beside its sum in `paychan wallet`."""
    show_facts(
        "Budget of the wallet",
        ("A request", _limit(budget.per_request)),
        ("A host", _limit(budget.per_host)),
        ("A day (UTC)", _limit(budget.per_day, _day_sat(account))),
        ("In all", _limit(budget.total, account.total_sat)),
        ("Hosts", "" if budget.hosts is None else ", ".join(printable(host) for host in budget.hosts)),
    )


def left_sat(limit_sat: int | None, spent_sat: int) -> int | None:
    """Return the rest of a limit; None without one."""
    return None if limit_sat is None else max(0, limit_sat - spent_sat)


def _limit(limit_sat: int | None, spent_sat: int | None = None) -> str:
    if limit_sat is None:
        return ""
    left = "" if spent_sat is None else f", {sat(left_sat(limit_sat, spent_sat) or 0)} left"
    return f"at most {sat(limit_sat)}{left}"


def _day_sat(account: Account) -> int:
    return account.sums("", int(time.time())).day_sat
