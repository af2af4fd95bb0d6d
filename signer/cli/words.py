"""The dialogue about backup words: shows them once, asks for some of them, reads them back."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from paychan.protocol.types import UnixTime
from paychan.shared import words as mnemonic
from paychan.shared.layout import numbered
from paychan.shared.ownpage import own_page
from signer.cli.options import CommandFailed, on_terminal
from signer.cli.terminal import out, say, terminal_width
from signer.secret.file import PrivateFileError, plain, read_private, write_new
from signer.secret.sources import input_is_terminal
from signer.secret.wiping import wipe
from signer.seed.file import Seed, seed_of_hex, seed_of_words

REPEATED = 3
ROUNDS = 3

_MAX_BACKUP_BYTES = 4096


@contextmanager
def handed_out(seed: Seed, words_file: Path | None) -> Iterator[None]:
    """Make sure that the operator has the words, on paper or in a file, before the block stores the seed.

    Raises:
        CommandFailed: the words were not repeated correctly.
        PrivateFileError: the file can't be written.
    """
    words = mnemonic.to_words(seed.secret)
    if words_file is None:
        _hand_out(words)
        yield
        return
    write_new(words_file, (" ".join(words) + "\n").encode())
    try:
        yield
    except BaseException:  # words of a seed that was not stored would only mislead
        words_file.unlink()
        raise
    say(f"The words are in {words_file}. Move it to a place that no program reads: the words give access to all keys.")


def require_terminal(words_file: Path | None) -> None:
    """Raise `CommandFailed` if the words would be shown to no person."""
    if words_file is None and not on_terminal():
        msg = (
            "the words are shown once, on a terminal, and this is not a terminal. "
            "For a script: `--words-file PATH` writes them to a new file"
        )
        raise CommandFailed(msg)


def take_back(words_file: Path | None, now: UnixTime, *, raw: bool) -> Seed:
    """Read a backup: words or hex digits, from a file, from standard input, or typed.

    Raises:
        SeedError: it is no valid backup; the text says why.
        PrivateFileError: the file can't be used.
    """
    if words_file is None and input_is_terminal():
        return seed_of_hex(_type_hex(), now) if raw else seed_of_words(_type_words(), now)
    text = _read(words_file)
    return seed_of_hex(text, now) if raw else seed_of_words(text.split(), now)


def _hand_out(words: Sequence[str]) -> None:
    for _ in range(ROUNDS):
        _show(words)
        if _repeat(words):
            return
    msg = f"the words were not repeated in {ROUNDS} rounds: nothing was changed"
    raise CommandFailed(msg)


def _show(words: Sequence[str]) -> None:
    """Show the words in columns, on a page of the terminal that disappears afterwards."""
    with own_page(out):
        say(f"The backup: {len(words)} words, shown only once\n")
        for line in numbered(words, terminal_width()):
            say(line, "bold")
        say(
            "\nWrite them down on paper, with their numbers. They give access to all keys. Without them and without the\n"
            f"seed file, the money in open channels is lost. You will be asked for {REPEATED} of them."
        )
        out.input("\nPress Enter when you have written them down. ")


def _repeat(words: Sequence[str]) -> bool:
    """Ask for some of the words."""
    asked = sorted(secrets.SystemRandom().sample(range(len(words)), REPEATED))
    with own_page(out):
        for number in asked:
            answer = out.input(f"Word {number + 1}: ")
            if mnemonic.find(answer) != words[number]:
                break
        else:
            return True
    say(f"Word {number + 1} is a different word. The words are shown again.", "yellow")
    out.input("Press Enter to see them. ")
    return False


def _type_words() -> list[str]:
    """Ask for words, one or several at a time; each is checked at once."""
    words: list[str] = []
    with own_page(out):
        say("Type the words of the backup, one or several at a time; four letters of each are enough.")
        say("After the last one, press Enter on an empty line.")
        while len(words) < max(mnemonic.WORD_COUNTS):
            typed = out.input(f"Word {len(words) + 1}: ").split()
            if not typed:
                break
            for word in typed:
                if mnemonic.find(word) is None:
                    say(mnemonic.unknown(len(words) + 1, word), "yellow")
                    break
                words.append(word)
    return words


def _type_hex() -> str:
    with own_page(out):
        return out.input("Seed, hex digits: ")


def _read(path: Path | None) -> str:
    if path is None or str(path) == "-":
        return sys.stdin.read(_MAX_BACKUP_BYTES) if sys.stdin else ""
    content = read_private(plain(path), _MAX_BACKUP_BYTES)
    try:
        return content.decode("ascii")
    except UnicodeDecodeError:
        msg = f"{path} is not a text of words or digits"
        raise PrivateFileError(msg) from None
    finally:
        wipe(content)
