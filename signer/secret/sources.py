"""Sources of a secret that the operator gives to the signer: the seed's passphrase, a token's PIN.

The order is: a file descriptor, a file named on the command line, a file named in the configuration, a credential of
systemd, a file beside the seed, a prompt on the terminal. The first one that is given counts. Never an argument or an
environment variable: other processes can read both.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from signer.secret import prompt
from signer.secret.file import MissingFile, PrivateFileError, plain, read_private
from signer.secret.wiping import wipe, wiped

MIN_CHOSEN_BYTES = 8
"""Least length of a new passphrase; an existing one may have any length."""

ROUNDS = 3
"""Attempts at a prompt for a new secret."""

_MAX_BYTES = 1024
_STANDARD_ERROR = 2


class NoSecret(Exception):
    """A secret is not available: `key` names the option or setting that was given, "" for none; the text, how to mend it.

    Never holds any part of the secret.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


class NoneTyped(NoSecret):
    """No usable secret was typed at a prompt: no setting is wrong."""


class Secret:
    """Bytes that are wiped when the `with` block ends, and never shown."""

    __slots__ = ("value",)

    def __init__(self, value: bytearray) -> None:
        self.value = value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        wipe(self.value)

    def __repr__(self) -> str:
        return "Secret()"


class Sources(NamedTuple):
    """All sources that may hold one secret."""

    name: str
    """Name of the secret: "passphrase", "pin"; systemd's credential has the same name."""
    of: str
    """Object that the secret opens, for the prompt on the terminal."""
    key: str
    """The setting that may name its file."""
    configured: str = ""
    descriptor: int | None = None
    file: Path | None = None
    beside: Path | None = None
    replaces: bool = False
    """It is a new secret; configuration, credential and the file beside the seed hold the old one."""

    @property
    def credential(self) -> Path | None:
        """Path of systemd's credential; only the directory's name is in the environment."""
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        return Path(directory) / self.name if directory and not self.replaces else None

    @property
    def named(self) -> str:
        """The option or setting that an error names; "" if the secret was typed, or its file was found."""
        option = f"--{'new-' * self.replaces}{self.name}"
        if self.descriptor is not None:
            return f"{option}-fd"
        if self.file is not None:
            return f"{option}-file"
        return self.key if self.configured else ""

    @property
    def ways(self) -> str:
        """All sources, for the error message when none is given."""
        option = f"--{'new-' * self.replaces}{self.name}"
        ways = [f"{option}-fd N", f"{option}-file PATH"]
        if not self.replaces:
            ways += [f"{self.key} in the configuration", f'a systemd credential called "{self.name}"']
        if self.beside is not None:
            ways.append(f"a file {self.beside}")
        return f"{', '.join(ways)}, or a terminal to ask on"


def read_secret(sources: Sources) -> Secret:
    """Get an existing secret.

    Raises:
        NoSecret: no source, or the given one can't be used.
    """
    return _given(sources) or _asked(sources)


def given_secret(sources: Sources) -> Secret | None:
    """Get the secret from its source, without a prompt; None if no source is given. Raises `NoSecret`."""
    return _given(sources)


def choose_secret(sources: Sources) -> Secret:
    """Get a new secret; at a prompt it has to be typed twice, and is asked for again after a slip.

    Raises:
        NoSecret: no source, or too short.
        NoneTyped: each of `ROUNDS` inputs at the prompt was too short, or differed from its repetition.
    """
    given = _given(sources)
    if given is not None:
        if problem := _too_short(sources, given):
            wipe(given.value)
            raise NoSecret(sources.named, problem)
        return given
    if not input_is_terminal():
        raise NoSecret(key="", reason=_no_source(sources))
    problem = ""
    for _ in range(ROUNDS):
        hint = f"{problem[0].upper()}{problem[1:]}.\n" if problem else ""
        typed = _typed_twice(sources, hint)
        if isinstance(typed, Secret):
            return typed
        problem = typed
    raise NoneTyped(sources.key, f"{problem}: nothing was changed after {ROUNDS} attempts")


def input_is_terminal() -> bool:
    """Whether standard input is a terminal; a process may have no standard input."""
    return bool(sys.stdin) and sys.stdin.isatty()


