"""The command `paychan channel pay`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from paychan.cli.payer.options import NameArgument, WalletOption, examples
from paychan.cli.terminal import JsonOption, err, fail
from paychan.shared.wording import sat

if TYPE_CHECKING:
    from paychan.client import Channel, Limits

EXAMPLES = examples(
    "paychan channel pay 4593d97a 1000",
    "paychan channel pay 4593d97a 1 --times 1000",
    "paychan channel pay 4593d97a 10 --every 1   (10 sat a second, until Ctrl-C)",
    "paychan channel pay 4593d97a --drain    (all that is left, which closes the channel)",
    "paychan channel pay 4593d97a --resume   (the last payment again, if its answer was lost)",
)


def pay(
    name: NameArgument,
    amount: Annotated[int | None, typer.Argument(metavar="SAT", help="Satoshi to pay.", show_default=False)] = None,
    times: Annotated[
        int | None, typer.Option(min=1, help="Number of payments. \\[default: one; with --every until Ctrl-C]")
    ] = None,
    every: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Pause between two payments.")] = 0.0,
    drain: Annotated[
        bool, typer.Option("--drain", help="Pay all that is left, and so close the channel; asks before.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before --drain.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Send the last payment again; it counts once.")] = False,
    data: Annotated[str, typer.Option(help="Text for the application behind the server (version 2).")] = "",
    limit: Annotated[int, typer.Option(help="Largest single payment in satoshi, --drain included.")] = 1_000_000,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pay over an open channel: an amount, once or often; all that is left; or the last payment again.

    An earlier payment without an answer is finished first, paid once, and named.
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
                show_receipt(channel, channel.resume(), as_json)
            elif drain or (times in (None, 1) and not every):
                show_receipt(channel, channel.pay(amount or 0, drain=drain, application_data=data), as_json)
            else:
                _pay_many(channel, amount or 0, times or channel.left_sat, every, data, as_json)


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


def _pay_many(channel: Channel, amount: int, times: int, every: float, data: str, as_json: bool) -> None:
    """Pay repeatedly, with a progress bar and the rate.

    After Ctrl-C, a message shows how to complete pending payments.
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
    begun, done = time.monotonic(), 0
    with Progress(*columns, console=err, transient=True, disable=as_json) as progress:
        task = progress.add_task("", total=times, rate=0.0)

        def show_progress(payments: int) -> None:
            nonlocal done
            done = payments
            progress.update(task, completed=done, rate=done / (time.monotonic() - begun))

        try:
            receipt = channel.pay_many(amount, times, every_seconds=every, application_data=data, watcher=show_progress)
        except KeyboardInterrupt:
            progress.stop()
            under_way = channel.record.pending_sat // max(1, amount)
            rest = f"`paychan channel pay {channel.name} --resume` completes the {under_way} pending ones."
            fail(f"stopped after {done} payments{f'. {rest}' if under_way else ', all of them acknowledged.'}", 130)
    show_receipt(channel, receipt, as_json, payments=times, seconds=round(time.monotonic() - begun, 3))
