"""The audit log on disk: kills, torn lines, failing disks and tampering with its end."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from signer.audit.access import AuditFailed, lines, seek
from signer.audit.chain import ARCHIVE, BEGINNING, AuditBroken, Head, encode_lines, verify
from signer.audit.file import AuditFile
from tests.signer.test_audit import decision, written

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (tests/system-packages)")

APPEND = """
import sys
from itertools import count
from pathlib import Path
from signer.audit.access import AuditFailed
from signer.audit.file import AuditFile
from tests.signer.test_audit import decision

log = AuditFile(Path(sys.argv[1]))
print("open", flush=True)
for number in range(int(sys.argv[2])) if sys.argv[2:] else count():
    try:
        head = log.append([decision(number) for number in range(number % 7 + 1)])
        print(head, flush=True)
    except AuditFailed as error:
        print("failed", error, flush=True)
"""


def append(path: Path, *numbers: int) -> Head:
    with closing(AuditFile(path)) as log:
        return log.append([decision(number) for number in numbers])


# --- appending -------------------------------------------------------------------------------------------------------


def test_log_continues_after_its_last_line(tmp_path: Path) -> None:
    """A log that is opened again continues after its last line; earlier bytes do not change."""
    path = tmp_path / "state" / "audit"
    assert append(path, 0, 1).count == 2
    before = path.read_bytes()

    with closing(AuditFile(path)) as log:
        assert (log.head.count, log.torn_bytes) == (2, 0)
        assert log.append([]) == log.head
        head = log.append([decision(2)])

    assert path.read_bytes().startswith(before)
    assert [entry.n for entry in verify(lines(path))] == [1, 2, 3]
    assert list(verify(lines(path)))[-1].hash == head.hash


def test_log_is_private(tmp_path: Path) -> None:
    """Other users can't read the log, from the creation of the file on."""
    append(tmp_path / "state" / "audit", 1)

    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "audit").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("obstacle", ["directory", "pipe", "link", "mode", "file-as-parent"])
def test_other_files_than_a_private_log_are_refused(tmp_path: Path, obstacle: str) -> None:
    """Links are not followed, pipes do not block, and a file that other users can write is refused."""
    path = tmp_path / "audit"
    if obstacle == "directory":
        path.mkdir()
    elif obstacle == "pipe":
        os.mkfifo(path, 0o600)
    elif obstacle == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif obstacle == "mode":
        append(path, 1)
        path.chmod(0o640)
    else:
        path.touch()
        path /= "audit"

    with pytest.raises(AuditFailed, match=str(path)):
        AuditFile(path)
    assert not (tmp_path / "elsewhere").exists()


def test_second_writer_is_refused(tmp_path: Path) -> None:
    """Two signers can't chain lines into one file."""
    with closing(AuditFile(tmp_path / "audit")) as log:
        with pytest.raises(AuditFailed, match="stop it first"):
            AuditFile(tmp_path / "audit")
        log.append([decision()])
    append(tmp_path / "audit", 2)


def test_closed_log_fails(tmp_path: Path) -> None:
    """A decision that is still in progress when the signer stops is not logged, and so not answered."""
    log = AuditFile(tmp_path / "audit")
    log.close()
    log.close()
    with pytest.raises(AuditFailed):
        log.append([decision()])


# --- unfinished logs -------------------------------------------------------------------------------------------------


def test_torn_line_is_cut_off(tmp_path: Path) -> None:
    """For a write that was cut at any place, the log continues after the last whole line."""
    path, three = tmp_path / "audit", written(3)
    whole = len(three[0]) + len(three[1])
    for size in range(whole + 1, whole + len(three[2])):
        path.write_bytes(b"".join(three)[:size])
        path.chmod(0o600)
        with closing(AuditFile(path)) as log:
            assert (log.head.count, log.torn_bytes) == (2, size - whole)
            log.append([decision(7)])
        assert [entry.at_ms % 1000 for entry in verify(lines(path))] == [0, 1, 7]


def test_torn_first_line_is_cut_off(tmp_path: Path) -> None:
    """A log whose only line is torn starts again from zero; so does one of zero bytes, as a power cut can leave it."""
    for content in (written(1)[0][:-1], bytes(5_000)):
        path = tmp_path / f"audit-{len(content)}"
        path.write_bytes(content)
        path.chmod(0o600)
        with closing(AuditFile(path)) as log:
            assert (log.head, log.torn_bytes) == (BEGINNING, len(content))


def test_damaged_last_line_is_left_alone(tmp_path: Path) -> None:
    """A last line that is whole but wrong was not torn: no line is chained to it, and the file stays as it is."""
    path = tmp_path / "audit"
    append(path, 0, 1)
    damaged = path.read_bytes()[:-200] + b"X" + path.read_bytes()[-199:]
    path.write_bytes(damaged)

    with pytest.raises(AuditBroken, match="edited"):
        AuditFile(path)

    assert path.read_bytes() == damaged
    path.write_bytes(written(1)[0])
    append(path, 2)  # the lock was released


def test_killed_log_has_all_that_was_acknowledged(tmp_path: Path) -> None:
    """After a kill at any moment, the log is valid and has every line for which `append` returned."""
    path, moments = tmp_path / "audit", random.Random(5)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", APPEND, path], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            output = [process.stdout.readline() for _ in range(moments.randrange(2, 80))]
            process.kill()
            output += process.stdout.readlines()
        acknowledged = [line.strip() for line in output if line.endswith("\n")][-1]
        count, colon, digest = acknowledged.partition(":")
        with closing(AuditFile(path)) as log:
            assert colon
            assert log.holds(Head(int(count), digest))
            assert log.head.count - int(count) <= 7
        assert sum(1 for _ in verify(lines(path))) == log.head.count


