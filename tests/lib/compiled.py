"""Compiles the test modules once, before the workers of pytest-xdist would each compile all of them.

pytest adds to each `assert` of a test module what a failure shows, and keeps the result beside the module. In a new
clone this takes some ten seconds of a processor, for each worker.
"""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from _pytest.assertion import rewrite

ROOT = Path(__file__).parents[2]
_FEW = 20
"""At most this number of modules is left to the workers: a process for them costs more."""


def kept(module: Path) -> Path:
    """Return the path under which pytest keeps a compiled test module."""
    return rewrite.get_cache_dir(module) / (module.name[: -len(".py")] + rewrite.PYC_TAIL)


def compile_missing() -> None:
    """Compile the test modules of a new clone, side by side."""
    missing = [path for path in sorted((ROOT / "tests").rglob("*.py")) if _is_test(path) and not kept(path).exists()]
    if len(missing) <= _FEW:
        return
    count = os.cpu_count() or 1
    parts = [missing[start::count] for start in range(count)]
    running = [subprocess.Popen([sys.executable, "-m", "tests.lib.compiled", *part], cwd=ROOT) for part in parts]
    for each in running:
        each.wait()  # after a failure, the workers compile


def _is_test(path: Path) -> bool:
    return path.name.startswith("test_") or path.name == "conftest.py"


def _compile(module: Path) -> None:
    settings = SimpleNamespace(getini=lambda _name: False)
    source_hash, code = rewrite._rewrite_test(module, settings)  # type: ignore[arg-type]
    target = kept(module)
    target.parent.mkdir(parents=True, exist_ok=True)
    rewrite._write_pyc(SimpleNamespace(trace=print), code, source_hash, target)  # type: ignore[arg-type]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        _compile(Path(name))
    for folder in ("tests/lib", "tests/signer", "tests/contract", "paychan", "signer", "actors", "bench"):
        compileall.compile_dir(ROOT / folder, quiet=2)
