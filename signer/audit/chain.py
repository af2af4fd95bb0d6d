"""Lines of the audit log: one JSON object for every decision, chained by hashes. Pure; `file` keeps the lines.

    {"n":7,"at_ms":…,"peer_uid":…,…,"reason":"","previous":"<hash of line 6>","hash":"<hash of this line>"}

`hash` is the SHA-256, in hex, of the line's bytes before `,"hash":`, as they stand in the file; so a line can be
checked without knowing how it was encoded. `n` counts from 1, `previous` is 64 zeros in line 1. Any change, removal,
insertion or move breaks the chain at its place. Two changes do not: removing the last lines, and rewriting all lines
from some place on. Those are found with a hash that is kept elsewhere, by the ledger or by the operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Struct

ARCHIVE = "archive"
"""Value of `asked` in the first line of a log whose earlier lines are in another file."""

MAX_ABOUT_BYTES = 128 * 1024
"""More than a settlement of the most claims needs. Of anything longer only the size is logged: a peer must not cause
slow lines, or a request that can't be logged.
"""

_HASH_FIELD = b',"hash":"'
_SUFFIX_BYTES = len(_HASH_FIELD) + 64 + len(b'"}\n')

Verdict: TypeAlias = Literal["signed", "given", "would-refuse", "refused", "failed"]


class Decision(Struct, frozen=True, kw_only=True):
    """A request, its content, and the decision."""

    at_ms: int
    """Unix milliseconds."""
    peer_uid: int
    asked: str
    """Name of the request message."""
    about: dict[str, Any]
    """Content of the request in JSON types; bytes as hex."""
    digest: str
    """Of the whole request, in hex; "" for requests without one."""
    verdict: Verdict
    tag: str = ""
    reason: str = ""


class Entry(Decision, frozen=True, kw_only=True):
    """A line that was read."""

    n: int
    previous: str
    hash: str


class Head(Struct, frozen=True):
    """State of a log: its number of lines, and the hash of the last."""

    count: int
    hash: str

    def __str__(self) -> str:
        return f"{self.count}:{self.hash}"


BEGINNING = Head(0, "0" * 64)


class AuditBroken(Exception):
    """A line was changed or is in the wrong place; `line` counts within the file, from 1 (0: not known)."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}" if line else reason)
        self.line = line
        self.reason = reason


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Entry)


def encode_lines(decisions: Sequence[Decision], head: Head) -> tuple[bytes, Head]:
    """Encode the lines that follow `head`; return them, each with its newline, and the new head."""
    lines = bytearray()
    for decision in decisions:
        body = b'{"n":%d,%b,"previous":"%b"' % (head.count + 1, _fields(decision), head.hash.encode())
        head = Head(head.count + 1, sha256(body).hexdigest())
        lines += b'%b%b%b"}\n' % (body, _HASH_FIELD, head.hash.encode())
    return bytes(lines), head


def _fields(decision: Decision) -> bytes:
    encoded = _encoder.encode(decision)
    if len(encoded) > MAX_ABOUT_BYTES:
        short = {"left_out_bytes": len(encoded)}
        encoded = _encoder.encode(msgspec.structs.replace(decision, about=short, reason=decision.reason[:1000]))
    return encoded[1:-1]


def read_line(line: bytes) -> Entry:
    """Read one line with its newline, and check its own hash.

    Raises:
        AuditBroken: torn, edited, or not a line of such a log; without its number.
    """
    if not line.endswith(b"\n"):
        raise AuditBroken(0, f"torn: the file ends within it, after {len(line)} bytes")
    try:
        entry = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AuditBroken(0, f"edited: no decision can be read from it ({error})") from None
    body, suffix = line[:-_SUFFIX_BYTES], line[-_SUFFIX_BYTES:]
    digest = sha256(body).hexdigest()
    if suffix != b'%b%b"}\n' % (_HASH_FIELD, digest.encode()):
        raise AuditBroken(0, f"edited: its hash is {digest}, it says {entry.hash[:64]}")
    return entry


def follows(entry: Entry, head: Head) -> str | None:
    """Return the reason why a line can't come after `head`, or None."""
    want = head.count + 1
    if entry.n > want:
        missing = f"number {want} is" if entry.n == want + 1 else f"numbers {want} to {entry.n - 1} are"
        return f"removed: it is number {entry.n}, but {missing} missing before it"
    if entry.n < want:
        return f"inserted or moved: it is number {entry.n} where {want} belongs"
    if entry.previous != head.hash:
        return (
            f"does not follow the line before, which was edited or replaced: that has the hash {head.hash}, "
            f"number {entry.n} was written after {entry.previous[:64]}"
        )
    return None


def beginning(entry: Entry) -> Head:
    """Return the head that the first line of a file continues: an empty log, or the log that was archived then."""
    return Head(entry.n - 1, entry.previous) if entry.asked == ARCHIVE and entry.n > 1 else BEGINNING


def verify(lines: Iterable[bytes], head: Head | None = None) -> Iterator[Entry]:
    """Check lines, each with its newline, and yield them in order.

    `head` is the head that the first line must follow; None if no earlier lines are available.

    Raises:
        AuditBroken: at the first wrong line.
    """
    for number, line in enumerate(lines, 1):
        try:
            entry = read_line(line)
        except AuditBroken as error:
            raise AuditBroken(number, error.reason) from None
        head = beginning(entry) if head is None else head
        problem = follows(entry, head)
        if problem is not None:
            raise AuditBroken(number, problem)
        head = Head(entry.n, entry.hash)
        yield entry