# --- failing disks ---------------------------------------------------------------------------------------------------


@needs_strace
@pytest.mark.parametrize("call", ["fdatasync", "write"])
def test_failed_write_is_the_last(tmp_path: Path, call: str) -> None:
    """After a failed sync or write no more bytes reach the file, and every later call fails too."""
    path = tmp_path / "audit"
    command = ["strace", "-f", "-qq", "-P", str(path), "-o", str(tmp_path / "trace"), "-e", f"trace={call}"]
    command += ["-e", f"inject={call}:error=EIO:when=3", sys.executable, "-c", APPEND, str(path), "6"]

    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)

    output = ended.stdout.splitlines()
    assert [line.split(":")[0] for line in output[1:3]] == ["1", "3"]
    assert all(line.startswith(f"failed a write to {path} failed (Input/output error)") for line in output[3:])
    assert len(output) == 7
    assert (tmp_path / "trace").read_text().count(f"{call}(") == 3
    with closing(AuditFile(path)) as log:
        assert log.head.count in (3, 6)
        assert log.append([decision()]).count == log.head.count
    assert sum(1 for _ in verify(lines(path))) == log.head.count


@needs_strace
def test_group_is_one_write_and_one_sync(tmp_path: Path) -> None:
    """Decisions that are logged together take one write and one sync; opening syncs the directory."""
    path = tmp_path / "audit"
    command = ["strace", "-f", "-qq", "-P", str(path), "-P", str(tmp_path), "-o", str(tmp_path / "trace")]
    command += ["-e", "trace=write,fdatasync,fsync", sys.executable, "-c", APPEND, str(path), "5"]

    subprocess.run(command, capture_output=True, check=True, timeout=60)

    calls = [line.split("(")[0].split()[-1] for line in (tmp_path / "trace").read_text().splitlines()]
    assert calls == ["fsync", *["write", "fdatasync"] * 5]


def test_full_disk_fails_the_log(tmp_path: Path) -> None:
    """A partial write is a failure; the next start cuts the part off."""
    path = tmp_path / "audit"
    head = append(path, 0, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(AuditFile(path)) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
        try:
            with pytest.raises(AuditFailed, match=r"100 of \d+ bytes were written"):
                log.append([decision(2)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.raises(AuditFailed, match="start the signer again"):
            log.append([decision(2)])
    with closing(AuditFile(path)) as log:
        assert (log.head, log.torn_bytes) == (head, 100)


# --- earlier heads ---------------------------------------------------------------------------------------------------


def test_log_holds_all_heads_it_had(tmp_path: Path) -> None:
    """Each earlier head is found, of one line or many; others are not, nor heads of lines that were cut off."""
    path, had = tmp_path / "audit", [BEGINNING]
    with closing(AuditFile(path)) as log:
        had += [log.append([decision(number)]) for number in range(300)]
        assert all(log.holds(head) for head in had)
        assert not any(log.holds(Head(head.count, "a" * 64)) for head in had)
        assert not log.holds(Head(301, had[-1].hash))
        assert not log.holds(Head(-1, had[-1].hash))
    os.truncate(path, path.stat().st_size - len(written(1)[0]) - 50)

    with closing(AuditFile(path)) as log:
        assert log.torn_bytes
        assert [log.holds(head) for head in had[-4:]] == [True, True, False, False]


def test_log_after_an_archive_holds_its_head(tmp_path: Path) -> None:
    """The last line of an archive is known, from the line that names the archive."""
    old = Head(7, "7" * 64)
    begun, head = encode_lines([decision(1, asked=ARCHIVE)], old)
    (tmp_path / "audit").write_bytes(begun)
    (tmp_path / "audit").chmod(0o600)
    with closing(AuditFile(tmp_path / "audit")) as log:
        assert log.head == head
        assert [log.holds(known) for known in (old, head, Head(6, "7" * 64), BEGINNING)] == [True, True, False, True]


def test_lines_are_found_by_number(tmp_path: Path) -> None:
    """Lines of all lengths are found by their number, in a file of any size."""
    path = tmp_path / "audit"
    with closing(AuditFile(path)) as log:
        log.append([decision(number, reason="x" * (number * 7919 % 40_000)) for number in range(100)])
    with path.open("rb") as file:
        for number in (*range(-1, 103),):
            found = [
                entry.n
                for entry in verify(lines(path, seek(file.fileno(), number)), None if number < 2 else _at(path, number))
            ]
            assert found == list(range(max(number, 1), 101))


def _at(path: Path, number: int) -> Head:
    before = list(lines(path))[: number - 1]
    last = list(verify(before))[-1]
    return Head(last.n, last.hash)


@needs_strace
def test_large_log_is_opened_at_once(tmp_path: Path) -> None:
    """Opening a large log reads only its end, and a recent head is found with a few reads."""
    path = tmp_path / "audit"
    with closing(AuditFile(path)) as log:
        for _ in range(20):
            head = log.append([decision(number) for number in range(2_000)])
    script = f"from pathlib import Path; from signer.audit.file import AuditFile; from signer.audit.chain import Head\nlog = AuditFile(Path({str(path)!r}))\nassert log.holds(Head({head.count}, {head.hash!r}))"
    ended = subprocess.run(
        ["strace", "-f", "-qq", "-P", str(path), "-e", "trace=pread64", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert path.stat().st_size > 15_000_000
    assert ended.stderr.count("pread64(") < 60
