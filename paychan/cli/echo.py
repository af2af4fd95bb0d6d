"""The echo of the terminal: the signer turns it off while it asks for its passphrase, and may end before it is on again."""

from __future__ import annotations

import os
import signal
import sys
import termios
from typing import Any, TypeAlias

_LOCAL = 3
"""Index of the local modes in termios attributes."""


class Echo:
    """The echo of standard input, as it was when this object was made."""

    def __init__(self) -> None:
        self._before = _attributes()

    @property
    def is_terminal(self) -> bool:
        """Whether standard input was a terminal with echo, and this process may use it."""
        return self._before is not None and _echoes(self._before)

    @property
    def is_off(self) -> bool:
        """Whether a child has turned the echo off: it waits for a secret."""
        now = _attributes() if self.is_terminal else None
        return now is not None and not _echoes(now)

    def restore(self) -> None:
        """Turn the echo on again if it is off, and discard typed text, which would be a command for the shell."""
        if self._before is None or not self.is_off:
            return
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # the shell may take the terminal back meanwhile
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSAFLUSH, self._before)


_Attributes: TypeAlias = list[Any]
"""See `termios.tcgetattr`."""


def _echoes(attributes: _Attributes) -> bool:
    return bool(attributes[_LOCAL] & termios.ECHO)


def _attributes() -> _Attributes | None:
    """Return the terminal's attributes; None without a terminal, or in the background, where the shell uses it."""
    try:
        descriptor = sys.stdin.fileno()
        if os.tcgetpgrp(descriptor) != os.getpgrp():
            return None
        return termios.tcgetattr(descriptor)
    except (AttributeError, OSError, ValueError, termios.error):
        return None
