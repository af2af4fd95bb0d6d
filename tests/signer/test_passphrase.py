"""Sources of a passphrase or PIN: each source, their order, and that none shows the secret."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.secret import sources as passphrase
from signer.secret.sources import NoSecret, Secret, Sources, choose_secret, given_secret, read_secret
from tests.lib.looped import looped

WORD = "correct horse battery staple"


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests have no terminal and no credentials unless they make them."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with Path("/dev/null").open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield


def sources(**given: Any) -> Sources:
    return Sources("passphrase", "the seed", "key.passphrase_file", **given)


def private(path: Path, text: str = WORD) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


def piped(text: bytes, *, close: bool = True) -> int:
    reader, writer = os.pipe()
    os.write(writer, text)
    if close:
        os.close(writer)
    return reader


def read(where: Sources) -> str:
    with read_secret(where) as secret:
        return secret.value.decode()


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [WORD, f"{WORD}\n", f"{WORD}\r\n"])
def test_file_is_read_without_its_end(tmp_path: Path, text: str) -> None:
    """A file with one line gives that line, from the command line or from the configuration."""
    path = private(tmp_path / "p", text)

    assert read(sources(file=path)) == WORD
    assert read(sources(configured=str(path))) == WORD
    assert read(sources(beside=path)) == WORD


@looped("text", [WORD, f"{WORD}\n", f"{WORD}\nmore\n"])
def test_descriptor_is_read_and_closed(text: str) -> None:
    """A pipe gives its line, and the descriptor is closed, so that child processes don't inherit it."""
    reader = piped(text.encode())
    if "more" in text:
        with pytest.raises(NoSecret, match="not one line"):
            read(sources(descriptor=reader))
    else:
        assert read(sources(descriptor=reader)) == WORD
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)


def test_descriptor_needs_no_end_of_file() -> None:
    """A line in a pipe that stays open is enough: the reader does not wait for the end of the pipe."""
    assert read(sources(descriptor=piped(f"{WORD}\n".encode(), close=False))) == WORD


def test_closed_descriptor_is_an_error() -> None:
    """A descriptor that is not open is an error that shows how to open it."""
    with pytest.raises(NoSecret, match=r"descriptor 987 can't be read: .*987<FILE"):
        read(sources(descriptor=987))


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o600])
def test_credential_of_systemd_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    """The credential with the secret's name is read, also with the mode that an ACL gives it."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    private(tmp_path / "passphrase").chmod(mode)

    assert read(sources()) == WORD
    with pytest.raises(NoSecret):
        read(sources()._replace(name="pin"))


def test_credential_that_all_users_can_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A credential with a mode that systemd does not set is refused."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for mode in (0o444, 0o460, 0o640 | 0o004):
        private(tmp_path / "passphrase").chmod(mode)
        with pytest.raises(NoSecret, match="others can use it"):
            read(sources())


def test_order_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptor, command line file, configuration, credential, file beside the seed: the first one given counts."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    private(tmp_path / "passphrase", "credential")
    all_of_them = sources(
        descriptor=piped(b"descriptor"),
        file=private(tmp_path / "f", "file"),
        configured=str(private(tmp_path / "c", "configured")),
        beside=private(tmp_path / "b", "beside"),
    )

    assert read(all_of_them) == "descriptor"
    assert read(all_of_them._replace(descriptor=None)) == "file"
    assert read(all_of_them._replace(descriptor=None, file=None)) == "configured"
    assert read(all_of_them._replace(descriptor=None, file=None, configured="")) == "credential"
    (tmp_path / "passphrase").unlink()
    assert read(all_of_them._replace(descriptor=None, file=None, configured="")) == "beside"


def test_failing_source_is_not_skipped(tmp_path: Path) -> None:
    """A named source that can't be used is an error, even if there are others."""
    others = sources(file=tmp_path / "none", configured=str(private(tmp_path / "c")), beside=private(tmp_path / "b"))

    with pytest.raises(NoSecret, match=r"there is no .*none, which must hold the passphrase of the seed"):
        read(others)


def test_no_source_lists_them_all() -> None:
    """Without any source and without a terminal, the error lists all possible sources."""
    with pytest.raises(NoSecret) as refused:
        read(sources(beside=Path("/state/signer.passphrase")))

    for way in ("--passphrase-fd N", "--passphrase-file PATH", "key.passphrase_file", "systemd", "signer.passphrase"):
        assert way in str(refused.value)
    assert refused.value.key == ""
    assert given_secret(sources()) is None


