"""Records which functions of paychan, actors and signer are called, in this process or in processes that a test starts.

A started process is recorded from its first line on: `recorded_environment` puts a `sitecustomize.py` on its path, which
sets a profile function for all threads. Each call becomes one line of one file, appended by one write, so the order of
the lines is the order of the calls, across threads and processes.

Counted are calls of functions, lambdas included. Not counted: bodies of modules and classes, comprehensions, and
resumptions of a coroutine or generator, which are the return from what it waited for.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR, CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COUNTED = tuple(f"{ROOT}/{folder}/" for folder in ("paychan", "actors", "signer"))

_FILE = "PAYCHAN_CALLS_FILE"
_SITE = Path(__file__).parent / "tracing"
_PATIENCE_SECONDS = 90.0


class Call(NamedTuple):
    """One call: the process, the thread, the called function, and the file of the nearest caller that is counted.

    Files are relative to the repository. `caller` is empty if an event loop or a thread made the call.
    """

    process: int
    thread: int
    file: str
    function: str
    caller: str


class Recorder:
    """A profile function that reports each counted call."""

    def __init__(self, report: Callable[[Call], object]) -> None:
        self._report = report
        self._files: dict[CodeType, str] = {}

    def __call__(self, frame: FrameType, event: str, _arg: object) -> None:
        """See `sys.setprofile`."""
        if event != "call":
            return
        code = frame.f_code
        file = self._file(code)
        if not file or _is_no_function(code) or _is_resumed(frame):
            return
        caller = frame.f_back
        while caller is not None and not self._file(caller.f_code):
            caller = caller.f_back
        origin = self._file(caller.f_code) if caller is not None else ""
        self._report(Call(os.getpid(), threading.get_ident(), file, code.co_qualname, origin))

    def _file(self, code: CodeType) -> str:
        """Return the counted file of this code, or an empty text."""
        found = self._files.get(code)
        if found is None:
            name = code.co_filename
            found = self._files[code] = name.removeprefix(f"{ROOT}/") if name.startswith(COUNTED) else ""
        return found


def _is_no_function(code: CodeType) -> bool:
    """Tell bodies of modules, classes and comprehensions."""
    return not code.co_flags & CO_OPTIMIZED or code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


def _is_resumed(frame: FrameType) -> bool:
    """Tell whether a coroutine or generator goes on: the instruction RESUME has another argument than 0 then."""
    code = frame.f_code
    waits = code.co_flags & (CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR)
    return bool(waits) and frame.f_lasti >= 0 and code.co_code[frame.f_lasti + 1] & 3 != 0


def begin_if_asked() -> None:
    """Record this process, if its environment names a file for that; `tracing/sitecustomize.py` calls it first of all."""
    name = os.environ.get(_FILE)
    if not name:
        return
    _follow_offset(f"{name}.offset")
    descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)

    def report(call: Call) -> None:
        os.write(descriptor, ("\t".join(map(str, call)) + "\n").encode())

    recorder = Recorder(report)
    threading.setprofile(recorder)
    sys.setprofile(recorder)


def _follow_offset(name: str) -> None:
    """Add the seconds in this file, as soon as it exists, to the process's clock."""
    right = time.time

    def shifted() -> float:
        try:
            return right() + int(Path(name).read_text() or 0)
        except OSError:
            return right()

    time.time = shifted


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record this thread until the block ends."""
    calls: list[Call] = []
    sys.setprofile(Recorder(calls.append))
    try:
        yield calls
    finally:
        sys.setprofile(None)


class CallFile:
    """The file in which recorded processes note their calls."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path
        self._read = 0

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a process that is to be recorded."""
        return {_FILE: str(self._path), "PYTHONPATH": os.pathsep.join((str(_SITE), str(ROOT)))}

    def set_forward(self, seconds: int) -> None:
        """Set the clock of the recorded processes forward, seconds from the right time."""
        Path(f"{self._path}.offset").write_text(str(seconds))

    def take(self) -> list[Call]:
        """Return the calls since the last `take`."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read()
            whole = whole[: whole.rfind(b"\n") + 1]
            self._read += len(whole)
        return [_call(line) for line in whole.decode().splitlines()]

    def take_quiet(self, *processes: int) -> list[Call]:
        """Wait until these processes do nothing, and return the calls since the last `take`."""
        wait_until_asleep(*processes)
        return self.take()


def _call(line: str) -> Call:
    process, thread, file, function, caller = line.split("\t")
    return Call(int(process), int(thread), file, function, caller)


def wait_until_asleep(*processes: int) -> None:
    """Wait until all threads of these processes have been seen asleep several times in a row."""
    asleep, deadline = 0, time.monotonic() + _PATIENCE_SECONDS
    while asleep < 5:
        assert time.monotonic() < deadline, "the processes do not come to rest"
        asleep = asleep + 1 if all(map(_is_asleep, processes)) else 0
        time.sleep(0.002)


def _is_asleep(process: int) -> bool:
    states = (task / "stat" for task in Path(f"/proc/{process}/task").iterdir())
    return all(state.read_text().rpartition(") ")[2].startswith("S") for state in states)
