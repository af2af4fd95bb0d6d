"""Commands that texts of the programs name: each exists, with its options."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import typer

from paychan.cli.main import app as paychan

ROOT = Path(__file__).parents[2]
_NAMED = re.compile(r"`(paychan(?:-signer)?) ([a-z][^`]*)`")


def texts(path: Path) -> set[str]:
    """String constants of a module that names commands, with NAME in place of the values of f-strings."""
    found = set[str]()
    source = path.read_text()
    if "`paychan" not in source:  # each worker reads all modules
        return found
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "NAME" for part in node.values)
            found.add("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(re.sub(r"\{\w+\}", "NAME", node.value))
    return found


def named() -> list[tuple[str, str]]:
    """Program and further words of each command in the modules."""
    return sorted(
        {
            (command[1], " ".join(command[2].split()))
            for folder in ("paychan", "actors", "signer")
            for path in (ROOT / folder).rglob("*.py")
            for text in texts(path)
            for command in _NAMED.finditer(text)
        }
    )


def test_fault_52_a_command_that_a_text_names_exists_with_its_options() -> None:
    """Each command between backticks is one of the program, and has the options that stand there."""
    found = named()
    from signer.commands import app as signer

    programs: dict[str, Any] = {
        "paychan": typer.main.get_command(paychan),
        "paychan-signer": typer.main.get_command(signer),
    }
    for program, line in found:
        check(programs[program], line)
    assert {program for program, _ in found} == set(programs)


def check(command: Any, line: str) -> None:
    """Fail unless a program has the command of the line, with these options."""
    words = shlex.split(line)
    while words and hasattr(command, "get_command") and command.get_command(None, words[0]) is not None:
        command = command.get_command(None, words.pop(0))

    assert not hasattr(command, "get_command") or not words or words[0].startswith(("FILE", "NAME", "--")), line
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= options | {"--help"}, line
