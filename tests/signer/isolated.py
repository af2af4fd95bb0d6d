"""A process that has isolated itself as the signer does, and then evaluates expressions for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NOBODY = 65534

AS_NOBODY = f"""
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
libc.prctl(4, 1, 0, 0, 0)  # dumpable again, like a process that was started as this user
"""
"""Python statements; not `setpriv`: other users may not be able to read this Python."""

SCRIPT = """
import ctypes, errno, grp, json, os, resource, signal, socket, sys, threading
settings, token, directories, before, nobody, group = json.loads(sys.argv[1])
exec(before)
from pathlib import Path
from signer.config import Isolation
from signer.sandbox.isolation import IsolationError, isolate
libc = ctypes.CDLL(None, use_errno=True)
exec(nobody)
libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # Yama: allow every tracer, so that it is not Yama that refuses
try:
    if settings is None:
        said = []
    else:
        said = isolate(Isolation(**settings), token=token, directories=[Path(each) for each in directories], group=group)
except IsolationError as error:
    said = [error.key, str(error)]
print(json.dumps(said), flush=True)
secret = b"unreadable for others"
for line in sys.stdin:
    try:
        answer = eval(line)
    except OSError as error:
        answer = errno.errorcode[error.errno]
    print(json.dumps(answer), flush=True)
"""


class Isolated:
    """A child that has called `isolate(Isolation(**settings))`, unless settings is None; `said` is the result.

    Args:
        before: Python statements that it runs first.
        nobody: run as the user nobody.
    """

    def __init__(
        self,
        settings: dict[str, Any] | None,
        *,
        token: bool = False,
        directories: tuple[Path, ...] = (),
        before: str = "",
        nobody: bool = False,
        group: str = "",
        cwd: Path | None = None,
    ) -> None:
        asked = json.dumps([settings, token, [str(each) for each in directories], before, AS_NOBODY * nobody, group])
        root = Path(__file__).parents[2]
        prepared = f"import sys; sys.path.insert(0, {str(root)!r})\n{SCRIPT}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", prepared, asked],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )
        try:
            self.said: list[str] = self._hear()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, expression: str) -> Any:
        """Value of an expression in the child; for an OSError, the name of its number."""
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self._hear()

    def has(self, text: str) -> bool:
        return text in self.said

    def status(self) -> dict[str, str]:
        """State of the child as the kernel reports it: /proc/PID/status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}

    def _hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the child ended with status {self.process.wait(20)}"
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
