"""`paychan wallet` without a further command: channels, and the sums that were spent for requests by host and day."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from paychan.cli.payer.terminal import facts, problem_facts, show_listing
from paychan.cli.payer.wallet_budget import budget_json, left_sat, show_budget
from paychan.cli.terminal import say, show_facts, show_json, show_table
from paychan.client.paying.account import DAY_SECONDS, Account, Declination, Paid
from paychan.client.paying.receipts import paid_requests
from paychan.client.paying.spending import SpendingLog
from paychan.client.paying.walletbudget import read_wallet_budget
from paychan.client.transport.answers import printable
from paychan.client.wallet import Wallet
from paychan.shared.layout import Column
from paychan.shared.wording import moment, sat

DAYS = 30
"""Newest days that the table shows; --json has all."""


def show_wallet(directory: Path | None, as_json: bool) -> bool:
    """Show the wallet; return whether all its channels can be read."""
    wallet = Wallet(directory)
    records, problems = wallet.read_all()
    log, budget = SpendingLog(wallet.directory), read_wallet_budget(wallet.directory)
    account = log.account() if log.path.exists() else Account()
    declined = [line for line in log.lines() if isinstance(line, Declination)] if log.path.exists() else []
    if as_json:
        channels = [facts(record) for record in records]
        broken = [problem_facts(name, error) for name, error in problems.items()]
        show_json(
            {
                "directory": str(wallet.directory),
                "channels": channels + broken,
                "budget": budget_json(budget, account),
                "spending": _spending(account, declined),
            }
        )
        return not problems
    show_listing(records, problems, as_json=False)
    if budget:
        show_budget(budget, account)
    if account.by_host or declined:
        _show_spending(account, declined, budget.per_host)
    return not problems


def show_receipts(directory: Path | None, as_json: bool) -> None:
    """Show the paid requests, the oldest first; --json has their receipts as received."""
    log = SpendingLog(Wallet(directory).directory)
    found = list(paid_requests(log.lines())) if log.path.exists() else []
    if as_json:
        show_json([to_builtins(each) for each in found])
    elif not found:
        say("No paid requests yet. `paychan pay URL` makes one.")
    else:
        numbers = Column("Price", is_number=True), Column("Charged", is_number=True)
        rows = [
            (
                moment(each.at),
                f"{each.method} {printable(each.url)}",
                str(each.status),
                sat(each.price_sat),
                sat(each.charged_sat),
                "yes" if each.receipt else "none",
            )
            for each in found
        ]
        show_table((Column("Time"), Column("Request"), Column("Status"), *numbers, Column("Receipt")), rows)


def _spending(account: Account, declined: list[Declination]) -> dict[str, Any]:
    days = sorted(account.by_day.items())
    return {
        "total_sat": account.total_sat,
        "by_host": [{"host": host, "spent_sat": spent} for host, spent in _largest(account.by_host)],
        "by_day": [
            {"day": _day(day), "host": host, "spent_sat": spent}
            for day, hosts in days
            for host, spent in _largest(hosts)
        ],
        "unanswered": [
            {"method": each.method, "url": each.url, "price_sat": each.price_sat, "at": each.at}
            for each in account.open.values()
        ],
        "declined": [
            {
                "at": each.at,
                "host": each.host,
                "method": each.method,
                "url": each.url,
                "price_sat": each.price_sat,
                "code": each.code,
                "reason": each.reason,
            }
            for each in declined
        ],
    }


def _show_spending(account: Account, declined: list[Declination], per_host_sat: int | None) -> None:
    amount = Column("Spent", is_number=True)
    today = int(time.time()) // DAY_SECONDS
    day_sat = sum(sum(hosts.values()) for day, hosts in account.by_day.items() if day >= today)
    show_facts(
        "Spent for requests",
        ("In all", sat(account.total_sat)),
        ("Today (UTC)", sat(day_sat)),
        ("Without answer", _open(list(account.open.values()))),
        ("Declined", f"{len(declined)}, the last: {printable(declined[-1].reason)}" if declined else ""),
    )
    if account.by_host:
        left = () if per_host_sat is None else (Column("Left", is_number=True),)
        hosts = [
            (printable(host), sat(spent), *(sat(left_sat(per_host_sat, spent) or 0) for _ in left))
            for host, spent in _largest(account.by_host)
        ]
        show_table((Column("Host"), amount, *left), hosts)
    newest = sorted(account.by_day.items(), reverse=True)[:DAYS]
    rows = [(_day(day), printable(host), sat(spent)) for day, hosts in newest for host, spent in _largest(hosts)]
    if rows:
        show_table((Column("Day (UTC)"), Column("Host"), amount), rows)
    if len(account.by_day) > DAYS:
        say(f"{len(account.by_day) - DAYS} earlier days: `paychan wallet --json` has all.")


def _open(requests: list[Paid]) -> str:
    """Name the requests that were paid for and have no good answer yet."""
    if not requests:
        return ""
    last = requests[-1]
    return f"{len(requests)}, the last: {last.method} {printable(last.url)}. The same request again costs nothing more"


def _largest(sums: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(sums.items(), key=lambda each: (-each[1], each[0]))


def _day(number: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(number * DAY_SECONDS))
