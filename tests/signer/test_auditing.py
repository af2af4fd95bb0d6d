"""`paychan-signer audit`: its output for operators and programs."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from paychan.shared.wording import clock
from signer.audit import archive as auditarchive
from signer.audit.access import AuditFailed, lines
from signer.audit.chain import ARCHIVE, Head, verify
from signer.audit.file import AuditFile
from signer.cli.audit import app as audit_app
from tests.signer.test_audit import decision

app = typer.Typer()
app.add_typer(audit_app, name="audit")

CLAIMS = [
    {"outpoint": "ab" * 32 + ":7", "funding_sat": 1_000_000, "change_sat": 400_000, "change_script": "76a9"},
    {"outpoint": "cd" * 32 + ":0", "funding_sat": 50_000, "change_sat": 0, "change_script": "76a9"},
]
SETTLED = decision(1, about={"claims": CLAIMS, "destination": "76a9", "fee_sat": 2_000})
DECISIONS = [
    decision(0, asked="KeyRequest", about={"client_key": "02" * 33, "expiry": 1_800_000_000}, verdict="given"),
    SETTLED,
    decision(2, about=SETTLED.about, verdict="refused", tag="policy-fee", reason="fee of 9 sat, want [red]8[/red]"),
    decision(3, about=SETTLED.about, verdict="would-refuse", tag="policy-rate", reason="too much"),
    decision(4, asked="ChildRequest", about={**SETTLED.about, "child_fee_sat": 777}),
    decision(5, asked="AgainRequest", about={"outpoint": "ef" * 32 + ":1"}, verdict="failed", tag="protocol-ledger"),
]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal wide enough for whole lines."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Configuration of a signer that has decided six times."""
    with closing(AuditFile(tmp_path / "signer.audit")) as log:
        log.append(DECISIONS)
    file = tmp_path / "signer.toml"
    file.write_text(f'network = "regtest"\nstate_dir = "{tmp_path}"\n[key]\nmode = "hardened"\n')
    return file