def test_environment_and_arguments_are_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment variable is read except the credentials directory's."""
    for name in ("PASSPHRASE", "PAYCHAN_PASSPHRASE", "PAYCHAN_SIGNER_PASSPHRASE", "passphrase"):
        monkeypatch.setenv(name, WORD)
    with pytest.raises(NoSecret):
        read(sources())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o444])
def test_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    """The checks of the seed file also apply to the passphrase file."""
    path = private(tmp_path / "p")
    path.chmod(mode)
    with pytest.raises(NoSecret, match=f"mode {mode:04o}.*chmod 600"):
        read(sources(file=path))


def test_link_and_directory_are_refused(tmp_path: Path) -> None:
    """A link is not followed, and a directory is no file."""
    (tmp_path / "link").symlink_to(private(tmp_path / "p"))
    for name in ("link", ""):
        with pytest.raises(NoSecret, match=r"can't be opened|not a regular file"):
            read(sources(file=tmp_path / name))


@pytest.mark.parametrize("text", ["", "\n", "\r\n", f"{WORD}\n{WORD}\n", f"{WORD}\0", "x" * 1025])
def test_other_content_than_one_line_is_refused(tmp_path: Path, text: str) -> None:
    """An empty file, several lines or another kind of file is an error that shows none of the content."""
    with pytest.raises(NoSecret, match=r"is empty|not one line|more than 1024 bytes") as refused:
        read(sources(file=private(tmp_path / "p", text)))
    assert WORD not in str(refused.value)


def test_short_passphrase_is_not_chosen_but_opens(tmp_path: Path) -> None:
    """A new passphrase has at least 8 characters; an existing one may have any length."""
    path = private(tmp_path / "p", "1234567")
    with pytest.raises(NoSecret, match="of 7 characters can be guessed: need at least 8"):
        choose_secret(sources(file=path))
    assert read(sources(file=path)) == "1234567"


def test_new_passphrase_is_not_the_old_ones_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new passphrase has its own sources: configuration and credential hold the old one."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    private(tmp_path / "passphrase")

    with pytest.raises(NoSecret, match=r"--new-passphrase-fd N, --new-passphrase-file PATH, or a terminal"):
        choose_secret(sources(replaces=True))


# --- the terminal -----------------------------------------------------------------------------------------------------


class Typed:
    """Answers at the prompt, in this order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
        self.questions: list[str] = []
        self._answers = list(answers)
        monkeypatch.setattr(passphrase.prompt, "read_hidden", self._answer)

    def _answer(self, question: str) -> bytearray:
        self.questions.append(question)
        if not self._answers:
            raise EOFError
        return bytearray(self._answers.pop(0).encode())


class Terminal:
    """Replaces standard input."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sys, "stdin", Terminal())
    return monkeypatch


def test_terminal_is_asked_last(terminal: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The prompt comes only if no other source is given, and names its object."""
    typed = Typed(terminal, WORD)

    assert read(sources(beside=private(tmp_path / "b", "beside"))) == "beside"
    assert typed.questions == []
    assert read(sources()) == WORD
    assert typed.questions == ["Passphrase of the seed: "]


def test_new_passphrase_is_typed_twice(terminal: pytest.MonkeyPatch) -> None:
    """A new passphrase is requested twice; after three slips nothing is changed."""
    typed = Typed(terminal, WORD, WORD, *[WORD, WORD[:-1]] * 3)

    with choose_secret(sources()) as secret:
        assert secret.value.decode() == WORD
    assert typed.questions == ["New passphrase of the seed: ", "Again: "]
    with pytest.raises(NoSecret, match="the two passphrases differ: nothing was changed"):
        choose_secret(sources())


def test_end_of_input_is_an_error(terminal: pytest.MonkeyPatch) -> None:
    """Ctrl-D at the prompt is an error that names the other sources."""
    Typed(terminal)
    with pytest.raises(NoSecret, match=r"no passphrase was typed.*--passphrase-file"):
        read(sources())


def test_terminal_as_descriptor_is_refused() -> None:
    """A terminal as descriptor would show the typed secret."""
    own, other = pty.openpty()
    try:
        with pytest.raises(NoSecret, match=f"descriptor {other} is a terminal"):
            read(sources(descriptor=other))
    finally:
        os.close(own)
        os.close(other)


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_secret_is_wiped_and_never_shown() -> None:
    """After its block a secret is zeros, also after an error, and no text of it shows a byte."""
    secret = Secret(bytearray(WORD.encode()))
    value = secret.value

    assert WORD not in repr(secret) + str(secret) + repr([secret])
    with pytest.raises(ZeroDivisionError), secret:
        _ = 1 / 0
    assert value == bytes(len(WORD))
