"""The audit log as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from paychan.shared.layout import Column, Value
from paychan.shared.wording import clock
from signer.audit.chain import Entry
from signer.cli.terminal import show_table

_COLOURS = {"signed": "green", "given": "green", "would-refuse": "yellow", "refused": "red", "failed": "red"}


def outpoints(entry: Entry) -> list[str]:
    """List the outpoints of a decision."""
    found = [claim.get("outpoint") for claim in _claims(entry)]
    found += [entry.about.get("outpoint"), *_list(entry.about.get("coins"))]
    return [text for text in found if isinstance(text, str)]


def show_decisions(entries: Sequence[Entry]) -> None:
    """Show decisions, one per row: user, request, sums, and decision."""
    columns = (
        Column("number", is_number=True),
        Column("time"),
        Column("uid", is_number=True),
        Column("asked"),
        Column("received sat", is_number=True),
        Column("fee sat", is_number=True),
        Column("count"),
        Column("channels"),
        Column("decision"),
    )
    rows = [
        (
            f"{entry.n}",
            clock(entry.at_ms / 1000),
            f"{entry.peer_uid}",
            entry.asked.removesuffix("Request"),
            _sat(_received(entry)),
            _sat(entry.about.get("child_fee_sat", entry.about.get("fee_sat"))),
            _count(entry),
            " ".join(outpoints(entry)),
            _decision(entry),
        )
        for entry in entries
    ]
    show_table(columns, rows)


def _decision(entry: Entry) -> Value:
    why = ": ".join(text for text in (entry.tag, entry.reason) if text)
    return Value(f"{entry.verdict} {why}".rstrip(), _COLOURS[entry.verdict])


def _count(entry: Entry) -> str:
    """Return the number of counted requests or payments, for a decision without channels."""
    units = {"count": "times", "payments": "payments"}
    named = (f"{entry.about[name]} {unit}" for name, unit in units.items() if name in entry.about)
    return "" if outpoints(entry) else next(named, "")


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
