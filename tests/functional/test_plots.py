"""bench/plot.py draws the stored results: the same pictures from the same results; missing results are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PLOT = Path(__file__).parents[2] / "bench" / "plot.py"
PARTS = (
    *(f"v{version}: {part}" for version in (1, 2) for part in ("HTTP head, target, query", "payment", "result")),
    *("sighash", "verify", "HTTP head of the answer", "actor, machine, commit: all threads"),
)


def store(directory: Path, name: str, reported: dict[str, Any], moment: str = "20260101T000000") -> None:
    """Store a result under the name that `machine.save` gives it."""
    (directory / f"{name}-{moment}.json").write_text(json.dumps({"bench": name, **reported}))


def load(directory: Path, version: int, connections: int, rate: int, moment: str = "20260101T000000") -> None:
    """Store a result of bench/load.py."""
    median = {"payments_per_second": rate, "latency_ms_p50": 1.5, "latency_ms_p99": 4.5}
    asked = {"version": version, "connections": connections, "mode": "keep-alive", "http": ""}
    reported = asked | {"median": median | {"server_cpu_verifies_per_payment": 3.0}}
    store(directory, f"load-v{version}-keep-alive-{connections}", reported, moment)


def drawn(results: Path, out: Path) -> tuple[dict[str, bytes], str]:
    """Draw; return the pictures, and the command's output."""
    command = [sys.executable, PLOT, "--results", results, "--out", out]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {path.name: path.read_bytes() for path in out.iterdir()}, output


def test_the_same_results_give_the_same_pictures(tmp_path: Path):
    """Four pictures, byte for byte the same when drawn again; of two results of a kind the newer one counts."""
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    results.mkdir()
    for version in (1, 2):
        load(results, version, 8, 1_000)
        load(results, version, 32, 4_321)
        load(results, version, 32, 9_876, "20260102T000000")
    stream = {"payments_in_a_frame": 16, "frames_in_flight": 1, "coalesce": True}
    store(results, "stream-16x1-coalesced-32", stream | {"median": {"payments_per_second": 77_777}})
    store(results, "costs", {"cpu_us": dict.fromkeys(PARTS, 10.0)})
    pictures, _ = drawn(results, tmp_path / "first")
    again, _ = drawn(results, tmp_path / "second")

    assert set(pictures) == {"throughput.svg", "latency.svg", "breakdown.svg", "original.svg"}
    assert pictures == again
    for rate in (b"9,876", b"77,777", b"912", b"3,240"):
        assert rate in pictures["original.svg"]
    assert b"4,321" not in pictures["original.svg"]


def test_missing_results_are_named(tmp_path: Path):
    """Without results there is no picture; the output has the command that measures."""
    pytest.importorskip("matplotlib")
    pictures, output = drawn(tmp_path / "nothing", tmp_path / "out")

    assert pictures == {}
    assert "python bench/costs.py" in output
    assert "python bench/load.py" in output
