"""The call of a program's command line: with `--json`, usage errors are JSON, too."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn


def run(command: Any, typer: Any) -> NoReturn:
    """Run a click command with the arguments of this process, and end the process.

    `typer` is the module of that name, which this package does not import. Its own copy of Click has the base class of
    the errors for unknown options, missing arguments and wrong types. If `--json` is among the arguments, an error of the parser is one JSON object on standard output; the
    exit status stays 2.
    """
    words = sys.argv[1:]
    if "--json" not in (words[: words.index("--")] if "--" in words else words):
        sys.exit(command())
    refused = typer.BadParameter.__mro__[2]
    try:
        status = command(standalone_mode=False)
    except refused as error:
        _fail("usage", error.format_message(), error.exit_code)
    except typer.Abort:
        _fail("aborted", "aborted at a question", 1)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(code: str, sentence: str, status: int) -> NoReturn:
    sys.stdout.write(json.dumps({"code": code, "error": sentence}, indent=2) + "\n")
    sys.exit(status)
