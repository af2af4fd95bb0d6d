"""`paychan receipt verify` as a process: what it says of genuine and other receipts, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lib.vectors import read_vectors

VECTORS = read_vectors("receipts.json")
IDENTITY = VECTORS["identity"]
RECEIPT: str = VECTORS["valid"][0]["receipt"]


def run(*words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in an empty directory of the environment: it needs no wallet."""
    command = [str(Path(sys.executable).with_name("paychan")), "receipt", "verify", *words]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "receipt.json"
    path.write_text(RECEIPT + "\n")
    return str(path)


def test_a_genuine_receipt_is_shown(file: str) -> None:
    """Status 0, with server, request, amounts and channel; a given identity leaves no warning."""
    done = run(file, "--identity", IDENTITY)

    assert (done.returncode, done.stderr) == (0, "")
    for text in ("Genuine", IDENTITY, "GET https://tiles.example/v1/tile/5?z=3", "25 sat", "ab" * 32 + ":1"):
        assert text in done.stdout


def test_without_an_identity_the_reader_is_told_to_compare(file: str) -> None:
    """The server is named, the receipt is not called genuine, and a sentence says how to compare."""
    done = run(file)

    assert done.returncode == 0
    assert IDENTITY in done.stdout
    assert "Genuine" not in done.stdout
    assert "compare" in done.stderr


def test_json_from_standard_input() -> None:
    """One JSON value has all facts, and whether the identity was compared."""
    done = run("-", "--json", given=RECEIPT)

    assert done.returncode == 0
    said: dict[str, Any] = json.loads(done.stdout)
    assert (said["verified"], said["identity_compared"], said["identity"]) == (True, False, IDENTITY)
    assert (said["charged_sat"], said["credit_sat"], said["change_sat"]) == (25, 75, 995_000)
    assert said["answer_sha256"] == "ff" * 32


def test_other_receipts_end_with_status_1(tmp_path: Path) -> None:
    """A changed receipt is refused with its code; one of a stranger names both identities."""
    cases = {case["code"]: case["receipt"] for case in VECTORS["invalid"]}
    path = tmp_path / "receipt.json"
    path.write_text(cases["receipt_bad_signature"])
    changed = run(str(path), "--identity", IDENTITY, "--json")
    path.write_text(cases["receipt_other_identity"])
    foreign = run(str(path), "--identity", IDENTITY)

    assert (changed.returncode, json.loads(changed.stdout)["code"]) == (1, "receipt_bad_signature")
    assert (foreign.returncode, foreign.stdout) == (1, "")
    assert "not genuine" in foreign.stderr
    assert IDENTITY in foreign.stderr


def test_what_can_not_be_read_ends_with_status_2(file: str, tmp_path: Path) -> None:
    """A missing file and an identity that is no key are not said to be false receipts."""
    missing, wrong = run(str(tmp_path / "nothing")), run(file, "--identity", "02ab")

    assert (missing.returncode, wrong.returncode) == (2, 2)
    assert "nothing can't be read" in missing.stderr
    assert "--identity: want 66 lower-case hex digits" in wrong.stderr
