"""Facts about the machine, which every stored result includes, and R, the unit of all rates."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coincurve import PrivateKey

RESULTS = Path(__file__).parent / "results"

_PACKAGES = ("paychan", "coincurve", "tornado", "plyvel", "pykka", "uvloop", "msgspec", "httptools")


def facts() -> dict[str, Any]:
    """Describe machine, software and present load."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def verifies_per_second(slices: int = 5, seconds: float = 0.1) -> float:
    """Measure R on one core: coincurve verifications with parsed key and given digest, the best of several slices.

    R is the unit of all rates: a server needs at least one verification for each payment.
    """
    key = PrivateKey(b"\x01" * 32)
    digest = b"\x02" * 32
    signature, verify = key.sign(digest, hasher=None), key.public_key.verify

    def one_slice() -> float:
        count = 0
        begun = time.perf_counter()
        while (passed := time.perf_counter() - begun) < seconds:
            for _ in range(100):
                verify(signature, digest, hasher=None)
            count += 100
        return count / passed

    return max(one_slice() for _ in range(slices))


def mean_verifies(seconds: float = 0.25) -> tuple[float, float]:
    """Return R and the CPU time of one verification in µs at this moment: the mean, not the best.

    A run of several seconds meets all speeds of a shared machine, so its unit must do so, too.
    """
    key, digest = PrivateKey(b"\x01" * 32), b"\x02" * 32
    signature, verify = key.sign(digest, hasher=None), key.public_key.verify
    count, cpu, begun = 0, time.thread_time(), time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds:
        for _ in range(100):
            verify(signature, digest, hasher=None)
        count += 100
    return count / passed, (time.thread_time() - cpu) / count * 1e6


def save(name: str, figures: dict[str, Any], machine: dict[str, Any]) -> Path:
    """Write a result as `bench/results/NAME-TIME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps({"bench": name, **figures, "machine": machine}, indent=2) + "\n")
    return path


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the short commit, with `+` if tracked files differ from it; None outside a repository."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)  # noqa: PLW1510 - judged below
    if commit.returncode:
        return None
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, capture_output=True)  # noqa: PLW1510
    return commit.stdout.strip() + ("+" if changed.returncode else "")


if __name__ == "__main__":
    print(json.dumps(facts() | {"verifies_per_second": round(verifies_per_second())}, indent=2))
