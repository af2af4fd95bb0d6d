"""The funding of a new channel: address and amount for people, a QR code for wallets, and the wait for the payment."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from paychan.cli.payer.terminal import change_address, next_step, show_panel
from paychan.cli.terminal import completed, err, fail, out, say, terminal_width, warn, whole
from paychan.client import Channel, ClientError, FundingOutput, Source
from paychan.client.flows.open import choose
from paychan.client.transport.answers import printable
from paychan.shared.encoding import locale_is_ascii
from paychan.shared.wording import moment, sat


def show_invitation(channel: Channel, directory: Path) -> None:
    """Show a new channel: amount, address, deadline and next step; also as a QR code."""
    record, uri = channel.record, channel.bip21()
    if takes_no_coins(channel):
        warn(
            f"{printable(record.url)} is in debug mode: it opens channels without bitcoin, and its key may be public. "
            "Send no coins to the address below."
        )
    show_panel(
        f"Channel {record.name}",
        ("Send", f"{sat(record.amount_sat)} in one output; opening costs {sat(record.open_price_sat)} of it"),
        ("To", record.funding_address),
        ("URI", uri),
        ("Confirmed", f"{record.min_confirmations} times, before the server accepts it"),
        ("Payments end", moment(record.expiry - 3600 * record.settlement_period_hours)),
        ("Expires", f"{moment(record.expiry)}; from then on you can take a refund"),
        ("Change to", change_address(record)),
        (
            "Key",
            whole(
                completed(f"in {directory}; without it the coins are lost: `paychan wallet backup DIR` saves a copy")
            ),
        ),
        ("Next", next_step(record)),
    )
    _show_qr_code(uri)
    out.print(record.funding_address, uri, sep="\n", soft_wrap=True)


def takes_no_coins(channel: Channel) -> bool:
    """Say whether the server lists the funding of debug mode, which no chain has; False if it does not answer."""
    try:
        return any(each.source is Source.DEBUG for each in channel.funding())
    except ClientError:
        return False


def _show_qr_code(text: str) -> None:
    """Draw the code, unless the terminal is too narrow or has no such characters: a part of it is of no use."""
    drawing = qr_code(text)
    width = terminal_width()
    if (width is None or len(drawing.partition("\n")[0]) < width) and not locale_is_ascii():
        out.print(Text(drawing, "black on white" if out.is_terminal else ""), "", sep="\n", soft_wrap=True)


def qr_code(text: str) -> str:
    """Draw a QR code, two of its rows in a line of text: dark on light."""
    import segno

    rows = [bytes(row) for row in segno.make(text, error="l").matrix_iter(border=2)]
    rows += [bytes(len(rows[0]))] * (len(rows) % 2)
    return "\n".join(
        "".join(" ▄▀█"[2 * upper + lower] for upper, lower in zip(*pair, strict=True))
        for pair in zip(rows[::2], rows[1::2], strict=True)
    )


def wait_funded(channel: Channel) -> None:
    """Wait for the funding and print each change. After Ctrl-C, a message shows how to continue."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    said = ""
    columns = (SpinnerColumn("line"), TextColumn("waiting"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        progress.add_task("")

        def show_progress(seen: tuple[FundingOutput, ...] | ClientError) -> None:
            nonlocal said
            text = _funding_progress(channel, seen)
            if text != said:
                warn(text)
                said = text

        try:
            warn(f"Ctrl-C stops waiting, `paychan channel open {channel.name}` continues.")
            found = channel.wait_funded(watcher=show_progress)
        except KeyboardInterrupt:
            progress.stop()
            fail(f"stopped waiting. `paychan channel open {channel.name}` continues; nothing is lost.", 130)
    say(f"Funded by {found.outpoint}: {sat(found.value_sat)}: {found.source.words}.")


def _funding_progress(channel: Channel, seen: tuple[FundingOutput, ...] | ClientError) -> str:
    if isinstance(seen, ClientError):
        return f"Waiting: {seen}"
    best = choose(channel.record, seen)
    if best is not None:
        depth = (
            "deep enough" if best.deep_enough else f"{best.confirmations} of {best.confirmations_needed} confirmations"
        )
        return f"{sat(best.value_sat)} seen, {depth}"
    least = sat(channel.amount_sat)
    most = max((output.value_sat for output in seen), default=0)
    return f"Waiting for {least} to {channel.address}" + (f"; {sat(most)} arrived, not enough" if most else "")
