"""Count the files, functions and calls that each journey of a channel goes through, in the running processes.

    python bench/journeys.py
    python bench/journeys.py --list "REST payment, v1"    # the files in order, with the functions called in each

Only files of paychan/, actors/ and signer/ count (`tests/lib/calls.py`). A file is entered when a call comes from another
file, or from the event loop after another file; a return enters nothing, and neither does a second call in a row.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import typer
from rich.console import Console
from rich.table import Table

from tests.lib import journeys
from tests.lib.journeys import Walk


@dataclass(frozen=True)
class Journey:
    """A journey, the process whose calls count, and its targets; None: there is none."""

    walk: Callable[[Path], Walk]
    process: str
    most_files: int | None = None
    most_calls: int | None = None
    room: str = ""
    """The folder whose files the target limits; "": all. A signature also passes the protocol core, as any program does."""

    @property
    def target(self) -> str:
        """The targets as text."""
        parts = [
            f"{self.most_files} files{f' of {self.room}' if self.room else ''}" if self.most_files else "",
            f"{self.most_calls} calls" if self.most_calls else "",
        ]
        return ", ".join(filter(None, parts))

    def is_met(self, walk: Walk) -> bool | None:
        """Tell whether a walk meets all targets; None without targets."""
        if not self.target:
            return None
        files = [file for file in walk.files if file.startswith(self.room)]
        return len(files) <= (self.most_files or len(files)) and len(walk.calls) <= (self.most_calls or len(walk.calls))


_PAYMENT = partial(Journey, process="server", most_files=12, most_calls=60)

JOURNEYS = {
    "REST payment, v1": _PAYMENT(partial(journeys.walk_payment, version=1)),
    "REST payment, v2": _PAYMENT(partial(journeys.walk_payment, version=2)),
    "stream payment": Journey(journeys.walk_stream, "server", most_files=14),
    "opening": Journey(journeys.walk_opening, "server"),
    "settling at expiry": Journey(journeys.walk_expiry, "server"),
    "signature": Journey(journeys.walk_signature, "signer", most_files=12, room="signer/"),
    "signature, token": Journey(journeys.walk_token_signature, "signer, token's"),
    "payer's payment": Journey(journeys.walk_payer, "payer"),
}


def walked(journey: Journey) -> Walk:
    """Walk a journey in a directory of its own."""
    with tempfile.TemporaryDirectory() as name:
        return journey.walk(Path(name))


def figures(journey: Journey, walk: Walk) -> dict[str, Any]:
    """The figures of a walk, for JSON."""
    return {
        "process": journey.process,
        "files": len(walk.files),
        "functions": walk.functions,
        "calls": len(walk.calls),
        "entered_again": walk.entered_again,
        "target": journey.target,
        "met": journey.is_met(walk),
        "visits": [visit._asdict() for visit in walk.visits],
    }


def listing(walk: Walk) -> str:
    """Each visit of a file, in order, with the functions called then; a number after a name counts calls in a row."""
    lines, seen = [], set[str]()
    for number, visit in enumerate(walk.visits, 1):
        calls = [(name, len([*same])) for name, same in groupby(visit.functions)]
        texts = (name if count == 1 else f"{name} ({count} times)" for name, count in calls)
        mark = (" (again)" if visit.file in seen else "") if visit.entered else " (back)"
        lines.append(f"{number:3} {visit.file}{mark}: {', '.join(texts)}")
        seen.add(visit.file)
    return "\n".join(lines)


def table(walks: dict[str, Walk]) -> Table:
    """Lay out all walks."""
    made = Table("journey", "process", "files", "entered again", "functions", "calls", "at most", "met")
    for name, walk in walks.items():
        journey = JOURNEYS[name]
        met = {None: "", True: "yes", False: "no"}[journey.is_met(walk)]
        counts = (len(walk.files), len(walk.entered_again), walk.functions, len(walk.calls))
        made.add_row(name, journey.process, *map(str, counts), journey.target, met)
    for column in made.columns[2:6]:
        column.justify = "right"
    return made


def main(
    show: Annotated[str, typer.Option("--list", help="Print the files of this journey, in order.")] = "",
    only: Annotated[str, typer.Option(help="Walk the journeys whose names contain this text.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Walk the journeys, and print what they go through."""
    names = [name for name in JOURNEYS if (name == show if show else only in name)]
    if not names:
        raise typer.BadParameter("the journeys are: " + "; ".join(JOURNEYS))
    walks = {name: walked(JOURNEYS[name]) for name in names}
    if as_json:
        print(json.dumps({name: figures(JOURNEYS[name], walk) for name, walk in walks.items()}, indent=1))
    elif show:
        print(listing(walks[show]))
    else:
        Console(width=130).print(table(walks))


if __name__ == "__main__":
    typer.run(main)
