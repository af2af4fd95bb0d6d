"""The command `paychan channel pay`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from paychan.cli.payer.options import NameArgument, WalletOption, amount_of, examples, least
from paychan.cli.terminal import JsonOption, err, fail, patiently, warn
from paychan.shared.wording import counted, sat

if TYPE_CHECKING:
    from paychan.client import Channel, Limits

EXAMPLES = examples(
    "paychan channel pay 4593d97a 1000",
    "paychan channel pay 4593d97a 1 --times 1000",
    "paychan channel pay 4593d97a 10 --every 1   (10 sat a second, until Ctrl-C)",
    "paychan channel pay 4593d97a --drain    (all that is left, which closes the channel)",
    "paychan channel pay 4593d97a --resume   (the last payment again, if its answer was lost)",
)


_WAITING = "Waiting for the server's answer. The payment is signed and kept, and counts once."

_LIMIT_SAT = 1_000_000

_TELL_SECONDS = 5.0
"""Time between two lines about a long series, where no terminal shows a bar."""


def _once_at_least(times: int | None) -> int | None:
    if times is not None and times < 1:
        msg = f"got {times:,} payments, want at least 1"
        raise typer.BadParameter(msg)
    return times


TimesOption = Annotated[
    int | None,
    typer.Option(
        parser=amount_of,
        metavar="NUMBER",
        callback=_once_at_least,
        help="Number of payments. \\[default: one; with --every until Ctrl-C or --total]",
    ),
]
TotalOption = Annotated[
    int | None,
    typer.Option(
        parser=amount_of,
        metavar="SAT",
        callback=least(1),
        help="Most to pay in all, in satoshi, with --times or --every. \\[default: as --limit]",
    ),
]
LimitOption = Annotated[
    int,
    typer.Option(parser=amount_of, metavar="SAT", help="Largest single payment in satoshi, --drain included."),
]


def pay(
    name: NameArgument,
    amount: Annotated[
        int | None,
        typer.Argument(parser=amount_of, metavar="SAT", help="Satoshi to pay.", show_default=False),
    ] = None,
    times: TimesOption = None,
    every: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Pause between two payments.")] = 0.0,
    drain: Annotated[
        bool, typer.Option("--drain", help="Pay all that is left, and so close the channel; asks before.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before --drain, or above --total.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Send the last payment again; it counts once.")] = False,
    data: Annotated[str, typer.Option(help="Text for the application behind the server (version 2).")] = "",
    limit: LimitOption = _LIMIT_SAT,
    total: TotalOption = None,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pay over an open channel: an amount, once or often; all that is left; or the last payment again.

    An earlier payment without an answer is finished first, paid once, and named. Exit status 3 means that the payment
    counted, but less of it than was paid: don't repeat it.
    """
    from paychan.cli.payer.terminal import exit_on_error, show_receipt
    from paychan.client import Limits, Payer

    limits = Limits(payment_sat=limit)
    with exit_on_error(as_json, name):
        _check(amount, drain=drain, resume=resume, repeats=times is not None or every > 0, data=data)
        with Payer(wallet=wallet, limits=limits) as payer, payer.channel(name) as channel:
            if drain:
                _confirm(channel, limits, yes=yes, as_json=as_json)
            if resume:
                with patiently(_WAITING):
                    receipt = channel.resume()
                show_receipt(channel, receipt, as_json)
            elif drain or (times in (None, 1) and not every):
                with patiently(_WAITING):
                    receipt = channel.pay(amount or 0, drain=drain, application_data=data)
                show_receipt(channel, receipt, as_json)
            else:
                times = _number(
                    channel, amount or 0, times, limit if total is None else total, yes=yes, as_json=as_json
                )
                _pay_many(channel, amount or 0, times, every, data, as_json)


def _check(amount: int | None, *, drain: bool, resume: bool, repeats: bool, data: str) -> None:
    """Refuse arguments of which one would be ignored.

    Raises:
        ValueError: not exactly one of SAT, --drain and --resume, or options that do not fit it.
    """
    given = [f"{amount} sat"] * (amount is not None) + ["--drain"] * drain + ["--resume"] * resume
    if len(given) != 1:
        msg = f"got {' and '.join(given) or 'no amount'}: want one of SAT, --drain and --resume"
        raise ValueError(msg)
    if repeats and amount is None:
        msg = f"--times and --every repeat an amount: want SAT, got {given[0]}"
        raise ValueError(msg)
    if data and resume:
        msg = "--resume sends the last payment again with its own text: leave --data out"
        raise ValueError(msg)


