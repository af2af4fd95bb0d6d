"""Lines of the spending log, and the account that follows from them. It is pure.

A line is JSON, a space, and the CRC-32 of the JSON. Prices count when they are agreed on. No later line lowers a sum, because
such lines follow from answers of servers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import msgspec
from msgspec import Struct

from paychan.client.errors import DamagedFile, Declined
from paychan.client.paying.budget import Sums

DAY_SECONDS = 86_400
KEPT_DAYS = 400
"""Newest days whose sums go from one file of the log to the next."""

_MOST_TEXT = 2048
_MOST_RECEIPT = 16_384
_KEPT_ANSWERS = 10_000
"""Paid requests without an answer that are kept in memory at most; older ones are paid anew."""


class Paid(Struct, frozen=True, tag="paid", tag_field="line", omit_defaults=True):
    """A payment that was decided: its signature may have left the wallet."""

    request: str
    """Id of the request, which the server gets: the same for each try."""
    key: str
    """Digest of method, URL and body."""
    at: int
    """Unix time."""
    host: str
    """`host:port`, as requested."""
    method: str
    url: str
    channel: str
    """Outpoint of the channel, `txid:vout`."""
    price_sat: int
    change_sat: int
    """Change value of the newest payment of the channel, which pays for this request."""
    counted_sat: int
    """Part of the price that no earlier line of this request has counted."""
    raised_sat: int = 0
    """Sum by which this request's tries raised the signed sum of the channel together."""


class Answered(Struct, frozen=True, tag="answered", tag_field="line", omit_defaults=True):
    """The answer to a paid request: the request is finished."""

    request: str
    at: int
    status: int
    channel: str
    spent_sat: int
    """Sum of all charges of the channel after it, as the wallet expects it."""
    charged_sat: int
    receipt: str = ""
    """`PAYMENT-RESPONSE` or `Payment-Receipt`, as received."""


class Unpaid(Struct, frozen=True, tag="unpaid", tag_field="line", omit_defaults=True):
    """The server answered a paid request with 402. The request is open: its next try costs nothing more."""

    request: str
    at: int
    code: str
    reason: str


class Corrected(Struct, frozen=True, tag="corrected", tag_field="line", omit_defaults=True):
    """The sum of all charges of a channel, as a server corrected it."""

    channel: str
    at: int
    spent_sat: int


class Declination(Struct, frozen=True, tag="declined", tag_field="line", omit_defaults=True):
    """A payment that the budget or its `approve` did not allow, or that the wallet could not make."""

    at: int
    host: str
    method: str
    url: str
    price_sat: int
    code: str
    reason: str


class Carried(Struct, frozen=True, tag="carried", tag_field="line", omit_defaults=True):
    """The account after all lines of the files before this one; the first line of a file."""

    at: int
    total_sat: int
    declined: int
    by_host: dict[str, int]
    by_day: dict[str, dict[str, int]]
    """By number of the day, in digits, and host."""
    spent: dict[str, int]
    signed: dict[str, int]
    open: list[Paid]
    unpaid: list[str]


Line: TypeAlias = Carried | Paid | Answered | Unpaid | Corrected | Declination

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Line)


