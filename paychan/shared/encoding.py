"""The encoding of a command's output: no character ends a command with an error, and a C locale gets no drawings."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TextIO


def prepare_output() -> None:
    """Make standard output and standard error accept every text.

    If the locale is explicitly C or POSIX, their encoding is called ASCII, so that frames and bars are drawn from ASCII
    characters. Other characters, which occur in paths, pass as UTF-8, and bytes that are no UTF-8 pass unchanged.
    """
    codecs.register_error("paychan-utf8", _as_utf8)
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if locale_is_ascii() or not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(encoding="ascii", errors="paychan-utf8")
        else:
            stream.reconfigure(errors="surrogateescape")


def locale_is_ascii() -> bool:
    """Whether the user asks for the C locale; an environment without a locale does not say so."""
    named = next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "")
    return named in ("C", "POSIX")


class ReaderGone(SystemExit):
    """The reader of a command's output has closed the pipe; the exit status is that of a shell after SIGPIPE."""

    def __init__(self) -> None:
        super().__init__(141)


def drop_output(stream: TextIO) -> None:
    """Write nothing more to a stream whose reader has gone.

    Raises:
        ReaderGone: always; it ends a command whose exit status says nothing else.
    """
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    raise ReaderGone


def write_out(text: str) -> None:
    """Write a text to standard output at once.

    Raises:
        ReaderGone: the reader has closed the pipe.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output(sys.stdout)


def _as_utf8(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return error.object[error.start : error.end].encode("utf8", "surrogateescape"), error.end
