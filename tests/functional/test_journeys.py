"""`bench/journeys.py` counts what a journey goes through, in the running processes."""

from __future__ import annotations

import json
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
        (journeys.walk_stream, "paychan/protocol/state_machine.py"),
        (journeys.walk_opening, "paychan/protocol/opening.py"),
        (journeys.walk_expiry, "paychan/store/leveldb/store.py"),
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
