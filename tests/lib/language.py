"""Finds phrases of `tests/spec/language.toml` in comments, docstrings, messages and pages.

`python -m tests.lib.language [FOLDER…]` lists them with their lines and what to write instead.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
RULES = tomllib.loads((ROOT / "tests" / "spec" / "language.toml").read_text())
FOLDERS = ("paychan", "actors", "signer", "config", "bench", "tests")
SPELLS_THE_PHRASES = {"tests/spec/language.toml", "tests/lib/language.py", "tests/protocol/test_language.py"}


class Text(NamedTuple):
    """A piece of text: a comment line, a string, or a line of a page."""

    line: int
    text: str
    is_docstring: bool


def _docstrings(tree: ast.AST) -> set[int]:
    """Return the first lines of all docstrings, including those after an assignment."""
    lines = set[int]()
    todo = [tree]
    while todo:
        node = todo.pop()
        for name in ("body", "orelse"):
            body = getattr(node, name, None)
            for statement in body if isinstance(body, list) else ():
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    lines.add(statement.lineno)
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):  # expressions hold no docstring
            inside = getattr(node, name, None)
            todo += inside if isinstance(inside, list) else []
    return lines


def texts_of_python(source: str) -> Iterator[Text]:
    """Yield comments, docstrings and strings of several words."""
    docstrings = _docstrings(ast.parse(source))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "COMMENT":
            yield Text(token.start[0], token.string.lstrip("# "), is_docstring=False)
        elif kind in ("STRING", "FSTRING_MIDDLE") and " " in token.string:
            text = token.string.lstrip("rfbuRFBU").strip("\"'")
            yield Text(token.start[0], text, is_docstring=token.start[0] in docstrings)


def texts_of(path: Path) -> Iterator[Text]:
    """Yield the texts of a file that people read."""
    source = path.read_text()
    if path.suffix == ".py":
        yield from texts_of_python(source)
    elif path.suffix == ".md":
        for number, line in enumerate(source.splitlines(), 1):
            yield Text(number, line, is_docstring=False)
    else:
        for number, line in enumerate(source.splitlines(), 1):
            if "#" in line:
                yield Text(number, line.partition("#")[2], is_docstring=False)


def files(*folders: str) -> list[Path]:
    """Return the files of the repository that hold sentences."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    paths += sorted(ROOT.glob("*.md")) if folders == FOLDERS else []
    names = (".py", ".md", ".toml", ".service")
    return [path for path in paths if path.suffix in names and "results" not in path.parts]


class Pattern(NamedTuple):
    """A forbidden phrase, compiled, and its rule."""

    phrase: re.Pattern[str]
    rule: dict[str, Any]


PATTERNS = [
    Pattern(re.compile(phrase if phrase.startswith(("^", "\\b", "(")) else rf"\b{phrase}", re.IGNORECASE), rule)
    for rule in RULES["pattern"]
    for phrase in rule["phrases"]
]
_BETWEEN_TEXTS = "\n\0\n"
"""No pattern matches across it."""


def _plain(text: Text) -> str:
    """Return a text without the names in code, which have their own rules."""
    return re.sub(r"`[^`]*`", "`code`", text.text)


def hits(text: Text, patterns: Sequence[Pattern] = PATTERNS) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield line, phrase and rule for each forbidden phrase of a text."""
    plain = _plain(text)
    for phrase, rule in patterns:
        if rule.get("docstring") and not text.is_docstring:
            continue
        for hit in phrase.finditer(plain):
            yield text.line + plain[: hit.start()].count("\n"), hit[0], rule


def _possible(texts: Sequence[Text]) -> list[Pattern]:
    """Return the patterns that one of these texts may have: a search in all of them at once is cheap."""
    together = _BETWEEN_TEXTS.join(map(_plain, texts))
    return [each for each in PATTERNS if each.phrase.pattern.startswith("^") or each.phrase.search(together)]


def findings(path: Path) -> list[str]:
    """Return each forbidden phrase of a file: place, phrase, and a better wording."""
    name = path.relative_to(ROOT).as_posix()
    allowed = [phrase for glob, phrases in RULES["allow"].items() if fnmatch(name, glob) for phrase in phrases]
    texts = [] if name in SPELLS_THE_PHRASES else list(texts_of(path))
    patterns = _possible(texts)
    return [
        f"{name}:{line}: “{phrase}” is {rule['name']}: {rule['better']}"
        for text in texts
        for line, phrase, rule in hits(text, patterns)
        if phrase.strip() not in allowed
    ]


def main() -> None:
    """List all findings."""
    for path in files(*(sys.argv[1:] or FOLDERS)):
        for found in findings(path):
            sys.stdout.write(found + "\n")


if __name__ == "__main__":
    main()
