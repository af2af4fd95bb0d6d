"""Pages of folders: each lists the files of its folder, in reading order, and says what the folder is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import SLOWEST
from tests.lib.readme import PAGES, ROOT

FOLDERS = (
    "actors", "bench", "config", "paychan", "paychan/api", "paychan/callback", "paychan/chain", "paychan/cli", "paychan/client",
    "paychan/gateway", "paychan/mcp", "paychan/mpp", "paychan/js", "paychan/protocol", "paychan/sell", "paychan/store", "paychan/x402", "signer", "tests",
)  # fmt: skip
LISTED_AS_FOLDERS = {"bench", "tests"}
"""Folders whose page may list a folder in it as one row; the others list each file."""

WHAT_EXPLAINS_ITSELF = {"__init__.py", "py.typed", "README.md", "RBPCP.md", "THREATS.md"}
MOST_LINES_OF_README = 200


def page_of(folder: str) -> str:
    return (ROOT / folder / "README.md").read_text()


def listed(folder: str) -> list[str]:
    """The files that a page lists, in its order."""
    _, heading, rest = page_of(folder).partition("\n## Files, in reading order\n")
    assert heading, f"{folder}/README.md has no heading “Files, in reading order”"
    return re.findall(r"(?m)^\| `([^`]+)` \| \S", rest.partition("\n## ")[0])


def present(folder: str) -> set[str]:
    """The files that a page must list: those of its folder and of folders in it without their own page."""
    top = ROOT / folder
    found = set[str]()
    for path in top.rglob("*"):
        parts = path.relative_to(top).parts
        own_page = any((top.joinpath(*parts[:depth]) / "README.md").exists() for depth in range(1, len(parts)))
        made_by_tools = any(part[0] == "." or part == "__pycache__" for part in parts)
        if path.is_dir() or own_page or made_by_tools or path.name in WHAT_EXPLAINS_ITSELF:
            continue
        whole = folder in LISTED_AS_FOLDERS and len(parts) > 1
        found.add(f"{parts[0]}/" if whole else "/".join(parts))
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_page_lists_each_file_of_its_folder_once(folder: str) -> None:
    """The page of a folder has a row for each of its files, and none for a deleted file."""
    names = listed(folder)

    assert len(set(names)) == len(names)
    assert set(names) == present(folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_page_begins_with_its_folder_and_has_a_drawing(folder: str) -> None:
    """The first line names the folder and what it is for; a drawing shows the process or the flow."""
    page = page_of(folder)

    assert re.match(rf"# {folder}: \S+ \S+", page)
    assert re.search(r"(?m)^```\n[^`]*[─▶][^`]*^```$", page)


def test_every_folder_of_code_has_a_page() -> None:
    """Each module is in a folder with a page, or in a folder below one."""
    tops = {Path(folder).parts[0] for folder in FOLDERS}

    assert tops == {path.parent.name for path in ROOT.glob("*/*.py")} | {"config"}
    assert {str(page.parent.relative_to(ROOT)) for top in tops for page in (ROOT / top).rglob("README.md")} == set(
        FOLDERS
    )


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    """README.md has at most 200 lines, and links to the page of each folder."""
    text = (ROOT / "README.md").read_text()

    assert len(text.splitlines()) <= MOST_LINES_OF_README
    for folder in FOLDERS:
        assert f"]({folder}/README.md)" in text, folder


def test_links_to_headings_lead_to_headings() -> None:
    """A link with `#name` leads to a heading of that page, by the names that the code host makes of headings."""
    wrong = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", page.read_text()):
            other = (page.parent / target) if target else page
            headings = re.findall(r"(?m)^#+ (.+)$", other.read_text())
            if anchor not in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}:
                wrong.append(f"{page.relative_to(ROOT)} {target}#{anchor}")

    assert wrong == []


def test_the_slow_files_of_the_suite_exist() -> None:
    """The order of the whole suite names test files that exist, each once."""
    assert len(set(SLOWEST)) == len(SLOWEST)
    assert [name for name in SLOWEST if not (ROOT / "tests" / name).is_file()] == []
