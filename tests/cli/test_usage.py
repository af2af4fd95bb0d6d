"""Errors of the command line: one sentence in the style of all others, with the command that shows the usage."""

from __future__ import annotations

import sys

import pytest

from paychan.cli import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("channel pay 4593d97a -5", "-5 is below 0: want a number of 0 or more."),
        ("channel pay 4593d97a -15", "-15 is below 0: want a number of 0 or more."),
        ("channel pay --foo", "No such option: --foo."),
        ("channel pay", "Missing argument 'NAME'."),
        ("channel pay 4593d97a 1.5", "is not a whole number of satoshi, such as 1000, 1,000 or 1_000."),
        ("channel pay 4593d97a 1 --times 0", "got 0 payments, want at least 1."),
        ("nothing", "No such command 'nothing'."),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins with the program, as all errors do; the status is 2."""
    monkeypatch.setattr(sys, "argv", ["paychan", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main.main()

    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    [line] = shown.err.splitlines()
    assert line.startswith("paychan: ")
    assert said in line
    assert line.endswith("--help` shows the usage.")


def test_the_usage_names_arguments_as_texts_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts say NAME; Typer has braces around an argument that is required."""
    monkeypatch.setattr(sys, "argv", ["paychan", "channel", "pay", "--help"])
    with pytest.raises(SystemExit):
        main.main()

    assert "channel pay [OPTIONS] NAME [SAT]" in capsys.readouterr().out
