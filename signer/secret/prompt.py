"""Reads a secret from the terminal without showing it, and leaves the terminal as it was, however the reading ends.

`getpass` restores the echo after an exception, not when a signal ends the process; and a signal that arrives just before
its read waits for the next key.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from paychan.shared.ownpage import signals_raise
from signer.secret.wiping import wiped

_MAX_LINE_BYTES = 4096
"""Linux's N_TTY_BUF_SIZE: the kernel keeps no longer line."""

_LOCAL = 3
"""Index of the local modes in termios attributes."""


def read_hidden(question: str) -> bytearray:
    """Ask on the terminal, and return the typed line without its end; the caller wipes it.

    Raises:
        EOFError: end of input, or no terminal.
        SystemExit: a signal that ends the process has arrived.
    """
    show: Callable[[str], object]
    with ExitStack() as cleanup:
        try:
            terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            cleanup.callback(os.close, terminal)
            show = partial(_show, terminal)
        except OSError:  # `paychan up` starts the signer in a session of its own
            terminal, show = sys.stdin.fileno(), _show_on_errors
        woken = cleanup.enter_context(_signals_wake())
        cleanup.enter_context(signals_raise())
        try:
            cleanup.enter_context(_without_echo(terminal))
            show(question)
            cleanup.callback(show, "\n")
            select.select([terminal, woken], [], [])
            return _line(terminal)
        except (OSError, termios.error):
            raise EOFError from None


def _line(terminal: int) -> bytearray:
    buffer = bytearray(_MAX_LINE_BYTES)
    with wiped(buffer), memoryview(buffer) as view:
        size = os.readv(terminal, [view])
        if not size:
            raise EOFError
        return bytearray(view[: size - buffer.endswith(b"\n", 0, size)])


@contextmanager
def _without_echo(terminal: int) -> Iterator[None]:
    """Turn the echo off; at the end, restore it and discard typed text that was not read."""
    before = termios.tcgetattr(terminal)
    hidden = [*before]
    hidden[_LOCAL] &= ~termios.ECHO
    try:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, hidden)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


@contextmanager
def _signals_wake() -> Iterator[int]:
    """Make the returned descriptor readable when a signal arrives, so that none waits for the next key."""
    woken, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if threading.current_thread() is not threading.main_thread():
            yield woken
            return
        before = signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        try:
            yield woken
        finally:
            signal.set_wakeup_fd(before)
    finally:
        os.close(woken)
        os.close(waking)


def _show(terminal: int, text: str) -> None:
    os.write(terminal, text.encode())


def _show_on_errors(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
