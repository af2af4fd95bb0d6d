"""A process whose event loop makes no turn while the processor works is ended by the kernel."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, time
from paychan.shared.stuck import end_when_stuck

async def main():
    end_when_stuck(asyncio.get_running_loop(), cpu_seconds=0.3, beat_seconds=0.05)
    {work}

asyncio.run(main())
"""
SPIN = "while True: pass"
SLEEP = "time.sleep(1.5)"
WORK = """
    end = time.process_time() + 1.2
    while time.process_time() < end:
        sum(range(1000))
        await asyncio.sleep(0)
"""


@pytest.mark.parametrize(
    ("work", "status"),
    [(SPIN, -signal.SIGPROF), (SLEEP, 0), (WORK, 0)],
    ids=["a loop that spins", "one that waits for a system call", "one that works in turns"],
)
def test_fault_84_only_a_loop_that_stands_still_at_work_is_ended(work: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(work=work)], timeout=60, check=False)
    assert done.returncode == status
