"""The call of a program's command line: usage errors are sentences like all others, and JSON with `--json`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from paychan.shared.called import called


def run(command: Any, typer: Any) -> NoReturn:
    """Run a click command with the arguments of this process, and end the process.

    `typer` is the module of that name, which this package does not import. Its own copy of Click has the base class of
    the errors for unknown options, missing arguments and wrong types. Such an error is a sentence like those of all
    other failures, or with `--json` among the arguments one JSON object on standard output; the exit status is 2.
    """
    words = sys.argv[1:]
    as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
    refused = typer.BadParameter.__mro__[2]
    try:
        status = command(standalone_mode=False)
    except refused as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _fail("usage", _sentence(error), error.exit_code, as_json=as_json)
        sys.exit(error.exit_code)
    except typer.Abort:
        _fail("aborted", "aborted at a question" if as_json else "Aborted.", 1, as_json=as_json)
    sys.exit(status if isinstance(status, int) else 0)


def _sentence(error: Any) -> str:
    """Say what is wrong with the command line, and which command shows its usage."""
    text = error.format_message().rstrip(".")
    option = getattr(error, "option_name", "") or ""
    if re.fullmatch(r"-[0-9]", option):
        given = next((word for word in sys.argv[1:] if word.startswith(option)), option)
        text = f"{given} is below 0: want a number of 0 or more"
    path = error.ctx.command_path if getattr(error, "ctx", None) else ""
    program, _, names = path.partition(" ")
    stop = "" if text.endswith("?") else "."
    return f"{text}{stop} `{called(program, *names.split(), '--help')}` shows the usage." if path else text + stop


def _fail(code: str, sentence: str, status: int, *, as_json: bool) -> NoReturn:
    if as_json:
        sys.stdout.write(json.dumps({"code": code, "error": sentence}, indent=2) + "\n")
    else:
        name = Path(sys.argv[0]).stem
        sys.stderr.write(f"{name}: {sentence}\n" if code == "usage" else f"{sentence}\n")
    sys.exit(status)
