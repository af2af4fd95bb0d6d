"""The operator's earlier terms, a file in the state directory; written only at a start with changed terms."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import structlog

from paychan.protocol.terms import Held, OpeningTerms, TermsHistory
from paychan.protocol.types import UnixTime

log = structlog.get_logger("server")

_NAME = "terms.json"
_decoder = msgspec.json.Decoder(tuple[Held, ...])


def present(state_dir: Path, terms: OpeningTerms, hold_seconds: int, now: UnixTime) -> TermsHistory:
    """Read the earlier terms and record the present ones.

    If the file can't be read or written, the server starts without it: earlier terms then end at once for payers.
    """
    path = state_dir / _NAME
    before = TermsHistory(_read(path), hold_seconds)
    history = before.with_present(terms, now)
    if history.held != before.held:
        try:
            _write(path, msgspec.json.format(msgspec.json.encode(history.held)))
        except OSError as error:
            log.warning("terms are not recorded", file=str(path), reason=error.strerror)
    return history


def _read(path: Path) -> tuple[Held, ...]:
    try:
        return _decoder.decode(path.read_bytes())
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("earlier terms can't be read", file=str(path), reason=str(error))
        return ()


def _write(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
