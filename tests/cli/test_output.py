"""Output of commands: no name is broken at any width, commands can be pasted, settings files are found."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from paychan.cli.main import app as paychan
from paychan.shared import wording
from paychan.shared.called import as_called, called
from paychan.shared.configfiles import SERVER, SIGNER, NoSettings, find_settings
from paychan.shared.layout import Column, Line, Value, facts, numbered, table
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System

NAMES = (
    "6ce4ba2b6245be9a1348088ff69480eebf9a73dd0f4fd899e4eedd77e716b82e:4",
    "2NDzaBegnbNBHz6YPu5TNKuDFPJayFXNw1K",
    "02cb37a2b3a9fbb7d1a2f6d6b2b7d5d6f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9",
    "12,345,678,900,000 sat",
    "(in 6 d 2 h)",
    "2026-01-02T03:04:05+01:00",
    "`paychan channel open 4593d97a --wallet 'my wallet'`",
)
texts = st.lists(st.sampled_from((*NAMES, "in", "one", "output;", "opening")), min_size=1, max_size=8).map(" ".join)


def shown(lines: list[Line]) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines]


@given(values=st.lists(texts, min_size=1, max_size=4), width=st.integers(20, 250) | st.none())
def test_fault_44_52_values_keep_their_names_whole_at_any_width(values: list[str], width: int | None) -> None:
    """Each name stands on one line; a line is too long only if it is one name; nothing is lost."""
    lines = shown(facts([(f"name {number}", value) for number, value in enumerate(values)], width))

    assert "".join("".join(lines).split()) == "".join(
        "".join(f"name {number} {value}".split()) for number, value in enumerate(values)
    )
    for value in values:
        for name in NAMES:
            assert sum(line.count(name) for line in lines) >= value.count(name)
    for line in lines:
        assert width is None or len(line) <= width or line.strip() in NAMES


@given(rows=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4), width=st.integers(20, 250) | st.none())
def test_fault_44_52_tables_keep_their_names_whole_at_any_width(
    rows: list[tuple[str, str, str]], width: int | None
) -> None:
    """As with values; without a terminal, a row of a table is one line."""
    columns = Column("channel"), Column("received", is_number=True), Column("outcome")
    lines = shown(table(columns, rows, width))

    for row in rows:
        for name in NAMES:
            assert sum(line.count(name) for line in lines) >= sum(cell.count(name) for cell in row)
    for line in lines:
        assert width is None or len(line) <= width or line.strip() in NAMES
    assert width is not None or len(lines) == len(rows) + 1


@pytest.mark.parametrize("width", [20, 40, 60, 200, None])
def test_fault_44_the_words_of_a_seed_are_whole_at_any_width(width: int | None) -> None:
    """All words are there with their numbers; a line fits."""
    words = [f"word{'x' * (number % 5)}" for number in range(24)]
    lines = numbered(words, width)

    found = re.findall(r"(\d+) (wordx*)", "\n".join(lines))
    assert sorted((int(number), word) for number, word in found) == list(enumerate(words, 1))
    assert width is None or max(map(len, lines)) <= width


def test_fault_52_a_command_is_alone_on_its_line_if_it_does_not_fit() -> None:
    """A command that is longer than the line is not broken, and has no space before it."""
    command = Value("paychan channel new https://shop.example", "green", whole=True)

    assert shown(facts([("Next", command)], 80)) == [f"Next  {command.text}"]
    assert shown(facts([("Next", command)], 30)) == ["Next", command.text]


@pytest.mark.parametrize("folder", ["bin", "my bin", "a'b"])
def test_fault_52_a_program_is_named_as_it_was_called(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its path as given; by its bare name where the shell found it; the other program stands beside it."""
    bin_ = tmp_path / folder
    bin_.mkdir()
    for name in ("paychan", "paychan-signer"):
        (bin_ / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    for place in (folder, str(bin_), f"./{folder}"):
        monkeypatch.setattr(sys, "argv", [f"{place}/paychan", "status"])
        assert shlex.split(called("paychan-signer", "init", "my dir")) == [f"{place}/paychan-signer", "init", "my dir"]
    monkeypatch.setenv("PATH", str(bin_))
    monkeypatch.setattr(sys, "argv", [f"{bin_}/paychan"])
    assert called("paychan", "up", "live") == "paychan up live"
    text = "no signer. Start it: `paychan-signer FILE`, or `paychan channel list`; not paychan-signer FILE"
    assert as_called(text, "my dir", {"channel": " --wallet w"}) == (
        "no signer. Start it: `paychan-signer 'my dir'`, or `paychan channel list --wallet w`; not paychan-signer FILE"
    )


def test_fault_44_a_settings_file_is_found_from_what_is_beside_it(tmp_path: Path) -> None:
    """The file itself under any name, its directory, the other program's file; errors name the wanted file."""
    live, other = tmp_path / "live", tmp_path / "other"
    for place in (live, other):
        place.mkdir()
        (place / "signer.toml").touch()
    (live / "server.toml").touch()
    (live / "mine.toml").touch()

    for given_ in (live, live / "server.toml", live / "signer.toml"):
        assert find_settings(given_, SERVER) == live / "server.toml"
        assert find_settings(given_, SIGNER) == live / "signer.toml"
    assert find_settings(live / "mine.toml", SERVER) == live / "mine.toml"
    assert find_settings(Path("debug"), SERVER).name == "server.toml"
    for given_, missing in (
        (other, "other/server.toml"),
        (other / "signer.toml", "there is no .*other/server.toml"),
        (tmp_path / "x", "x"),
    ):
        with pytest.raises(
            NoSettings, match=f"{missing}.* This command reads the settings of the server: give server.toml"
        ):
            find_settings(given_, SERVER)


def test_fault_52_one_style_of_numbers_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Amounts are grouped; times have their zone and the distance from now; durations have two units."""
    assert wording.sat(1_080) == "1,080 sat"
    assert wording.grouped("got 1000000 sat, need 999 sat; v1000 sat, 0x1000 sat, 10000 blocks, 1,000 sat") == (
        "got 1,000,000 sat, need 999 sat; v1000 sat, 0x1000 sat, 10000 blocks, 1,000 sat"
    )
    assert wording.moment(1_700_000_000, 1_700_000_000 - 6 * 86_400).endswith(" (in 6 d)")
    assert wording.clock(2**70) == f"{2**70:,} s after 1970"
    assert [wording.span(each) for each in (0, 59.9, 60, 3_600, 7_260, 86_400, 180_000)] == (
        ["0 s", "59 s", "1 min", "1 h", "2 h 1 min", "1 d", "2 d 2 h"]
    )
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    wording.time.tzset()
    try:
        assert wording.clock(1_700_000_000) == "2023-11-15T03:43:20+05:30"
    finally:
        monkeypatch.delenv("TZ")
        wording.time.tzset()


def test_fault_52_the_operator_may_shorten_a_channel(tmp_path: Path) -> None:
    """`channels show` and `close` take a unique beginning, and list the channels that an ambiguous one may mean."""
    with System(tmp_path) as system, httpx.Client(trust_env=False) as http:
        payers = [Payer(2_000_000_000 + number) for number in range(17)]
        for payer in payers:
            assert V1(system.url, payer, http).open(payer.payment(100_000)).status_code == 201

        def run(*words: str) -> str:
            result = CliRunner().invoke(paychan, ["channels", words[0], str(system.server_file.parent), *words[1:]])
            assert result.exit_code in (0, 1), result.output
            return result.output

        names = sorted(str(payer.outpoint) for payer in payers)
        digit = next(name[0] for name, after in itertools.pairwise(names) if name[0] == after[0])
        alike = [name for name in names if name.startswith(digit)]
        said = run("show", digit)
        assert f"several channels begin with {digit}" in said
        assert all(name in said.splitlines() for name in alike)
        assert f"funding source   {names[0]}" in run("show", names[0][:12].upper())
        assert "closed" in run("close", names[0][:30])
        assert "no channel's txid:vout begins with abcdefabcdef" in run("show", "abcdefabcdef")


@pytest.mark.parametrize("command", ["paychan", "paychan-signer"])
def test_fault_52_both_programs_say_their_version(command: str) -> None:
    """`--version` prints the name and the version of the installation."""
    from signer.commands import app as signer

    result = CliRunner().invoke(paychan if command == "paychan" else signer, ["--version"])

    assert result.exit_code == 0
    assert result.output.startswith(f"{command} ")
