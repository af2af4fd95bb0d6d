"""Plain technical English: no comment, docstring, message or page has a phrase of `tests/spec/language.toml`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lib.language import FOLDERS, ROOT, RULES, files, findings, hits, texts_of_python


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_phrase_needs_two_readings(folder: str) -> None:
    """The folder's sentences are plain."""
    assert [found for path in files(folder) for found in findings(path)] == []


def test_the_pages_at_the_top_are_plain() -> None:
    """README, CHANGELOG, CONTRIBUTING and SECURITY, too."""
    assert [found for path in sorted(ROOT.glob("*.md")) for found in findings(path)] == []


@pytest.mark.parametrize("rule", RULES["pattern"], ids=lambda rule: rule["name"])
def test_each_rule_finds_its_example(rule: dict[str, Any]) -> None:
    """The example of a rule is found as a docstring, and, unless the rule is for docstrings, as a comment and a message."""
    example = rule["example"]
    source = f'"""{example}"""\n\n# {example}\nraise ValueError("{example}")\n'
    found = {line for text in texts_of_python(source) for line, _, by in hits(text) if by is rule}

    assert sorted(found) == ([1] if rule.get("docstring") else [1, 3, 4])
