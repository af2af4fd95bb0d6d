"""Plain technical English: no comment, docstring, message or page has a phrase of `tests/spec/language.toml`."""

from __future__ import annotations

import pytest

from tests.lib.language import FOLDERS, ROOT, files, findings, texts_of_python


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_phrase_needs_two_readings(folder: str) -> None:
    """The folder's sentences are plain."""
    assert [found for path in files(folder) for found in findings(path)] == []


def test_the_pages_at_the_top_are_plain() -> None:
    """README, CHANGELOG, CONTRIBUTING and SECURITY, too."""
    assert [found for path in sorted(ROOT.glob("*.md")) for found in findings(path)] == []


@pytest.mark.parametrize(
    "sentence",
    [
        "Somebody waits.",
        "The rest is for whoever asks.",
        "It was told to stop.",
        "A key of ours.",
        "After so many bytes it ends.",
    ],
)
def test_the_check_finds_what_it_looks_for(sentence: str) -> None:
    """A phrase in a comment, in a docstring and in a message is found, with its line."""
    source = f'"""{sentence}"""\n\n# {sentence}\nraise ValueError("{sentence}")\n'
    texts = list(texts_of_python(source))

    assert [text.line for text in texts] == [1, 3, 4]
