"""The audit log as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from signer.audit.chain import Entry
from signer.cli.terminal import moment

_COLOURS = {"signed": "green", "given": "green", "would-refuse": "yellow", "refused": "red", "failed": "red"}


def outpoints(entry: Entry) -> list[str]:
    """List the outpoints of a decision."""
    found = [claim.get("outpoint") for claim in _claims(entry)]
    found += [entry.about.get("outpoint"), *_list(entry.about.get("coins"))]
    return [text for text in found if isinstance(text, str)]


def decisions_table(entries: Sequence[Entry]) -> Table:
    """Show decisions, one per row: user, request, sums, and decision."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("number", justify="right", no_wrap=True)
    table.add_column("time", min_width=10)
    table.add_column("uid", justify="right", no_wrap=True)
    table.add_column("asked", min_width=12)
    table.add_column("received\nsat", justify="right", no_wrap=True)
    table.add_column("fee\nsat", justify="right", no_wrap=True)
    table.add_column("decision", min_width=16, overflow="fold")
    for entry in entries:
        table.add_row(
            f"{entry.n}",
            moment(entry.at_ms / 1000),
            f"{entry.peer_uid}",
            escape(f"{entry.asked.removesuffix('Request')} {_channel(entry)}"),
            _sat(_received(entry)),
            _sat(entry.about.get("child_fee_sat", entry.about.get("fee_sat"))),
            _decision(entry),
        )
    return table


def _decision(entry: Entry) -> str:
    colour = _COLOURS[entry.verdict]
    why = ": ".join(text for text in (entry.tag, entry.reason) if text)
    return f"[{colour}]{entry.verdict}[/{colour}] {escape(why)}".rstrip()


def _channel(entry: Entry) -> str:
    """Return the first outpoint, short but searchable, and the number of others; or the number of counted requests."""
    found = outpoints(entry)
    if not found:
        units = {"count": "times", "payments": "payments"}
        return next((f"{entry.about[name]} {unit}" for name, unit in units.items() if name in entry.about), "")
    txid, _, vout = found[0].partition(":")
    more = f" +{len(found) - 1}" if len(found) > 1 else ""
    return f"{txid[:8]}…:{vout}{more}"


def _received(entry: Entry) -> int | None:
    """Value that the server receives from the claims, before the fee, in satoshi."""
    sums = [(claim.get("funding_sat"), claim.get("change_sat")) for claim in _claims(entry)]
    known = [funding - change for funding, change in sums if isinstance(funding, int) and isinstance(change, int)]
    return sum(known) if known else None


def _sat(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _claims(entry: Entry) -> Iterator[dict[str, Any]]:
    """Read the claims; another version may have written them in another form."""
    return (claim for claim in _list(entry.about.get("claims")) if isinstance(claim, dict))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