def say(*words: object) -> Result:
    """Run a command that must not raise."""
    result = CliRunner().invoke(app, ["audit", *(str(word) for word in words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def shown(*words: object) -> list[dict[str, Any]]:
    result = say("show", *words, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def head_of(path: Path) -> Head:
    last = list(verify(lines(path)))[-1]
    return Head(last.n, last.hash)


# --- verify ----------------------------------------------------------------------------------------------------------


def test_good_log_is_shown_in_numbers(config: Path) -> None:
    """For a valid log, `verify` shows the number of decisions, their times and the head to note; status 0."""
    result = say("verify", config)

    assert result.exit_code == 0
    assert result.stdout.startswith("good")
    for text in (
        "6, number 1 to 6",
        clock(1_700_000_000),
        clock(1_700_000_000.005),
        head_of(config.parent / "signer.audit").hash,
    ):
        assert text in result.stdout


def test_broken_log_is_reported_with_its_line(config: Path) -> None:
    """For an edited line, `verify` shows the line, the fault and the last good line; status 1."""
    path = config.parent / "signer.audit"
    path.write_bytes(path.read_bytes().replace(b'"fee_sat":2000', b'"fee_sat":1000', 1))

    result = say("verify", config)

    assert result.exit_code == 1
    assert f"{path}, line 2: edited" in result.stderr
    assert "1 is the last good line" in result.stderr
    assert say("verify", path).exit_code == 1


def test_torn_log_is_reported(config: Path) -> None:
    """A last line without an end is broken while no signer is writing it."""
    path = config.parent / "signer.audit"
    os.truncate(path, path.stat().st_size - 1)

    assert "line 6: torn" in say("verify", config).stderr


def test_noted_hash_must_be_found(config: Path) -> None:
    """A hash noted earlier is found in a log that continued, and missed in one that was truncated or rewritten."""
    path = config.parent / "signer.audit"
    noted, whole = head_of(path).hash, path.read_bytes()
    with closing(AuditFile(path)) as log:
        log.append([decision(9)])
    assert "number 6 has that hash" in say("verify", config, "--head", noted).stdout

    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))

    assert say("verify", config).exit_code == 0
    result = say("verify", config, "--head", noted)
    assert result.exit_code == 1
    assert f"no line has the hash {noted}" in result.stderr


def test_missing_log_is_reported(config: Path) -> None:
    """A configuration without a log, and a log file that does not exist, end with a sentence."""
    (config.parent / "signer.audit").unlink()

    assert "this signer has probably never run" in say("verify", config).stderr
    assert "No such file" in say("verify", config.parent / "nothing").stderr
    assert say("verify", config.parent / "nothing").exit_code == 1


def test_log_of_a_running_signer_is_verified(config: Path) -> None:
    """The log of a running signer can be verified."""
    with closing(AuditFile(config.parent / "signer.audit")) as log:
        assert say("verify", config).exit_code == 0
        log.append([decision(8)])
        assert "7, number 1 to 7" in say("verify", config).stdout


# --- show ------------------------------------------------------------------------------------------------------------


def test_decisions_are_shown_to_people(config: Path) -> None:
    """A row shows time, user, request, channel, sums and decision; its text is not parsed as markup."""
    rows = say("show", config).stdout.splitlines()
    (settled,) = (row for row in rows if row.split()[:1] == ["2"])
    (refused,) = (row for row in rows if row.split()[:1] == ["3"])
    (child,) = (row for row in rows if row.split()[:1] == ["5"])

    shown = f"{'ab' * 32}:7", f"{'cd' * 32}:0"
    for text in (clock(1_700_000_000), " 1000 ", "Settlement", " ".join(shown), "650,000", "2,000", "signed"):
        assert text in settled
    assert "refused policy-fee: fee of 9 sat, want [red]8[/red]" in refused
    assert "777" in child


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_decisions_fit_narrow_terminals(config: Path, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """In a narrow terminal, the verdict of each decision can still be read."""
    monkeypatch.setenv("COLUMNS", str(columns))
    output = say("show", config).stdout
    for verdict in ("given", "signed", "refused", "failed"):
        assert verdict in output


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ([], [1, 2, 3, 4, 5, 6]),
        (["--last", "2"], [5, 6]),
        (["--refused"], [3, 4, 6]),
        (["--refused", "--last", "1"], [6]),
        (["--tag", "policy-fee"], [3]),
        (["--outpoint", "cd" * 32 + ":0"], [2, 3, 4, 5]),
        (["--outpoint", "efef"], [6]),
        (["--outpoint", "00"], []),
    ],
)
def test_decisions_are_chosen(config: Path, options: list[str], numbers: list[int]) -> None:
    """Each option keeps the matching decisions, the newest of them, in the order of the log."""
    assert [entry["n"] for entry in shown(config, *options)] == numbers


def test_programs_get_the_lines(config: Path) -> None:
    """With --json the lines are printed as they are in the log, so that they can be verified."""
    assert say("show", config, "--json").stdout_bytes == (config.parent / "signer.audit").read_bytes()


def test_no_matching_decision(config: Path) -> None:
    """No matching decision is a result, not a failure."""
    result = say("show", config, "--tag", "policy-none")
    assert (result.exit_code, result.stdout) == (0, "No such decision.\n")


# --- archive ---------------------------------------------------------------------------------------------------------


def test_archived_log_continues(config: Path) -> None:
    """A log that was archived twice is one chain of three files, which the configuration stands for."""
    path = config.parent / "signer.audit"
    before = path.read_bytes()
    assert say("archive", config).exit_code == 0
    with closing(AuditFile(path)) as log:
        assert log.head.count == 7
        log.append([decision(8)])
    assert say("archive", config).exit_code == 0

    assert (config.parent / "signer.audit.1-6").read_bytes() == before
    assert [file.name for file in auditarchive.files(path)] == ["signer.audit.1-6", "signer.audit.7-8", "signer.audit"]
    assert "9, number 1 to 9" in say("verify", config).stdout
    assert [entry["n"] for entry in shown(config, "--last", 4)] == [6, 7, 8, 9]
    assert shown(path)[0]["asked"] == ARCHIVE
    assert "numbers 1 to 8 are in signer.audit.7-8, not checked" in say("verify", path).stdout


def test_archived_logs_in_the_wrong_order_are_broken(config: Path) -> None:
    """Files must be in order; a missing file is noticed."""
    path = config.parent / "signer.audit"
    say("archive", config)
    say("archive", config)
    first, second, last = auditarchive.files(path)

    assert say("verify", first, second, last).exit_code == 0
    assert f"{last}, line 1: removed: it is number 8, but number 7 is missing" in say("verify", first, last).stderr
    assert f"{first}, line 1: inserted or moved" in say("verify", second, first).stderr


def test_log_of_a_running_signer_is_not_archived(config: Path) -> None:
    """A log that a signer appends to can't be archived."""
    path = config.parent / "signer.audit"
    with closing(AuditFile(path)):
        result = say("archive", config)
    assert result.exit_code == 1
    assert "in use by a running signer: stop it first" in result.stderr
    assert auditarchive.files(path) == [path]


def test_empty_or_missing_log_is_not_archived(config: Path) -> None:
    """An empty or missing log is not archived, and no file is created."""
    path = config.parent / "signer.audit"
    path.write_bytes(b"")
    assert "nothing to archive" in say("archive", config).stderr
    path.unlink()
    assert "can't be opened" in say("archive", config).stderr
    assert not path.exists()


def test_interrupted_archiving_is_completed(config: Path) -> None:
    """A log with two names after an interrupted archiving is valid and counted once; archiving again completes it."""
    path = config.parent / "signer.audit"
    (config.parent / "signer.audit.1-6").hardlink_to(path)
    (config.parent / "signer.audit.new").write_bytes(b"half")
    assert "6, number 1 to 6" in say("verify", config).stdout
    with closing(AuditFile(path)) as log:
        log.append([decision(8)])

    assert say("archive", config).exit_code == 0

    assert [file.name for file in auditarchive.files(path)] == ["signer.audit.1-7", "signer.audit"]
    assert "8, number 1 to 8" in say("verify", config).stdout


@pytest.mark.parametrize("loss", ["broken", "cut", "gone"])
def test_lost_log_continues_after_the_known_head(config: Path, loss: str) -> None:
    """A new log continues after the ledger's head and states that; verifying both files shows the gap."""
    path, known = config.parent / "signer.audit", head_of(config.parent / "signer.audit")
    if loss == "broken":
        path.write_bytes(path.read_bytes()[:-100] + b"\n")
    elif loss == "cut":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    else:
        path.unlink()

    result = say("archive", config, "--after", known)

    assert result.exit_code == 0
    assert ("broken-" in result.stdout) == (loss != "gone")
    with closing(AuditFile(path)) as log:
        assert log.holds(known)
        assert log.head.count == 7
    assert "started anew after line 6" in shown(path)[0]["reason"]
    kept = list(config.parent.glob("signer.audit.broken-*"))
    assert len(kept) == (loss != "gone")
    for file in kept:
        assert say("verify", file, path).exit_code == 1


def test_head_to_continue_from_is_checked(config: Path) -> None:
    """Text that is no number and hash changes no file."""
    for wrong in ("6", "six:" + "a" * 64, "6:" + "A" * 64):
        assert "want NUMBER:HASH" in say("archive", config, "--after", wrong).stderr
    assert auditarchive.files(config.parent / "signer.audit") == [config.parent / "signer.audit"]


def test_lock_on_an_archive_gives_no_access(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signer that opened the log just before it was moved does not append to the archive."""
    path = config.parent / "signer.audit"
    real = os.open

    def moved(name: Path, *arguments: Any, **named: Any) -> int:
        descriptor = real(name, *arguments, **named)
        if name == path and not (kept := config.parent / "signer.audit.1-6").exists():
            path.rename(kept)
            path.touch(0o600)
        return descriptor

    monkeypatch.setattr(os, "open", moved)
    with pytest.raises(AuditFailed, match="was moved"):
        AuditFile(path)