def _confirm(channel: Channel, limits: Limits, *, yes: bool, as_json: bool) -> None:
    """Ask before all that is left is paid, once the limits allow it.

    Raises:
        ValueError: no terminal to ask at, and no --yes.
        OverLimit: more than --limit.
    """
    from paychan.client.spend import next_change

    record = channel.record
    next_change(record, 0, limits, drain=True)
    if yes:
        return
    question = f"--drain pays all {sat(record.agreed_sat)} that are left to {record.url}, and closes the channel"
    if as_json or not sys.stdin.isatty():
        msg = f"{question}: --yes confirms it where there is no terminal to ask at"
        raise ValueError(msg)
    typer.confirm(f"{question}. Go on?", abort=True)


def _number(channel: Channel, amount: int, times: int | None, total: int, *, yes: bool, as_json: bool) -> int:
    """Return how many payments a series has. Without --times it ends at --total.

    Raises:
        ValueError: --times of the amount are more than --total, and neither a terminal nor --yes confirms it.
        AmountTooSmall: the amount is not positive.
        InsufficientFunds: they are more than is left.
    """
    from paychan.client import AmountTooSmall, InsufficientFunds

    if amount <= 0:
        raise AmountTooSmall(got_sat=amount, need_sat=1)
    if times is None:
        return channel.left_sat // amount if yes else max(1, total // amount)
    in_all, left = amount * times, channel.record.agreed_sat
    if in_all > left:
        raise InsufficientFunds(want_sat=in_all, left_sat=left)
    if in_all > total and not yes:
        question = f"{times:,} times {sat(amount)} are {sat(in_all)} in all, and --total is {sat(total)}"
        if as_json or not sys.stdin.isatty():
            msg = f"{question}: --total {in_all} allows it, and so does --yes"
            raise ValueError(msg)
        typer.confirm(f"{question}. Go on?", abort=True)
    return times


def _pay_many(channel: Channel, amount: int, times: int, every: float, data: str, as_json: bool) -> None:
    """Pay repeatedly, with a progress bar and the rate; without a terminal, with a line every few seconds.

    After Ctrl-C, a message says what the wallet has as acknowledged, and how to complete pending payments.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from paychan.cli.payer.terminal import show_receipt

    columns = (
        TextColumn("Paying"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} payments/s"),
        TimeElapsedColumn(),
    )
    begun, signed_before = time.monotonic(), channel.record.paid_sat
    tell_at = begun + _TELL_SECONDS
    in_lines = not as_json and not err.is_terminal
    with Progress(*columns, console=err, transient=True, disable=as_json or in_lines) as progress:
        task = progress.add_task("", total=times, rate=0.0)

        def show_progress(payments: int) -> None:
            nonlocal tell_at
            now = time.monotonic()
            rate = payments / max(now - begun, 0.001)
            progress.update(task, completed=payments, rate=rate)
            if in_lines and now >= tell_at:
                warn(f"Paying: {payments:,} of {times:,} payments, {sat(payments * amount)}, {rate:,.0f} payments/s")
                tell_at = now + _TELL_SECONDS

        try:
            receipt = channel.pay_many(amount, times, every_seconds=every, application_data=data, watcher=show_progress)
        except KeyboardInterrupt:
            progress.stop()
            fail(_stopped(channel, signed_before, amount), 130)
    show_receipt(channel, receipt, as_json, payments=times, seconds=round(time.monotonic() - begun, 3))


def _stopped(channel: Channel, signed_before: int, amount: int) -> str:
    """Say what a series paid until Ctrl-C, as `channel status` counts it: acknowledged, and signed beyond that."""
    record = channel.record
    pending = record.pending_sat
    paid = max(0, record.paid_sat - pending - signed_before)
    text = f"stopped after {counted(paid // amount, 'acknowledged payment')}, {sat(paid)}"
    if pending:
        text += (
            f". {counted(pending // amount, 'payment')} more, {sat(pending)}, may be paid already: "
            f"`paychan channel pay {channel.name} --resume` completes them, once"
        )
    return f"{text}. In all, the server acknowledged {sat(record.paid_sat - pending)}"
