"""Free ports for programs that need their port before they start, or the same port over restarts.

The system gives ports of the ephemeral range to every connection, so such a port may be in use again before the program
listens. These are below that range, and each worker of pytest-xdist has its own.
"""

from __future__ import annotations

import os
import socket
from itertools import cycle

_FIRST, _PER_WORKER = 12_000, 1_500
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 12
_numbers = cycle(range(_FIRST + _WORKER * _PER_WORKER, _FIRST + (_WORKER + 1) * _PER_WORKER))


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port that is free now; another call returns another one."""
    for port in _numbers:
        try:
            socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
        except OSError:
            continue
        return port
    raise AssertionError


def free_ports(count: int) -> list[int]:
    """Return ports that are free now."""
    return [free_port() for _ in range(count)]
