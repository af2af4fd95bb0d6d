"""Pages that map numbers to tests: faults (`tests.lib.faults`) and threats (`tests.lib.threats`).

A test against number N is named `test_KIND_N_…`; a test against several numbers has all of them, as `test_KIND_N_M_…`.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

TESTS = Path(__file__).parents[1]

_ROW = re.compile(r"(?m)^\| (\d+) \| (.*?) \| (.*?) \| ?(.*?) \|$")


@dataclass(frozen=True)
class NamedPage:
    """A page whose table has a number in the first column and that number's tests in the last."""

    path: Path
    kind: str

    @cached_property
    def named(self) -> dict[int, list[str]]:
        """Return the tests of each number, as `file::name`, in the order of the files."""
        found = defaultdict[int, list[str]](list)
        for path in sorted(TESTS.rglob("test_*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (name := self._name.match(node.name)):
                    for number in name[1].rstrip("_").split("_"):
                        found[int(number)].append(f"{path.relative_to(TESTS)}::{node.name}")
        return dict(found)

    @property
    def rows(self) -> dict[int, str]:
        """Return the numbers of the page, and the tests that it names for each."""
        return {int(number): tests for number, _, _, tests in _ROW.findall(self.path.read_text())}

    def shown(self, number: int) -> str:
        """Return the page's text for the tests of a number: by file, without the prefix that they share."""
        by_file = defaultdict[str, list[str]](list)
        for test in self.named.get(number, []):
            file, _, name = test.partition("::")
            by_file[file].append(self._name.sub("", name))
        return "; ".join(f"`{file}`: {', '.join(names)}" for file, names in by_file.items())

    def write(self) -> None:
        """Write the tests of every number into the page."""
        text = self.path.read_text()
        self.path.write_text(
            _ROW.sub(lambda row: f"| {row[1]} | {row[2]} | {row[3]} | {self.shown(int(row[1]))} |", text)
        )

    @property
    def _name(self) -> re.Pattern[str]:
        return re.compile(rf"test_{self.kind}_((?:\d+_)+)")