class Account:
    """Sums and open requests that follow from the lines of a log."""

    def __init__(self) -> None:
        self.total_sat = 0
        self.by_host: dict[str, int] = {}
        self.by_day: dict[int, dict[str, int]] = {}
        """Sums by day (number since 1970-01-01) and host."""
        self.open: dict[str, Paid] = {}
        """The newest paid request without a good answer, by `Paid.key`."""
        self.unpaid: set[str] = set()
        """Names of open requests that the server answered with 402; the answers to the others were lost."""
        self.spent: dict[str, int] = {}
        """Expected sum of all charges of a channel, by outpoint."""
        self.signed: dict[str, int] = {}
        """Least change value that was decided for a channel, by outpoint: a crash may have kept it out of the wallet."""
        self.declined = 0
        self._keys: dict[str, str] = {}

    def sums(self, host: str, now: int) -> Sums:
        """Return the sums that limits compare. A day has also what a fast clock wrote for later days."""
        today = now // DAY_SECONDS
        day_sat = sum(sum(hosts.values()) for day, hosts in self.by_day.items() if day >= today)
        return Sums(self.by_host.get(host, 0), day_sat, self.total_sat)

    def add(self, line: Line) -> None:
        match line:
            case Carried():
                self._take_over(line)
            case Paid():
                self.total_sat += line.counted_sat
                self.by_host[line.host] = self.by_host.get(line.host, 0) + line.counted_sat
                hosts = self.by_day.setdefault(line.at // DAY_SECONDS, {})
                hosts[line.host] = hosts.get(line.host, 0) + line.counted_sat
                self._enter(line)
            case Answered():
                self.spent[line.channel] = line.spent_sat
                self._close(line.request)
            case Corrected():
                self.spent[line.channel] = line.spent_sat
            case Declination():
                self.declined += 1
            case Unpaid():
                if line.request in self._keys:
                    self.unpaid.add(line.request)

    def carried(self, now: int) -> Carried:
        """Return the first line of the next file. Days that no limit compares any more are left out."""
        oldest = now // DAY_SECONDS - KEPT_DAYS
        return Carried(
            at=now,
            total_sat=self.total_sat,
            declined=self.declined,
            by_host=self.by_host,
            by_day={str(day): hosts for day, hosts in self.by_day.items() if day >= oldest},
            spent=self.spent,
            signed=self.signed,
            open=list(self.open.values()),
            unpaid=sorted(self.unpaid),
        )

    def _take_over(self, line: Carried) -> None:
        self.total_sat, self.declined = line.total_sat, line.declined
        self.by_host, self.spent, self.signed = dict(line.by_host), dict(line.spent), dict(line.signed)
        self.by_day = {int(day): dict(hosts) for day, hosts in line.by_day.items()}
        for paid in line.open:
            self._enter(paid)
        self.unpaid = set(line.unpaid)

    def _enter(self, line: Paid) -> None:
        earlier = self.open.pop(line.key, None)
        if earlier is not None:
            self._close(earlier.request)
        self.open[line.key] = line
        self._keys[line.request] = line.key
        self.signed[line.channel] = min(line.change_sat, self.signed.get(line.channel, line.change_sat))
        if len(self.open) > _KEPT_ANSWERS:
            self._close(next(iter(self.open.values())).request)

    def _close(self, request: str) -> None:
        key = self._keys.pop(request, "")
        self.unpaid.discard(request)
        if key in self.open and self.open[key].request == request:
            del self.open[key]


def larger(mine: Carried, other: Carried) -> Carried:
    """Join two accounts of one wallet, such as its own and a backup's: each sum is the larger one, so none goes back.

    Of a channel, the larger sum of charges and the smaller change value count. The open requests of `other` count only if
    `mine` has no payment yet: later lines of `mine` may have closed them.
    """
    is_new = not mine.total_sat and not mine.open
    return msgspec.structs.replace(
        mine,
        total_sat=max(mine.total_sat, other.total_sat),
        declined=max(mine.declined, other.declined),
        by_host=_joined(mine.by_host, other.by_host, max),
        by_day={
            day: _joined(mine.by_day.get(day, {}), other.by_day.get(day, {}), max)
            for day in sorted(mine.by_day.keys() | other.by_day.keys(), key=int)
        },
        spent=_joined(mine.spent, other.spent, max),
        signed=_joined(mine.signed, other.signed, min),
        open=other.open if is_new else mine.open,
        unpaid=other.unpaid if is_new else mine.unpaid,
    )


def _joined(mine: dict[str, int], other: dict[str, int], chosen: Callable[[int, int], int]) -> dict[str, int]:
    return {**mine, **{name: chosen(mine.get(name, sat), sat) for name, sat in other.items()}}


def declination(error: Declined, at: int, host: str, method: str, url: str, price_sat: int) -> Declination:
    """Return the line of a payment that was not made."""
    return Declination(at, host, method, shortened(url), price_sat, error.code, shortened(str(error)))


def shortened(text: str) -> str:
    """Cut a text that others chose, so that no line grows without bound."""
    return text[:_MOST_TEXT]


def kept_receipt(header: str) -> str:
    """Return a receipt as received, or "" if it is longer than any of this library's kinds: a part proves nothing."""
    return header if len(header) <= _MOST_RECEIPT else ""


def encoded(line: Line) -> bytes:
    raw = _ENCODER.encode(line)
    return b"%s %08x\n" % (raw, zlib.crc32(raw))


def parsed(raw: bytes, path: Path) -> Iterator[tuple[Line, int]]:
    """Read lines; give each with the offset of its end. A last line that is not whole ends the reading.

    Raises:
        DamagedFile: another line is not whole.
    """
    start = 0
    while start < len(raw):
        stop = raw.find(b"\n", start)
        found = None if stop < 0 else _line(raw[start:stop])
        if found is None:
            if 0 <= stop < len(raw) - 1:
                raise DamagedFile(path=path, reason=f"the line at byte {start} does not fit its checksum")
            return
        yield found, stop + 1
        start = stop + 1


def _line(raw: bytes) -> Line | None:
    content, _, checksum = raw.rpartition(b" ")
    if checksum != b"%08x" % zlib.crc32(content):
        return None
    try:
        return _DECODER.decode(content)
    except msgspec.MsgspecError:
        return None
