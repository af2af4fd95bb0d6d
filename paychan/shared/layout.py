"""Lays out named values and tables for a terminal of any width. No word is cut or broken, so that it can be copied.

Without a terminal (width None), a value takes one line and a table takes one line for each row. The functions return
lines; a line is a list of pieces of text, each with the name of its style. The caller prints them without wrapping.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

LEAST_WIDTH = 20
_GAP = "  "
_MOST_COLUMNS = 4
_WORD = re.compile(
    r"(?:`[^`\n]*`|\((?:in )?[\d,]+ [^()\n]{1,20}\)|(?<!\S)[\d,.]+ (?:sat(?:/vB)?|BTC|s|min|h|d|%)(?!\w)|\S)+\s*"
)
"""A word with the space after it. One word each: a command between backticks, a number with its unit, `(in 6 d 2 h)`."""


class Value(NamedTuple):
    """A text with the name of its style; `whole` texts (commands, paths) are not broken at their spaces either."""

    text: str
    style: str = ""
    whole: bool = False


Piece: TypeAlias = tuple[str, str]
Line: TypeAlias = list[Piece]
Cell: TypeAlias = "str | Value"


class Column(NamedTuple):
    """The heading of a column of a table; numbers stand at its right end."""

    title: str
    is_number: bool = False


def facts(rows: Iterable[tuple[str, Cell]], width: int | None, indent: str = "") -> list[Line]:
    """Lay out named values: the names form a column, and a value that does not fit beside it begins on its own line."""
    shown = [(name, _value(cell)) for name, cell in rows]
    names = max((len(name) for name, _ in shown), default=0)
    lines: list[Line] = []
    for name, value in shown:
        beside = len(indent) + names + len(_GAP)
        parts = _broken(value, None if width is None else width - beside)
        if width is None or all(len(part) <= width - beside for part in parts):
            first, start = [(f"{indent}{name:{names}}{_GAP}", "dim")], beside
        else:
            first, start = [(indent + name, "dim")], 0 if value.whole else len(indent) + len(_GAP)
            lines.append(first)
            first, parts = [(" " * start, "")], _broken(value, width - start)
        for part in parts:
            lines.append([*first, (part, value.style)] if part else first)
            first = [(" " * start, "")]
    return lines


def table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], width: int | None) -> list[Line]:
    """Lay out a table in columns, or, on a terminal that is too narrow for them, each row as named values.

    Only the last column's texts are broken at their spaces, if that makes the table narrow enough.
    """
    cells = [[_value(cell) for cell in row] for row in rows]
    titles = [column.title for column in columns]
    sizes = [
        max(len(title), *(len(row[number].text) for row in cells)) if cells else len(title)
        for number, title in enumerate(titles)
    ]
    before = sum(sizes[:-1]) + len(_GAP) * (len(sizes) - 1)
    if width is not None and before + sizes[-1] > width:
        last = width - before
        if columns[-1].is_number or max(_longest_word(row[-1]) for row in cells) > last:
            return [line for row in cells for line in _record(titles, row, width)][:-1]
        sizes[-1] = last
    head = [Value(title, "dim") for title in titles]
    return [line for row in (head, *cells) for line in _row(columns, sizes, row)]


def _longest_word(value: Value) -> int:
    return (
        len(value.text) if value.whole else max((len(word.rstrip()) for word in _WORD.findall(value.text)), default=0)
    )


def numbered(words: Sequence[str], width: int | None) -> list[str]:
    """Lay out the words of a seed with their numbers, in up to four columns that are read downwards."""
    size = 3 + max(map(len, words), default=0) + len(_GAP)
    columns = _MOST_COLUMNS if width is None else min(_MOST_COLUMNS, max(1, width // size))
    rows = -(-len(words) // columns)
    return [
        "".join(f"{f'{number + 1:2} {words[number]}':{size}}" for number in range(row, len(words), rows)).rstrip()
        for row in range(rows)
    ]


def _record(titles: Sequence[str], row: Sequence[Value], width: int) -> Iterator[Line]:
    yield from facts([(title, value) for title, value in zip(titles, row, strict=True) if value.text], width)
    yield []


def _row(columns: Sequence[Column], sizes: Sequence[int], row: Sequence[Value]) -> Iterator[Line]:
    """Return the lines of a row: all columns but the last take one line."""
    line: Line = []
    for column, size, value in zip(columns[:-1], sizes, row, strict=False):
        space = " " * (size - len(value.text))
        line += (
            [(space, ""), (value.text, value.style)] if column.is_number else [(value.text, value.style), (space, "")]
        )
        line.append((_GAP, ""))
    for part in _broken(row[-1], sizes[-1]):
        space = " " * (sizes[-1] - len(part)) if columns[-1].is_number else ""
        yield [*line, (space, ""), (part, row[-1].style)]
        line = [(" " * (sum(sizes[:-1]) + len(_GAP) * (len(sizes) - 1)), "")]


def _value(cell: Cell) -> Value:
    return cell if isinstance(cell, Value) else Value(cell)


def _broken(value: Value, width: int | None) -> list[str]:
    """Break a text into lines at its spaces, as far as that is possible."""
    lines: list[str] = []
    for paragraph in value.text.splitlines() or [""]:
        if width is None or value.whole or len(paragraph) <= width:
            lines.append(paragraph)
            continue
        line = ""
        for word in _WORD.findall(paragraph):
            if line and len(line) + len(word.rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += word
        lines.append(line.rstrip())
    return lines
