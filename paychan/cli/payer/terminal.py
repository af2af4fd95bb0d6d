"""Output of the payer's commands: panels and tables for people, one JSON value for programs, errors with a next step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import msgspec
import typer

from paychan.chain.base import ChainFailed
from paychan.cli.payer.advice import advice
from paychan.cli.terminal import command, completed, fail, say, show_facts, show_json, show_table, warn
from paychan.client import (
    Channel,
    ChannelRecord,
    ClientError,
    CountedLess,
    Receipt,
    ServerFailed,
    Source,
    State,
    Unreachable,
)
from paychan.client.flows.forget import is_debug
from paychan.client.transport.answers import printable
from paychan.protocol.errors import PaychanError
from paychan.shared.layout import Cell, Column
from paychan.shared.wording import grouped, moment, relative, sat

Facts: TypeAlias = dict[str, Any]


COUNTED_STATUS = 3
"""Exit status after a payment that counted, but less of it than was paid."""

_CODES: dict[type[Exception], str] = {ValueError: "wrong_value", KeyError: "wrong_value"}
"""Codes of failures that have none of their own."""

_EXAMPLE_SAT = 1000
"""Amount of a payment in the command for the next step."""


@contextmanager
def exit_on_error(as_json: bool, name: str = "", *, again: str = "") -> Iterator[None]:
    """End the command after a failure with a sentence and the next step, or with JSON; exit status 1.

    `again` is the command to repeat if the server was unreachable.
    """
    try:
        yield
    except (ClientError, PaychanError, ChainFailed, ValueError, OSError) as error:
        if as_json:
            show_json(({"name": name} if name else {}) | problem(error))
            raise typer.Exit(_status(error)) from None
        step = advice(error, name)
        if isinstance(error, Unreachable | ServerFailed) and again:
            step = f"`{again}` continues, and pays once."
        sentence = str(error).rstrip(".")
        stop = "" if sentence.endswith("?") else "."
        fail(f"{sentence}{stop} {step}".strip(), _status(error))


def _status(error: Exception) -> int:
    """Exit status of a failure: a payment that counted must not be repeated, as one that failed may be."""
    return COUNTED_STATUS if isinstance(error, CountedLess) else 1


def problem(error: Exception) -> Facts:
    """The JSON of a failure. `payment_counted` says that the server took the payment all the same."""
    code = getattr(error, "code", "") or _CODES.get(type(error), "failed")
    counted = {"payment_counted": True} if isinstance(error, CountedLess) else {}
    return {"code": code, "error": grouped(str(error)), **getattr(error, "fields", {}), **counted}


def problem_facts(name: str, error: Exception) -> Facts:
    """The JSON of a failure of one of several channels."""
    return {"name": name, **problem(error)}


def facts(record: ChannelRecord) -> dict[str, Any]:
    """The JSON of a channel: everything but the private key and the secret."""
    shown: dict[str, Any] = msgspec.to_builtins(record)
    del shown["private_key"], shown["secret"]
    return shown | {
        "debug": is_debug(record),
        "standing": standing(record),
        "paid_sat": paid_sat(record),
        "pending_sat": record.pending_sat,
        "left_sat": left_sat(record),
        "min_funding_sat": record.min_funding_sat,
        "deposits_sat": sum(each.value_sat for each in record.deposits),
        "way_back": way_back(record),
    }


def paid_sat(record: ChannelRecord) -> int:
    """The sum of the payments that the server acknowledged; `pending_sat` of the record are signed beyond it."""
    return record.paid_sat - record.pending_sat


def left_sat(record: ChannelRecord) -> int:
    """The amount that the channel can still pay or give back; 0 once it has ended."""
    return 0 if record.ended else record.left_sat


def standing(record: ChannelRecord) -> str:
    """The state of a channel in a few words."""
    if not record.ended and time.time() >= record.expiry:
        return "expired" if record.funding_outpoint else "expired, never funded"
    if record.state is State.NEW and record.signed_sat is None:
        return "funded" if record.funding_outpoint else "waits for funding"
    if record.state is State.NEW:
        return "opening"
    if record.state is State.OPEN and record.unacknowledged:
        return "open, last payment " + ("refused" if record.refused else "unanswered")
    return str(record.state.value)


def unchecked(record: ChannelRecord) -> str:
    """Warn that the funding's value was never checked; "" if it was, or if no coins are at stake any more."""
    if record.ended or not record.funding_outpoint or record.funding_source.checked:
        return ""
    return f"{sat(record.funding_sat)} funded is {record.funding_source.words}; any value beyond that could be lost"


def way_back(record: ChannelRecord) -> str:
    """The time and the command by which the outputs at the channel's address come back; "" if none are known, or debug mode has them."""
    if not record.held or is_debug(record):
        return ""
    when = "now" if time.time() >= record.expiry else f"after {moment(record.expiry)}"
    return completed(
        f"{when} by `paychan channel refund {record.name} --publish --node URL --credentials COOKIE`, or with --electrum URL"
    )


def next_step(record: ChannelRecord) -> Cell:
    """The command for the channel's next step; "" if there is none."""
    name = record.name
    if not record.ended and time.time() >= record.expiry:
        return command("channel", "refund", name) if record.held and not is_debug(record) else ""
    if record.state is State.NEW:
        return command("channel", "open", name)
    if record.state is State.OPEN:
        if record.unacknowledged:
            return command("channel", "pay", name, "--resume")
        enough = record.left_sat >= _EXAMPLE_SAT + record.dust_sat
        return command("channel", "pay", name, _EXAMPLE_SAT) if enough else command("channel", "close", name)
    return command("channel", "status", name) if record.state is State.CLOSING else ""


