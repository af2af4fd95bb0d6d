"""Code quotes a rule where it follows it; this test looks every quote up in the excerpts of `tests/spec/`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUOTES = re.compile(r'\b(BIP\d+): ((?:"[^"\n]+"(?:, )?)+)')


def quotes() -> list[tuple[str, str, Path]]:
    """Every `BIPn: "…"` of code and tests: document, text, and file."""
    paths = (path for folder in ("paychan", "actors", "signer", "tests") for path in (ROOT / folder).rglob("*.py"))
    return [
        (document.lower(), text, path)
        for path in paths
        for document, texts in QUOTES.findall(path.read_text())
        for text in re.findall(r'"([^"]+)"', texts)
    ]


def test_quotes_stand_in_their_documents() -> None:
    """Each quote is in its document, and there is at least one quote."""
    excerpts = {path.stem: path.read_text() for path in (ROOT / "tests" / "spec").glob("*.txt")}
    found = quotes()

    assert found
    assert [quote for quote in found if quote[1] not in excerpts.get(quote[0], "")] == []
