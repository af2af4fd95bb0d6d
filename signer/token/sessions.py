"""Sessions with a token: a fixed number, each used by one thread at a time. For `keys`.

A session may be lost first: the token was unplugged, its network failed, or it forgot the login. So work is retried
once, with a new session. A call that hangs blocks its own session only.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """The token can't be used: names the setting, and says how to mend it. Never holds any part of the PIN."""

    def __init__(self, *, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


class Sessions:
    """Logged-in sessions with one token.

    Keeps a copy of the PIN, which is needed again when the token has forgotten the login; `close` wipes it.

    Raises:
        TokenError: no such token, or it refused the PIN or this number of sessions.
    """

    def __init__(self, library: Library, token: str, pin: bytearray, *, sessions: int, wait_seconds: float) -> None:
        self._library = library
        self._token = token
        self._pin = bytearray(pin)
        self._pin_refused: CryptokiError | None = None
        self._wait_seconds = wait_seconds
        self._opening = Lock()
        self._is_closed = False
        self._idle: SimpleQueue[Session | None] = SimpleQueue()
        self._slot = find_slot(library, token)
        # If threads must not call the library at the same time, there is one session, which serves as the lock.
        self.count = sessions if library.threads else 1
        for _ in range(self.count):
            try:
                self._idle.put(self._open())
            except CryptokiError as error:
                raise _start_problem(error, self.count) from None

    def run(self, work: Callable[[Session, bool], _T]) -> _T:
        """Run work with a session; if the token fails, retry once with a new one.

        `work` gets True at the second try: then all handles read before are invalid.

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

    def close(self) -> None:
        """Wait for a login under way, close idle sessions, and wipe the PIN. A session in use ends with the process.

        SoftHSM rewrites the token's file at each login: a process that ends meanwhile can leave it empty.
        """
        self._is_closed = True
        with self._opening:
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
        """Raises `CryptokiError`, and `KeysFailed` while another thread waits for the token to open one."""
        if not self._opening.acquire(timeout=self._wait_seconds):
            msg = f"token {self._token!r} has not answered an earlier request yet"
            raise KeysFailed(msg)
        try:
            if self._is_closed:
                msg = f"the signer has closed token {self._token!r}"
                raise KeysFailed(msg)
            try:
                session = self._library.open_session(self._slot)
            except CryptokiError:  # the library was finalised, or the token is in another slot now
                self._library.initialize()
                self._slot = self._slot_again()
                session = self._library.open_session(self._slot)
            self._login(session)
        finally:
            self._opening.release()
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
            if error.code == Code.USER_ALREADY_LOGGED_IN:  # by another session
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
    """Return the slot of the token with this label.

    Raises:
        TokenError: there is none, or more than one.
        CryptokiError: the library fails.
    """
    tokens = library.tokens()
    slots = [info.slot for info in tokens if info.label == token]
    if len(slots) != 1:
        present = ", ".join(repr(info.label) for info in tokens if info.label) or "none"
        reason = f"{len(slots)} tokens have the label {token!r}; present labels: {present}"
        raise TokenError(key="pkcs11.token", reason=reason)
    return slots[0]


def _start_problem(error: CryptokiError, sessions: int) -> TokenError:
    if error.code in _PIN_REFUSED:
        return TokenError(
            key="pkcs11.pin_file",
            reason=f"the token refused the PIN ({error}): correct it before the next start; a few wrong PINs lock the token",
        )
    if error.code == Code.USER_PIN_NOT_INITIALIZED:
        return TokenError(key="pkcs11.token", reason=f"the token has no user PIN ({error}): set one with its own tools")
    if error.code == Code.SESSION_COUNT:
        return TokenError(key="pkcs11.sessions", reason=f"the token does not allow {sessions} ({error}): lower it")
    return TokenError(key="pkcs11.token", reason=f"no session with the token: {error}")
