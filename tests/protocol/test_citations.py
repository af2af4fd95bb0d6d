"""Citations of code, tests and pages: the cited sections, defects, threats, files and tests exist."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

from tests.lib.looped import looped
from tests.lib.threats import THREATS

ROOT = Path(__file__).parents[2]
RBPCP = ROOT / "paychan" / "protocol" / "RBPCP.md"

_LIST = r"(?:,? (?:and|to|or) |, |-)"
_SECTIONS = re.compile(rf"RBPCP §[0-9.]*[0-9](?:{_LIST}(?:RBPCP )?§[0-9.]*[0-9])*")
_THREATS = re.compile(rf"\b[Tt]hreats? ([0-9]+(?:{_LIST}[0-9]+)*)")
_DEFECT = re.compile(r"\bD([0-9]{1,2})\b")
_PATH = re.compile(r"`((?:paychan|actors|signer|tests|bench|config)/[\w./-]+\w/?)(?:::(\w+))?`")


@cache
def sources() -> dict[Path, str]:
    """The text of every file of the repository that may cite."""
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    names = tracked.stdout.split() if tracked.returncode == 0 else [str(path) for path in ROOT.rglob("*")]
    paths = (ROOT / name for name in names if name.endswith((".py", ".md", ".toml")))
    return {path: path.read_text() for path in paths if path.is_file() and ".venv" not in path.parts}


def where(path: Path, text: str, at: int) -> str:
    return f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, at) + 1}"


def test_sections_exist() -> None:
    """Each `§` belongs to a citation of the specification, `RBPCP §x.y`, and the specification has that section."""
    headings = set(re.findall(r"(?m)^##+ ([0-9.]*[0-9])", RBPCP.read_text()))
    cited, wrong = 0, []
    for path, text in sources().items():
        if path in (RBPCP, Path(__file__)):
            continue
        spans = [found.span() for found in _SECTIONS.finditer(text)]
        for mark in re.finditer(r"§(?!x\.y)([0-9.]*[0-9])?", text):
            cited += 1
            if mark[1] not in headings or not any(begin <= mark.start() < end for begin, end in spans):
                wrong.append(f"{where(path, text, mark.start())} {mark[0]}")

    assert wrong == []
    assert cited
    assert set(re.findall(r"§([0-9.]*[0-9])", RBPCP.read_text())) <= headings


def test_defects_exist() -> None:
    """Each `D` with a number is a row of the specification's defects."""
    rows = set(re.findall(r"(?m)^\| D([0-9]+) \|", RBPCP.read_text()))
    wrong = [
        f"{where(path, text, found.start())} {found[0]}"
        for path, text in sources().items()
        for found in _DEFECT.finditer(text)
        if found[1] not in rows
    ]

    assert rows
    assert wrong == []


def test_threats_exist() -> None:
    """Each number after the word threat is a row of the page of threats."""
    rows = THREATS.rows
    wrong = [
        f"{where(path, text, found.start())} {found[0]}"
        for path, text in sources().items()
        for found in _THREATS.finditer(text)
        for number in re.findall(r"[0-9]+", found[1])
        if int(number) not in rows
    ]

    assert wrong == []


@looped("path", [path for path in sources() if path.suffix == ".md"], ids=lambda path: path.name)
def test_files_and_tests_that_pages_name_exist(path: Path) -> None:
    """A path in backticks is a file or folder of the repository or its tests; a test named after it is in that file."""
    wrong = []
    for found in _PATH.finditer(sources()[path]):
        target = next((each for each in (ROOT / found[1], ROOT / "tests" / found[1]) if each.exists()), None)
        if target is None or (found[2] and f"def {found[2]}(" not in target.read_text()):
            wrong.append(found[0])

    assert wrong == []


def test_links_between_pages_lead_somewhere() -> None:
    """The target of a relative link exists."""
    wrong = [
        f"{path.relative_to(ROOT)} {target}"
        for path, text in sources().items()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
        if not (path.parent / target).exists()
    ]

    assert wrong == []
