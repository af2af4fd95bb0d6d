"""`paychan-signer audit`: verifies, shows and archives the log of decisions. Needs no running signer."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from msgspec import Struct

from paychan.protocol.settings import SettingsError
from paychan.shared.layout import Value
from paychan.shared.wording import clock
from signer.audit import archive as auditarchive
from signer.audit.access import AuditFailed, lines, newest_first
from signer.audit.chain import AuditBroken, Entry, Head, read_line, verify
from signer.cli.audit_table import outpoints, show_decisions
from signer.cli.options import ConfigFile, find
from signer.cli.terminal import JsonOption, err, fail, say, show_facts, whole
from signer.config import load_signer_config

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="The log of every decision: verify, show or archive it."
)

LogFiles = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="signer.toml or its directory, or log files, oldest first")
]

_LINES_PER_STEP = 5_000
"""Lines from one step of the progress bar to the next."""


class _Seen(Struct):
    """Progress of the verification."""

    bytes: int = 0
    first: Entry | None = None
    last: Entry | None = None
    noted: Entry | None = None
    """The line with the hash that the operator noted earlier."""


@app.command(
    "verify",
    epilog="[bold]Examples[/bold]\n\n  paychan-signer audit verify config/live/signer.toml\n\n"
    "  paychan-signer audit verify signer.audit.1-90000 signer.audit --head 5f1c…",
)
def verify_logs(
    files: LogFiles,
    head: Annotated[
        str, typer.Option(help="A line's hash, noted earlier: the log must still contain it", show_default=False)
    ] = "",
) -> None:
    """Check that no line of the log was changed, removed, added or moved. The exit status is 0 if so.

    Lines that were cut off at the end are found by a hash that was noted elsewhere: `status` shows the newest, and the
    signer itself compares it at each start.
    """
    with _sentences():
        logs = _logs(files)
        seen = _verified(logs, head)
    _print_verified(seen, logs)
    if head and seen.noted is None:
        fail(f"no line has the hash {head}: the log was cut off before it, or written anew")


@app.command(
    "show",
    epilog="[bold]Examples[/bold]\n\n  paychan-signer audit show config/live/signer.toml --last 50 --refused\n\n"
    "  paychan-signer audit show config/live/signer.toml --outpoint TXID:VOUT --json",
)
def show(
    files: LogFiles,
    last: Annotated[int, typer.Option(min=1, help="Show this many of the matching decisions")] = 20,
    refused: Annotated[
        bool,
        typer.Option(
            "--refused", help="Only requests that were refused or failed, or that a policy on trial would refuse"
        ),
    ] = False,
    outpoint: Annotated[
        str, typer.Option(help="Only this txid:vout; the first characters are enough", show_default=False)
    ] = "",
    tag: Annotated[str, typer.Option(help="Only this policy, such as policy-fee", show_default=False)] = "",
    as_json: JsonOption = False,
) -> None:
    """Show decisions, the newest last. `show` checks nothing; `verify` does."""

    def chosen(entry: Entry) -> bool:
        return (
            (not refused or entry.verdict not in ("signed", "given"))
            and (not tag or entry.tag == tag)
            and (not outpoint or any(text.startswith(outpoint) for text in outpoints(entry)))
        )

    with _sentences():
        found = _newest(_logs(files), last, chosen)
    if as_json:
        sys.stdout.buffer.writelines(line for _, line in found)
    elif found:
        show_decisions([entry for entry, _ in found])
    else:
        say("No such decision.")


@app.command(
    "archive",
    epilog="[bold]Examples[/bold]\n\n  paychan-signer audit archive config/live/signer.toml\n\n"
    "  paychan-signer audit archive config/live/signer.toml --after 9041:5f1c…",
)
def archive(
    file: ConfigFile,
    after: Annotated[
        str, typer.Option(help="The log is broken or lost: continue from this NUMBER:HASH", show_default=False)
    ] = "",
) -> None:
    """Archive the log of a stopped signer and start a new one that continues from its last line.

    If the signer does not start because the log is damaged or lost, `--after` with the number and hash in its message
    starts a new log that states this. The old file is kept.
    """
    with _sentences():
        path = load_signer_config(file).audit_path
        now_ms = time.time_ns() // 1_000_000
        kept = auditarchive.begin_anew(path, _head(after), now_ms) if after else auditarchive.archive(path, now_ms)
    show_facts(("started", whole(path)), ("kept", whole(kept or "")))


# --- reading ---------------------------------------------------------------------------------------------------------


def _logs(files: Sequence[Path]) -> list[Path]:
    """Return the log files that the arguments mean: a configuration stands for its log and the archives beside it."""
    found: list[Path] = []
    for file in files:
        if file.suffix != ".toml" and not file.is_dir():
            found.append(file)
            continue
        path = load_signer_config(find(file)).audit_path
        of_config = auditarchive.files(path)
        if not of_config:
            fail(f"there is no {path}: this signer has probably never run")
        found += of_config
    return found


def _verified(files: Sequence[Path], noted: str) -> _Seen:
    seen, follows = _Seen(), None
    with _progress(sum(file.stat().st_size for file in files)) as progress:
        for file in files:
            try:
                for entry in verify(_counted(file, seen, progress), follows):
                    seen.first = seen.first or entry
                    seen.last = entry
                    if entry.hash == noted:
                        seen.noted = entry
            except AuditBroken as error:
                _fail_broken(file, error, seen)
            follows = Head(seen.last.n, seen.last.hash) if seen.last else None
    return seen


def _counted(file: Path, seen: _Seen, progress: Callable[[int], None]) -> Iterator[bytes]:
    for number, line in enumerate(lines(file)):
        seen.bytes += len(line)
        if number % _LINES_PER_STEP == 0:
            progress(seen.bytes)
        yield line


def _newest(files: Sequence[Path], count: int, chosen: Callable[[Entry], bool]) -> list[tuple[Entry, bytes]]:
    """Return the newest matching decisions, in order, with their lines; reads no more of the log than needed."""
    every = (both for file in reversed(files) for both in _backwards(file))
    found = list(islice((both for both in every if chosen(both[0])), count))
    return found[::-1]


def _backwards(file: Path) -> Iterator[tuple[Entry, bytes]]:
    for line in newest_first(file):
        try:
            yield read_line(line), line
        except AuditBroken as error:
            raise AuditBroken(0, f"a line of {file} is {error.reason}") from None


def _head(text: str) -> Head:
    count, _, digest = text.partition(":")
    if not count.isdecimal() or not re.fullmatch("[0-9a-f]{64}", digest):
        fail(f"{text}: want NUMBER:HASH, as in the signer's message")
    return Head(int(count), digest)


# --- output ----------------------------------------------------------------------------------------------------------


@contextmanager
def _sentences() -> Iterator[None]:
    """End the command with one sentence instead of a traceback."""
    try:
        yield
    except SettingsError as error:
        fail(str(error), status=2)
    except AuditBroken as error:
        fail(f"{error.reason}; `paychan-signer audit verify FILE` shows where the log is broken")
    except AuditFailed as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; check the path and your permission to read it")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show the number of bytes done, if standard error is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("verifying", total=total)
        yield lambda done: bar.update(task, completed=done)


def _fail_broken(file: Path, error: AuditBroken, seen: _Seen) -> NoReturn:
    good = f"; {seen.last.n:,} is the last good line, of {clock(seen.last.at_ms / 1000)}" if seen.last else ""
    fail(f"{file}, line {error.line}: {error.reason}{good}")


def _print_verified(seen: _Seen, files: Sequence[Path]) -> None:
    if seen.first is None or seen.last is None:
        say("good: no decisions yet", "green")
        return
    first, last = seen.first, seen.last
    before = f"numbers 1 to {first.n - 1:,} are in {first.about.get('archive', 'another file')}, not checked"
    say("good", "green")
    show_facts(
        *(("" if number else "files", whole(file)) for number, file in enumerate(files)),
        ("decisions", f"{last.n - first.n + 1:,}, number {first.n:,} to {last.n:,}"),
        ("first", clock(first.at_ms / 1000)),
        ("last", clock(last.at_ms / 1000)),
        ("head", last.hash),
        ("before", Value(before, "yellow") if first.n > 1 else ""),
        ("noted", Value(f"number {seen.noted.n:,} has that hash", "green") if seen.noted is not None else ""),
    )
