"""Commands about keys on a real terminal: the console script shows words and asks for them."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from paychan.protocol.wire.signer_messages import Health, HealthReply
from paychan.shared.words import to_words
from signer.cli import words as backup
from signer.seed.encryption import CHOSEN
from tests.lib.pseudoterminal import PseudoTerminal
from tests.lib.signer_process import COMMAND
from tests.signer.place import ABANDON, WORD, Place, make_place, private, run
from tests.signer.talking import ask


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def choose_passphrase(terminal: PseudoTerminal) -> None:
    terminal.read_until("New passphrase of [^:]*: ")
    terminal.enter(WORD)
    terminal.read_until("Again: ")
    terminal.enter(WORD)


def shows(text: str, words: list[str]) -> bool:
    """Whether a word stands in a text after its number, as in the dialogue; elsewhere it may be part of a sentence."""
    return any(re.search(rf"\d:?\s+{word}\b", text) for word in words)


def read_words(terminal: PseudoTerminal) -> list[str]:
    """Read the words from the screen, as an operator does."""
    terminal.read_until("Press Enter when you have written them down")
    page = terminal.text.split("shown only once")[-1]
    found = dict(re.findall(r"(\d+) ([a-z]{3,8})\b", page))
    terminal.enter("")
    return [found[str(number)] for number in range(1, 25)]


def repeat_words(terminal: PseudoTerminal, words: list[str]) -> None:
    asked = set()
    for _ in range(backup.REPEATED):
        number = int(terminal.read_until(r"Word (\d+): ")[1])
        terminal.enter(words[number - 1])
        asked.add(number)
    assert len(asked) == backup.REPEATED


def test_init_and_recover_on_a_terminal(place: Place, tmp_path: Path) -> None:
    """Init shows 24 words, again after a wrong answer; typed at another place, they give the same seed."""
    with PseudoTerminal([COMMAND, "init", place.file]) as terminal:
        terminal.read_until("Destination: ")
        terminal.enter("seed")
        choose_passphrase(terminal)
        words = read_words(terminal)
        terminal.read_until(r"Word \d+: ")
        assert not place.seed.exists()
        terminal.enter("zebra" if words[0] != "zebra" else "zoo")
        terminal.read_until("is a different word.*Press Enter to see them")
        terminal.enter("")
        assert read_words(terminal) == words
        repeat_words(terminal, words)
        assert terminal.wait() == 0

    (seed,) = place.seeds()
    assert json.loads(place.seed.read_text())["n"] == CHOSEN.n
    assert to_words(seed.secret) == words
    assert f"fingerprint of its master key is {seed.fingerprint}" in terminal.text_left
    assert stat.S_IMODE(place.seed.stat().st_mode) == 0o600
    assert WORD not in terminal.output
    assert shows(terminal.text, words)
    assert not shows(terminal.text_left, words)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = make_place(elsewhere)
    with PseudoTerminal([COMMAND, "recover", other.file]) as terminal:
        terminal.read_until("Where do the earnings go.*Destination: ")
        terminal.enter("Seed")
        terminal.read_until("Word 1: ")
        terminal.enter(" ".join(words[:5]))
        terminal.read_until("Word 6: ")
        terminal.enter("abandom")
        terminal.read_until('word 6, "abandom", is not one of the 2048 words: perhaps abandon')
        terminal.enter(" ".join(word[:4] for word in words[5:23]))
        terminal.read_until("Word 24: ")
        terminal.enter(words[23])
        choose_passphrase(terminal)
        assert terminal.wait() == 0
    assert other.seeds()[0].master == seed.master
    assert shows(terminal.text, words)
    assert not shows(terminal.text_left, words)


def test_init_asks_again_after_a_slip_in_the_passphrase(place: Place) -> None:
    """A short passphrase or another "Again" is named and asked about again; three slips end it, and blame no setting."""
    order = [COMMAND, "init", place.file, "--destination", "seed", "--words-file", place.file.with_name("words")]
    with PseudoTerminal(order) as terminal:
        terminal.read_until("New passphrase of [^:]*signer.seed: ")
        terminal.enter("short")
        terminal.read_until("A passphrase of 5 characters can be guessed: need at least 8.")
        choose_passphrase(terminal)
        assert terminal.wait() == 0
    assert place.seeds()
    place.seed.unlink()
    place.file.with_name("words").unlink()
    with PseudoTerminal(order) as terminal:
        terminal.read_until("New passphrase of [^:]*: ")
        terminal.enter("")
        terminal.read_until("What was typed is empty")
        for _ in range(2):
            terminal.read_until("New passphrase of [^:]*: ")
            terminal.enter(WORD)
            terminal.read_until("Again: ")
            terminal.enter(WORD[:-1])
        terminal.read_until("the two passphrases differ: nothing was changed")
        assert terminal.wait() == 2
    assert "passphrase_file" not in terminal.text
    assert not place.seed.exists()


def test_a_missing_seed_is_named_before_its_passphrase(place: Place) -> None:
    """The start and each command on the seed name the missing file and `init`; none asks for its passphrase."""
    commands = [[], ["verify"], ["passphrase"], ["export-xpub"], ["forget"], ["rotate", "seed"], ["recover", "--older"]]
    for command in commands:
        order = [COMMAND, *command, place.file, *(["73c5da0a"] if command == ["forget"] else [])]
        with PseudoTerminal(order) as terminal:
            terminal.read_until("there is no [^:]*signer.seed: .*signer init ")
            assert terminal.wait() == 2
        assert "assphrase of" not in terminal.text, command


def test_words_that_are_not_repeated_make_no_seed(place: Place) -> None:
    """If the words are not repeated correctly in three rounds, no seed is created."""
    with PseudoTerminal(
        [COMMAND, "init", place.file, "--destination", "seed", "--passphrase-file", place.passphrase]
    ) as terminal:
        for _ in range(backup.ROUNDS):
            read_words(terminal)
            terminal.read_until(r"Word \d+: ")
            terminal.enter("nonsense")
            terminal.read_until("Press Enter to see them")
            terminal.enter("")
        assert terminal.wait() == 2
    assert "the words were not repeated in 3 rounds: nothing was changed" in terminal.text_left
    assert not place.seed.exists()


def test_control_c_makes_no_seed(place: Place) -> None:
    """Ctrl-C while words are shown ends the command, removes them from the screen, and creates no seed."""
    with PseudoTerminal(
        [COMMAND, "init", place.file, "--destination", "seed", "--passphrase-file", place.passphrase]
    ) as terminal:
        terminal.read_until("Press Enter when you have written them down")
        assert terminal.end_by_control_c() == 2
    assert "stopped" in terminal.text_left
    assert "1 " not in terminal.text_left
    assert not place.seed.exists()


def test_start_asks_for_the_passphrase(place: Place) -> None:
    """On a terminal the signer asks for the passphrase, does not show it, and serves."""
    run(place, "recover", "--words-file", str(private(place.file.with_name("words"), ABANDON)))
    with PseudoTerminal([COMMAND, place.file]) as terminal:
        terminal.read_until("Passphrase of [^:]*signer.seed: ")
        terminal.enter(WORD)
        terminal.read_until("signer started")
        reply = ask(place.file.with_name("signer.sock"), Health(1))
        terminal.kill()
        assert terminal.wait() == 0
    assert isinstance(reply, HealthReply)
    assert WORD not in terminal.output


def test_passphrase_reaches_the_signer_by_descriptor_and_credential(place: Place) -> None:
    """The console script reads the passphrase from a pipe or from systemd's directory, and verifies a backup with it."""
    words = private(place.file.with_name("words"), ABANDON)
    run(place, "recover", "--words-file", str(words))
    reader, writer = os.pipe()
    os.write(writer, WORD.encode())
    os.close(writer)
    command = [COMMAND, "verify", place.file, "--words-file", words]

    piped = subprocess.run(
        [*command, "--passphrase-fd", str(reader)], pass_fds=[reader], capture_output=True, text=True, check=True
    )
    os.close(reader)
    found = subprocess.run(
        command,
        env={**os.environ, "CREDENTIALS_DIRECTORY": str(place.passphrase.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )

    assert "yes, this is its backup" in piped.stdout
    assert found.stdout == piped.stdout
