"""A token's sessions: as many as may work side by side, each lent to one thread at a time. For `pkcs11` alone.

The first thing that may be lost is a session: the token was unplugged, its network failed, it forgot the login. So work
is tried again, once, with a new session. A call that hangs keeps its own session and stops nobody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Lock
from typing import TypeVar

import structlog

from signer.keys.ring import KeysFailed
from signer.secret.wiping import wipe
from signer.token.constants import Code, CryptokiError
from signer.token.cryptoki import Library, Session

log = structlog.get_logger()

_T = TypeVar("_T")

_PIN_REFUSED = {Code.PIN_INCORRECT, Code.PIN_INVALID, Code.PIN_LEN_RANGE, Code.PIN_EXPIRED, Code.PIN_LOCKED}


class TokenError(Exception):
    """The token can't be used: which setting it is about, and what to do. Never holds anything of the PIN."""

    def __init__(self, *, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


class Sessions:
    """Logged-in sessions with one token.

    Keeps a copy of the PIN, which is needed again when the token forgot the login; `close` wipes it.

    Raises:
        TokenError: no such token, or it refused the PIN or so many sessions.
    """

    def __init__(self, library: Library, token: str, pin: bytearray, *, sessions: int, wait_seconds: float) -> None:
        self._library = library
        self._token = token
        self._pin = bytearray(pin)
        self._pin_refused: CryptokiError | None = None
        self._wait_seconds = wait_seconds
        self._opening = Lock()
        self._idle: SimpleQueue[Session | None] = SimpleQueue()
        self._slot = find_slot(library, token)
        # A library that threads must not call at once is used through one session: that is its lock.
        self.count = sessions if library.threads else 1
        for _ in range(self.count):
            try:
                self._idle.put(self._open())
            except CryptokiError as error:
                raise _start_problem(error, self.count) from None

    def run(self, work: Callable[[Session, bool], _T]) -> _T:
        """Do something with a session; once more, with a new one, if the token fails.

        `work` is told whether this is the second try: then no handle that was got before is good any more.

        Raises:
            KeysFailed: all sessions are busy, or the token failed twice.
        """
        session = self._take()
        try:
            if session is not None:
                try:
                    return work(session, False)
                except CryptokiError as error:
                    log.warning("token failed, trying a new session", error=str(error))
                    _close(session)
                    session = None
            session = self._open()
            return work(session, True)
        except CryptokiError as error:
            _close(session)
            session = None
            msg = f"token {self._token!r} failed: {error}"
            raise KeysFailed(msg) from None
        finally:
            self._idle.put(session)

    @contextmanager
    def exclusive(self, lock: Lock) -> Iterator[None]:
        """Hold a lock, which others may hold while they wait for the token.

        Raises:
            KeysFailed: they did for too long.
        """
        if not lock.acquire(timeout=self._wait_seconds):
            msg = f"token {self._token!r} gave no answer to somebody else yet"
            raise KeysFailed(msg)
        try:
            yield
        finally:
            lock.release()

    def close(self) -> None:
        """Close what is idle, and forget the PIN. What hangs is left to the end of the process."""
        wipe(self._pin)
        for _ in range(self.count):
            try:
                _close(self._idle.get_nowait())
            except Empty:
                return

    def _take(self) -> Session | None:
        try:
            return self._idle.get(timeout=self._wait_seconds)
        except Empty:
            msg = f"all {self.count} sessions with token {self._token!r} are busy"
            raise KeysFailed(msg) from None

    def _open(self) -> Session:
        """Raises `CryptokiError`."""
        with self.exclusive(self._opening):
            try:
                session = self._library.open_session(self._slot)
            except CryptokiError:  # the library was finalised, or the token is in another slot now
                self._library.initialize()
                self._slot = self._slot_again()
                session = self._library.open_session(self._slot)
            self._login(session)
        return session

    def _slot_again(self) -> int:
        try:
            return find_slot(self._library, self._token)
        except TokenError:
            raise CryptokiError(Code.TOKEN_NOT_PRESENT, "C_GetSlotList") from None

    def _login(self, session: Session) -> None:
        """Log in, unless the token has refused this PIN before: tokens lock after a few wrong ones."""
        if self._pin_refused is not None:
            raise self._pin_refused
        try:
            session.login(self._pin)
        except CryptokiError as error:
            if error.code == Code.USER_ALREADY_LOGGED_IN:  # by another session of ours
                return
            if error.code in _PIN_REFUSED:
                self._pin_refused = error
            _close(session)
            raise


def _close(session: Session | None) -> None:
    if session is not None:
        try:
            session.close()
        except CryptokiError as error:
            log.debug("session was gone already", error=str(error))


def find_slot(library: Library, token: str) -> int:
    """Return the slot that the token with this label is in.

    Raises:
        TokenError: there is none, or more than one.
        CryptokiError: the library does not tell.
    """
    tokens = library.tokens()
    slots = [info.slot for info in tokens if info.label == token]
    if len(slots) != 1:
        present = ", ".join(repr(info.label) for info in tokens if info.label) or "none"
        reason = f"{len(slots)} tokens have the label {token!r}; the labels there are: {present}"
        raise TokenError(key="pkcs11.token", reason=reason)
    return slots[0]


def _start_problem(error: CryptokiError, sessions: int) -> TokenError:
    if error.code in _PIN_REFUSED:
        return TokenError(
            key="pkcs11.pin_file",
            reason=f"the token refused the PIN ({error}): correct it before starting again, a few wrong ones lock the token",
        )
    if error.code == Code.USER_PIN_NOT_INITIALIZED:
        return TokenError(key="pkcs11.token", reason=f"the token has no user PIN ({error}): set one with its own tools")
    if error.code == Code.SESSION_COUNT:
        return TokenError(key="pkcs11.sessions", reason=f"the token does not allow {sessions} ({error}): lower it")
    return TokenError(key="pkcs11.token", reason=f"no session with the token: {error}")