def show(record: ChannelRecord, as_json: bool) -> None:
    """Show one channel."""
    if as_json:
        show_json(facts(record))
        return
    awaits_coins = record.state is State.NEW and record.funding_source is not Source.DEBUG
    show_panel(
        f"Channel {record.name}",
        ("State", standing(record)),
        ("Opening", opening(record).removeprefix("Opening ") if record.state is State.NEW else ""),
        ("Confirmed", f"{record.min_confirmations} times, before the server accepts it" * awaits_coins),
        (
            "Payments end",
            moment(record.expiry - 3600 * record.settlement_period_hours) if record.state is State.NEW else "",
        ),
        ("Paid", sat(paid_sat(record))),
        ("Pending", _pending(record)),
        ("Left", sat(left_sat(record))),
        ("Funded", f"{sat(record.funding_sat)} in {record.funding_outpoint}" if record.funding_outpoint else ""),
        ("Value", record.funding_source.words if record.funding_outpoint else ""),
        *(("Also there", f"{sat(each.value_sat)} in {each.outpoint}: {each.source.words}") for each in record.deposits),
        ("Bring home", way_back(record) if record.deposits else ""),
        ("Address", record.funding_address),
        ("Moved", _times(len(record.moves))),
        ("Change to", change_address(record)),
        ("Expires", moment(record.expiry)),
        ("Settled by", record.settlement_txid),
        ("Server", f"{record.url} (RBPCP v{record.version})"),
        ("Next", next_step(record)),
    )


def show_receipt(channel: Channel, receipt: Receipt, as_json: bool, *, payments: int = 1, seconds: float = 0.0) -> None:
    """Show the result of a payment, or of the last of many."""
    if as_json:
        more = {"seconds": seconds} if seconds else {}
        show_json({"name": channel.name, "payments": payments, **msgspec.to_builtins(receipt), **more})
        return
    paid = sat(receipt.paid_sat) + (" (the server already had it)" if receipt.repeated else "")
    show_panel(
        f"Channel {channel.name}",
        ("Earlier", _earlier(receipt)),
        ("Paid", paid if payments == 1 else f"{payments:,} times {paid}, {payments / seconds:,.0f} payments/s"),
        ("In all", sat(receipt.total_paid_sat)),
        ("Left", sat(receipt.left_sat)),
        ("Restored", _restored(receipt)),
        (
            "Taken over",
            f"{sat(receipt.taken_over_sat)} that another copy of this wallet paid" * (receipt.taken_over_sat > 0),
        ),
        ("Value", unchecked(channel.record)),
        ("Answer", receipt.application_data),
        ("Settled by", receipt.settlement_txid),
        ("Next", next_step(channel.record) if channel.record.paid_sat == receipt.paid_sat else ""),
    )


def opening(record: ChannelRecord, amount_sat: int | None = None) -> str:
    """The price of the opening, said before it is paid."""
    amount = record.pending_sat or (record.open_price_sat if amount_sat is None else amount_sat)
    held = f" of {sat(record.funding_sat)}" if record.funding_outpoint else ""
    return f"Opening pays {sat(amount)}{held} to {record.url}"


def _pending(record: ChannelRecord) -> str:
    """The signed payments that the server has not acknowledged; "" without any."""
    if not record.pending_sat:
        return ""
    return f"{sat(record.pending_sat)} signed, but {'refused' if record.refused else 'not answered yet'}; the server may use it"


def _earlier(receipt: Receipt) -> str:
    """Name the earlier payment that was finished before this one; "" if there was none."""
    if receipt.earlier is None:
        return ""
    answer = receipt.earlier.application_data
    return f"{sat(receipt.earlier.paid_sat)}, which had no answer, were finished first" + (
        f": {answer}" if answer else ""
    )


def _restored(receipt: Receipt) -> str:
    """Name what the server had lost and what this payment brought back; "" if nothing."""
    if receipt.reopened:
        return "the server had lost this channel, which was opened again with all that it had acknowledged"
    lost = receipt.again_sat
    return f"{sat(lost)} of earlier payments, which the server had lost, were booked again" if lost else ""


def change_address(record: ChannelRecord) -> str:
    if not record.movable:
        return record.change_address
    return f"the channel itself, which the server may move; {record.home_address} when you close it"


def _times(count: int) -> str:
    return "" if not count else "once" if count == 1 else f"{count} times"


def show_listing(records: list[ChannelRecord], problems: Mapping[str, Exception], as_json: bool) -> None:
    """Show all channels, and those that can't be read."""
    if as_json:
        broken = [problem_facts(name, error) for name, error in problems.items()]
        show_json([facts(record) for record in records] + broken)
        return
    rows = [
        (
            record.name,
            standing(record),
            sat(paid_sat(record)),
            sat(left_sat(record)),
            relative(record.expiry - time.time()),
            printable(record.url),
        )
        for record in records
    ]
    numbers = Column("Paid", is_number=True), Column("Left", is_number=True), Column("Expires", is_number=True)
    if rows:
        show_table((Column("Name"), Column("State"), *numbers, Column("Server")), rows)
    elif not problems:
        say("No channels yet. `paychan channel new URL` creates one.")
    for record in records:
        if record.deposits:
            total = sum(each.value_sat for each in record.deposits)
            back = f"come back {way_back(record)}" if way_back(record) else "are debug mode's, which no chain has"
            say(f"{record.name}  {sat(total)} more at its address {back}")
        if unchecked(record):
            say(f"{record.name}  {unchecked(record)}")
    for name, error in problems.items():
        warn(f"{name}  {error}. {advice(error, name)}")


def show_panel(title: str, *rows: tuple[str, Cell]) -> None:
    """Show named values without the empty ones; values of the server lose their control characters."""
    show_facts(title, *((name, printable(value) if isinstance(value, str) else value) for name, value in rows))