def _given(sources: Sources) -> Secret | None:
    if sources.descriptor is not None:
        return _parse(sources, f"descriptor {sources.descriptor}", _read_descriptor(sources, sources.descriptor))
    named = sources.file or (Path(sources.configured) if sources.configured else None)
    if named is not None:
        return _from_file(sources, named)
    credential = sources.credential
    if credential is not None and os.path.lexists(credential):
        return _from_file(sources, credential, credential=True)
    if sources.beside is not None and os.path.lexists(sources.beside):
        return _from_file(sources, sources.beside)
    return None


def _from_file(sources: Sources, path: Path, *, credential: bool = False) -> Secret:
    try:
        content = read_private(plain(path), _MAX_BYTES, credential=credential)
    except MissingFile:
        raise NoSecret(
            sources.named, f"there is no {path}, which must hold the {sources.name} of {sources.of}"
        ) from None
    except PrivateFileError as error:
        raise NoSecret(sources.named, str(error)) from None
    return _parse(sources, str(path), content)


def _read_descriptor(sources: Sources, number: int) -> bytearray:
    """Read one line, and close the descriptor, so that no child process inherits it."""
    if os.isatty(number):
        raise NoSecret(
            sources.named,
            f"descriptor {number} is a terminal, which would show the secret: leave the option out to get a prompt",
        )
    content = bytearray(_MAX_BYTES + 1)
    size = 0
    try:
        with memoryview(content) as view:
            while b"\n" not in content and (count := os.readv(number, [view[size:]])):
                size += count
        if number > _STANDARD_ERROR:
            os.close(number)
    except OSError as error:
        raise NoSecret(
            sources.named, f"descriptor {number} can't be read: {error.strerror}. Open it as in `… {number}<FILE`"
        ) from None
    with wiped(content), memoryview(content) as view:
        return bytearray(view[:size])


def _parse(sources: Sources, where: str, content: bytearray) -> Secret:
    """Parse one line without its line end; any other content is another kind of file."""
    size = len(content)
    for end in (b"\n", b"\r"):
        size -= content.endswith(end, 0, size)
    with wiped(content), memoryview(content) as view:
        problem = ""
        if not size:
            problem = "is empty"
        elif size > _MAX_BYTES or content.find(b"\n", 0, size) >= 0 or b"\x00" in content:
            problem = "is not one line of text"
        if problem:
            raise NoSecret(sources.named, f"{where} {problem}: it must hold the {sources.name} of {sources.of}")
        return Secret(bytearray(view[:size]))


def _asked(sources: Sources) -> Secret:
    if not input_is_terminal():
        raise NoSecret(key="", reason=_no_source(sources))
    typed = _ask(sources, f"{sources.name.capitalize()} of {sources.of}")
    return _parse(sources, "what was typed", typed)


def _typed_twice(sources: Sources, hint: str) -> Secret | str:
    """Ask for a new secret and for its repetition; return it, or what is wrong with it."""
    first = Secret(bytearray())
    try:
        first = _parse(sources, "what was typed", _ask(sources, f"{hint}New {sources.name} of {sources.of}"))
        if problem := _too_short(sources, first):
            wipe(first.value)
            return problem
        with Secret(_ask(sources, "Again")) as second:
            if first.value == second.value:
                return first
    except NoneTyped:
        wipe(first.value)
        raise
    except NoSecret as error:
        return str(error)
    wipe(first.value)
    return f"the two {sources.name}s differ"


def _ask(sources: Sources, question: str) -> bytearray:
    try:
        return prompt.read_hidden(f"{question}: ")
    except EOFError:
        raise NoneTyped(sources.key, f"no {sources.name} was typed. {_no_source(sources)}") from None


def _too_short(sources: Sources, secret: Secret) -> str:
    """Return what is wrong with a new secret that can be guessed; "" if it is long enough."""
    size = len(secret.value)
    if size >= MIN_CHOSEN_BYTES:
        return ""
    return f"a {sources.name} of {size} characters can be guessed: need at least {MIN_CHOSEN_BYTES}"


def _no_source(sources: Sources) -> str:
    return f"the {sources.name} of {sources.of} is given by none of: {sources.ways}"
