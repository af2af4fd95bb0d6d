"""Shows a secret on the terminal's alternate screen, and removes it from there at every end of the process but SIGKILL."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
"""Signals that end the process, those that the platform has; SIGINT raises KeyboardInterrupt anyway."""


class Screen(Protocol):
    """The part of rich's `Console` that this module uses."""

    def set_alt_screen(self, enable: bool = True) -> bool: ...

    def clear(self, home: bool = True) -> None: ...


@contextmanager
def own_page(out: Screen) -> Iterator[None]:
    """Use the terminal's alternate screen: its content can't be scrolled back to."""
    with signals_raise():
        out.set_alt_screen(True)
        out.clear()
        try:
            yield
        finally:
            out.clear()
            out.set_alt_screen(False)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let signals that end the process raise SystemExit in the block, so that `finally` restores the terminal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {each: signal.getsignal(each) for each in _ENDING if signal.getsignal(each) != signal.SIG_IGN}
    try:
        for number in handlers:
            signal.signal(number, _exit)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
