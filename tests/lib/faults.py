"""The page that maps faults to tests. `python -m tests.lib.faults` writes the tests into it.

Faults were found from outside, with the real server, signer and node. A test that holds one of them off is named
`test_fault_NN_…` after its number; several tests may be, for its neighbours too.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS / "FAULTS.md"

_NAME = re.compile(r"test_fault_0*(\d+)_")
_ROW = re.compile(r"(?m)^\| (\d+) \| (.*?) \| (.*?) \| (.*?) \|$")


@cache
def named_after_faults() -> dict[int, list[str]]:
    """The tests named after each fault, as `file::name`, in the order of the files."""
    found = defaultdict[int, list[str]](list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (name := _NAME.match(node.name)):
                found[int(name[1])].append(f"{path.relative_to(TESTS)}::{node.name}")
    return found


def rows() -> dict[int, str]:
    """The faults of the page, and the tests that it names for each."""
    return {int(number): tests for number, _, _, tests in _ROW.findall(PAGE.read_text())}


def shown(tests: list[str]) -> str:
    """How the page names tests: by file, without the prefix that all of a row share."""
    by_file = defaultdict[str, list[str]](list)
    for test in tests:
        file, _, name = test.partition("::")
        by_file[file].append(_NAME.sub("", name))
    return "; ".join(f"`{file}`: {', '.join(names)}" for file, names in by_file.items())


def main() -> None:
    """Write the tests of every fault into the page."""
    found = named_after_faults()
    text = _ROW.sub(lambda row: f"| {row[1]} | {row[2]} | {row[3]} | {shown(found[int(row[1])])} |", PAGE.read_text())
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
