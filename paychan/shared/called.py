"""Command lines for the user to paste: they name a program of this installation the way it was called."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = ("paychan", "paychan-signer")

_IN_TEXT = re.compile(rf"`({'|'.join(sorted(PROGRAMS, key=len, reverse=True))})((?: [^`]*)?)`")
_PLACEHOLDER = re.compile(r"(?<= )FILE(?= |$)")


def called(program: str, *words: object) -> str:
    """Return the command line that runs a program of this installation from the current directory, quoted for the shell.

    The program is named as this process was called: by its bare name if the shell finds it on PATH, otherwise by the
    same relative or absolute path. The other program stands beside the one that was called.
    """
    return quoted(program_path(program), *words)


def quoted(*words: object) -> str:
    """Return words as a shell of this system takes them."""
    texts = [str(word) for word in words]
    if os.name == "nt":
        from subprocess import list2cmdline  # noqa: PLC0415 - only there

        return list2cmdline(texts)
    return shlex.join(texts)


def as_called(text: str, file: str = "", options: Mapping[str, str] | None = None) -> str:
    """Complete each command of a text that stands between backticks, so that it can be pasted.

    The program is named as it was called, the word FILE becomes `file` if that is not empty, and `options` has by the
    first word of a command what is added at its end.
    """

    def command(found: re.Match[str]) -> str:
        words = _PLACEHOLDER.sub(lambda _: quoted(file), found[2]) if file else found[2]
        more = (options or {}).get((words.split() or [""])[0], "")
        return f"`{called(found[1])}{words}{more}`"

    return _IN_TEXT.sub(command, text)


def program_path(program: str) -> str:
    """Return the name or path under which a shell in the current directory finds a program."""
    own = Path(sys.argv[0] or "-")
    is_ours = own.stem in PROGRAMS and own.suffix in ("", ".exe")
    folder = os.path.dirname(sys.argv[0]) if is_ours else os.path.dirname(sys.executable)  # noqa: PTH120 - keeps "./"
    path = os.path.join(folder, program)  # noqa: PTH118
    if not _exists(path):
        path = os.path.join(os.path.dirname(sys.executable), program)  # noqa: PTH118, PTH120
    if not _exists(path):
        return program
    found = shutil.which(program)
    if found and os.path.isabs(path) and _same(found, path):  # noqa: PTH117 - a shell gives the path of what is on PATH
        return program
    return path


def _exists(path: str) -> bool:
    return any(Path(path + suffix).is_file() for suffix in ("", ".exe"))


def _same(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return False
