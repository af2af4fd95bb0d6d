"""Ends a process whose event loop makes no turn while the processor works: no code of the process could do that itself.

CPython 3.11 can loop without end inside one instruction: while it looks for the handler of an exception and not even an
integer can be allocated, it begins to look again (`ceval.c`, `exception_unwind`), without releasing the interpreter. So
the kernel watches: a timer of processor time (setitimer(2), ITIMER_PROF), whose signal ends the process unless the loop
sets the timer anew. A process that sleeps, waits for a disk or is suspended uses no processor time and is left alone.
"""

from __future__ import annotations

import asyncio
import signal

STUCK_SECONDS = 20.0
"""Processor time of all threads without a turn of the loop."""

_BEAT_SECONDS = 2.0


def end_when_stuck(
    loop: asyncio.AbstractEventLoop, cpu_seconds: float = STUCK_SECONDS, beat_seconds: float = _BEAT_SECONDS
) -> None:
    """End the process by SIGPROF when the loop makes no turn for this processor time; a service manager starts it again."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)

    def beat() -> None:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        loop.call_later(beat_seconds, beat)

    beat()
