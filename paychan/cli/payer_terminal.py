"""How the payer's commands speak: panels and tables for people, one JSON value for programs, errors with a next step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from paychan.cli.terminal import fail, out
from paychan.client import (
    ChannelConflict,
    ChannelGone,
    ChannelInUse,
    ChannelRecord,
    ClientError,
    NoSuchChannel,
    OverLimit,
    PaymentRefused,
    ServerFailed,
    ServerMisbehaved,
    State,
    TermsUnacceptable,
    Unacknowledged,
    Unreachable,
    WouldTakeBack,
    WrongState,
)
from paychan.client.answers import printable
from paychan.protocol.errors import PaychanError

_RESUME = "`paychan channel pay {name} --resume` sends the last payment again, it counts once."
_STATUS = "`paychan channel status {name}` asks the server how the channel stands."
_NEXT_STEPS: dict[type[ClientError], str] = {
    Unacknowledged: _RESUME,
    Unreachable: "Is the server running? Should a payment have been under way: " + _RESUME,
    ServerFailed: "Nothing is decided yet; the same command may be given again. " + _RESUME,
    ServerMisbehaved: "What you signed stands, nothing else was believed. " + _STATUS,
    PaymentRefused: _STATUS,
    WouldTakeBack: _RESUME,
    ChannelGone: _STATUS,
    ChannelConflict: "If it is settled, nothing is left to do; if not, the refund is yours after the expiry.",
    TermsUnacceptable: "`paychan channel new --help` shows the options that change what you accept.",
    OverLimit: "--limit raises it.",
    NoSuchChannel: "`paychan channel list` shows the names.",
    ChannelInUse: "Wait until it ends.",
    WrongState: "`paychan channel list` shows what comes next.",
}


@contextmanager
def told(as_json: bool, name: str = "") -> Iterator[None]:
    """Turn failures into one sentence with the next step, or into JSON, and exit status 1."""
    try:
        yield
    except (ClientError, PaychanError, ValueError, OSError) as error:
        if as_json:
            code = getattr(error, "code", "") or type(error).__name__
            out.print_json(data={"code": code, "error": str(error), **getattr(error, "fields", {})}, default=str)
            raise typer.Exit(1) from None
        step = next((text for kind, text in _NEXT_STEPS.items() if isinstance(error, kind)), "")
        if isinstance(error, Unreachable) and not name:
            step = "Is the server running?"
        fail(f"{str(error).rstrip('.')}. {step.format(name=name)}".strip())


def facts(record: ChannelRecord) -> dict[str, Any]:
    """What programs get to know of a channel: everything but the private key and the secret."""
    shown: dict[str, Any] = msgspec.to_builtins(record)
    del shown["private_key"], shown["secret"]
    return shown | {
        "standing": standing(record),
        "paid_sat": record.paid_sat,
        "left_sat": record.left_sat,
        "min_funding_sat": record.min_funding_sat,
    }


def standing(record: ChannelRecord) -> str:
    """Where a channel stands, in a few words."""
    if record.state is not State.CLOSED and time.time() >= record.expiry:
        return "expired" if record.funding_outpoint else "expired, never funded"
    if record.state is State.NEW and record.signed_sat is None:
        return "funded" if record.funding_outpoint else "waits for funding"
    if record.state is State.NEW:
        return "opening"
    if record.state is State.OPEN and record.unacknowledged:
        return "open, last payment " + ("refused" if record.refused else "unanswered")
    return str(record.state.value)


def next_step(record: ChannelRecord) -> str:
    """The command that moves a channel on."""
    name = record.name
    if record.state is not State.CLOSED and time.time() >= record.expiry:
        return f"paychan channel refund {name}" if record.funding_outpoint else ""
    if record.state is State.NEW:
        funding = "" if record.funding_outpoint else " --outpoint TXID:VOUT --value SAT"
        return f"paychan channel open {name}{funding}"
    if record.state is State.OPEN:
        return f"paychan channel pay {name} " + ("--resume" if record.unacknowledged else "1000")
    return f"paychan channel close {name}" if record.state is State.CLOSING else ""


def moment(unix: int) -> str:
    """A time, local and relative."""
    local = datetime.fromtimestamp(unix, UTC).astimezone()
    return f"{local:%Y-%m-%d %H:%M %Z} ({relative(unix - time.time())})"


def relative(seconds: float) -> str:
    """A distance in time, by its two largest units."""
    minutes = int(abs(seconds)) // 60
    days, hours, rest = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [f"{days} d"] * (days > 0) + [f"{hours} h"] * (hours > 0) + [f"{rest} min"] * (days == 0)
    text = " ".join(parts[:2])
    return f"in {text}" if seconds >= 0 else f"{text} ago"


def sat(amount: int) -> str:
    """An amount, digits in groups."""
    return f"{amount:,} sat".replace(",", " ")


def show(record: ChannelRecord, as_json: bool) -> None:
    """Show one channel."""
    if as_json:
        out.print_json(data=facts(record))
        return
    show_panel(
        f"Channel {record.name}",
        ("Stands", standing(record)),
        ("Paid", sat(record.paid_sat)),
        ("Left", sat(record.left_sat)),
        ("Funded", f"{sat(record.funding_sat)} in {record.funding_outpoint}" if record.funding_outpoint else ""),
        ("Address", record.funding_address),
        ("Change to", record.change_address),
        ("Expires", moment(record.expiry)),
        ("Settled by", record.settlement_txid),
        ("Server", f"{record.url} (RBPCP v{record.version})"),
        ("Next", next_step(record)),
    )


def show_invitation(record: ChannelRecord, amount_sat: int, uri: str, directory: Path) -> None:
    """Show a new channel: what to send where, until when, and what to do then."""
    show_panel(
        f"Channel {record.name}",
        ("Send", f"{sat(amount_sat)} in one output; opening takes {sat(record.open_price_sat)} of it"),
        ("To", record.funding_address),
        ("URI", uri),
        ("Confirmed", f"{record.min_confirmations} times, before the server takes it"),
        ("Expires", f"{moment(record.expiry)}; a refund is yours from then on"),
        ("Change to", record.change_address),
        ("Key", f"in {directory}; without this directory the coins are lost"),
        ("Next", next_step(record)),
    )


def show_listing(records: list[ChannelRecord], as_json: bool) -> None:
    """Show all channels."""
    if as_json:
        out.print_json(data=[facts(record) for record in records])
        return
    table = Table("Name", "Stands", "Paid", "Left", "Expires", "Server")
    for column in (2, 3):
        table.columns[column].justify = "right"
    for record in records:
        expires = relative(record.expiry - time.time())
        table.add_row(record.name, standing(record), sat(record.paid_sat), sat(record.left_sat), expires, record.url)
    out.print(table if records else "No channels yet. `paychan channel new URL` makes one.")


def show_panel(title: str, *rows: tuple[str, str]) -> None:
    """Show facts by name, leaving out the empty ones."""
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        if value:  # some of it was written by a server: neither markup nor control characters of it count
            grid.add_row(Text(name, "dim"), Text(printable(value), "green" if name == "Next" else ""))
    out.print(Panel(grid, title=title, expand=False))
