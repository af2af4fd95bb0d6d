"""`bench/journeys.py` counts what a journey goes through, in the running processes."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lib import journeys
from tests.lib.calls import ROOT, Call
from tests.lib.journeys import Walk


def called(text: str) -> Walk:
    """A walk of calls `caller>file`, in which functions are named by number."""
    pairs = (each.split(">") for each in text.split())
    return Walk(tuple(Call(1, 1, file, str(number), caller) for number, (caller, file) in enumerate(pairs)))


def test_a_return_enters_no_file() -> None:
    """A file to which a call returned, and a second call in a row, are no entries; a later call is one."""
    walk = called(">a a>b a>a >a a>b a>b b>c a>b")

    assert [(visit.file, visit.entered) for visit in walk.visits] == [
        ("a", True), ("b", True), ("a", False), ("b", True), ("c", True), ("b", True),
    ]  # fmt: skip
    assert walk.entered_again == {"b": 3}
    assert walk.files == ("a", "b", "c")


def test_the_usual_walk_is_the_most_frequent() -> None:
    """Work beside a journey, and the first walk's, does not count."""
    walks = [called(">a a>b b>c"), called(">a a>b"), called(">x >a a>b"), called(">a a>b")]

    assert journeys.usual(walks).files == ("a", "b")


@pytest.mark.parametrize(
    ("walk", "passes"),
    [
        (journeys.walk_stream, "paychan/protocol/paying.py"),
        (journeys.walk_opening, "paychan/protocol/opening.py"),
        (journeys.walk_expiry, "paychan/store/leveldb/writer.py"),
        (journeys.walk_signature, "signer/judge/policies.py"),
        (journeys.walk_token_signature, "signer/token/sessions.py"),
        (journeys.walk_payer, "paychan/client/channel.py"),
    ],
)
def test_each_journey_is_walked(tmp_path: Path, walk: Callable[[Path], Walk], passes: str) -> None:
    """The walk names files that exist, and passes the one that the journey can't do without."""
    walked = walk(tmp_path)

    assert passes in walked.files
    assert all((ROOT / file).is_file() for file in walked.files)


@pytest.mark.parametrize("version", [1, 2])
def test_the_command_counts_a_journey(version: int) -> None:
    """The figures of a payment agree with its visits."""
    command = [sys.executable, ROOT / "bench" / "journeys.py", "--only", f"REST payment, v{version}", "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout
    (figures,) = json.loads(output).values()

    functions = [(visit["file"], name) for visit in figures["visits"] for name in visit["functions"]]
    assert (figures["calls"], figures["functions"]) == (len(functions), len(set(functions)))
    assert figures["files"] == len({file for file, _ in functions})
    assert {"actors/channel.py", "paychan/store/leveldb/writer.py"} < {file for file, _ in functions}


def drawn(folder: str, way: str) -> list[str]:
    """The files of one way, in order, from the table on the page of a folder."""
    page = (ROOT / folder / "README.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")]
    names = next(row for row in rows if row[0].strip() == "step")
    column = [name.strip() for name in names].index(way)
    begin = rows.index(names) + 1
    steps = [row for row in rows[begin:] if len(row) == len(names)]
    files = [file for row in steps for file in re.findall(r"`([^`]+\.py)`", row[column])]
    files = [re.sub("^P/", "../paychan/protocol/", file) for file in files]
    return [file.removeprefix("../") if file.startswith("../") else f"{folder}/{file}" for file in files]


@pytest.mark.parametrize(
    ("way", "walk"),
    [
        ("v1", functools.partial(journeys.walk_payment, version=1)),
        ("v2", functools.partial(journeys.walk_payment, version=2)),
        ("stream", journeys.walk_stream),
    ],
)
def test_the_page_draws_the_way_of_a_payment(tmp_path: Path, way: str, walk: Callable[[Path], Walk]) -> None:
    """A real payment enters exactly the files of paychan/README.md, first entries in that order, at most 12 (stream: 14)."""
    walked = walk(tmp_path)

    assert list(walked.files) == drawn("paychan", way)
    assert len(walked.files) <= (14 if way == "stream" else 12)
    assert way == "stream" or len(walked.calls) <= 60


def test_the_page_draws_the_way_of_a_signature(tmp_path: Path) -> None:
    """A real settlement enters exactly the files of signer/README.md, first entries in that order."""
    walked = journeys.walk_signature(tmp_path)

    assert list(walked.files) == drawn("signer", "files")
