"""Wrong frames for the signer's parser, in large numbers: `python -m tests.signer.fuzz 1000000 [SEED]`.

A frame is determined by its number and the seed, so that a failure can be reproduced.
"""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paychan.protocol.settlement import Coin, Reserve
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    MAX_FRAME_BYTES,
    AgainRequest,
    BehindRequest,
    ChildRequest,
    KeyRequest,
    Newest,
    OtherKeysRequest,
    Request,
    ReserveRequest,
    ShownRequest,
    StatusRequest,
    WireError,
    decode_request,
    encode_frame,
    frame_size,
)
from paychan.protocol.wire.signer_versions import VERSION
from tests.lib.signerexample import EXAMPLE, OUTPOINT, SETTLEMENT_REQUEST, TERMS

SLOWEST_SECONDS = 0.5
"""Limit for one frame, on a machine with other work; the usual time is a few microseconds."""

MEMORY_FACTOR, MEMORY_BYTES = 32, 100_000
"""Decoding a frame may take this many times its size, plus this constant: one byte can become a whole Python object."""

_HOSTILE_BYTES = bytes.fromhex(
    "00 7f 80 8f 90 91 9f a0 bf c0 c1 c2 c3 c4 c6 c7 c9 ca cb cc cf d0 d3 d4 d8 d9 db dc dd de df e0 ff"
)
"""Bytes at the boundaries between kinds of msgpack values."""

_NUMBERS = (0, 1, 127, 128, 255, 256, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -32, -33, -(2**31), -(2**63))

VALID = [encode_frame(request)[4:] for _, request, _ in EXAMPLE] + [
    encode_frame(request)[4:]
    for request in (
        ReserveRequest(9),
        StatusRequest(2**64 - 1),
        AgainRequest(6, OUTPOINT),
        ChildRequest(7, SETTLEMENT_REQUEST, Sat(300)),
        KeyRequest(8, TERMS.client_key, TERMS.expiry.unix_time),
        BehindRequest(11, (Newest(OUTPOINT, Sat(400_000)),)),
        ShownRequest(12, UnixTime(1_800_000_000), OUTPOINT),
        OtherKeysRequest(10, TERMS.client_key, TERMS.expiry.unix_time),
        msgspec.structs.replace(
            SETTLEMENT_REQUEST,
            claims=SETTLEMENT_REQUEST.claims * 5,
            reserve=Reserve(TERMS.server_key, (Coin(OUTPOINT, Sat(2**62)),) * 4),
        ),
    )
]


def frames(count: int, seed: int = 1) -> Iterator[bytes]:
    """Bodies of frames, each determined by the seed and its number."""
    makers: tuple[Callable[[random.Random], bytes], ...] = (
        _damaged, _damaged, _damaged, _spliced, _rebuilt, _rebuilt, _rebuilt, _random_value, _noise, _nested, _lying
    )  # fmt: skip
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        yield makers[number % len(makers)](chance)


def check(body: bytes) -> str:
    """Decode one body; return the outcome.

    Raises:
        AssertionError: the result is no request, or differs after encoding and decoding.
        Exception: anything but a `WireError`; the fuzzer searches for these.
    """
    begin = time.perf_counter()
    try:
        request = decode_request(body)
    except WireError:
        outcome = "refused"
    else:
        assert isinstance(request, Request)
        assert decode_request(encode_frame(request)[4:]) == request
        outcome = type(request).__name__
    took = time.perf_counter() - begin
    assert took < SLOWEST_SECONDS, f"{took:.2f} s for {len(body)} bytes beginning {body[:40].hex()}"
    return outcome


def check_prefix(chance: random.Random) -> None:
    """Decode a random length prefix: a size within bounds, or `WireError`."""
    prefix = chance.randbytes(4)
    try:
        assert 2 <= frame_size(prefix) <= MAX_FRAME_BYTES
    except WireError:
        assert not 2 <= int.from_bytes(prefix, "big") <= MAX_FRAME_BYTES


def memory_of(body: bytes) -> int:
    """Most memory in use while a body was decoded, in bytes."""
    tracemalloc.start()
    try:
        with suppress(WireError):
            decode_request(body)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- kinds of damage --------------------------------------------------------------------------------------------------


def _damaged(chance: random.Random) -> bytes:
    """A valid frame with a few bytes changed, inserted, removed or cut off."""
    body = bytearray(chance.choice(VALID))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        place = chance.randrange(len(body) + 1)
        match chance.randrange(6):
            case 0:
                body[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                body[place : place + 1] = bytes([chance.choice(_HOSTILE_BYTES)])
            case 2:
                body[place:place] = chance.randbytes(chance.randrange(1, 9))
            case 3:
                del body[place : place + chance.randrange(1, 9)]
            case 4:
                del body[place:]
            case _:
                body += body[place : place + 50]
        if not body:
            break
    return bytes(body)


def _spliced(chance: random.Random) -> bytes:
    """The beginning of one frame and the end of another."""
    one, other = chance.choice(VALID), chance.choice(VALID)
    return one[: chance.randrange(len(one))] + other[chance.randrange(len(other)) :]


def _rebuilt(chance: random.Random) -> bytes:
    """A valid frame with one wrong value: too large, of another type, one too many, one too few."""
    value = msgspec.msgpack.decode(chance.choice(VALID)[1:])
    inner = value
    while True:
        place = chance.randrange(len(inner))
        if not (isinstance(inner[place], list) and inner[place] and chance.random() < 0.7):
            break
        inner = inner[place]
    match chance.randrange(4):
        case 0:
            inner[place] = chance.choice(_NUMBERS)
        case 1:
            inner[place] = _value(chance, 3)
        case 2:
            del inner[place]
        case _:
            inner.insert(place, _value(chance, 2))
    return bytes([VERSION]) + msgspec.msgpack.encode(value)


def _random_value(chance: random.Random) -> bytes:
    """Any msgpack value, often one that begins like a message."""
    value = _value(chance, 5)
    if chance.random() < 0.7:
        value = [
            chance.randrange(10),
            chance.choice(_NUMBERS),
            *(_value(chance, 4) for _ in range(chance.randrange(5))),
        ]
    return bytes([VERSION]) + msgspec.msgpack.encode(value)


def _value(chance: random.Random, depth: int) -> object:
    match chance.randrange(10 if depth else 7):
        case 0:
            return chance.choice(_NUMBERS)
        case 1:
            return chance.randbytes(chance.choice((0, 1, 20, 25, 32, 33, 71, 80)))
        case 2:
            return "é" * chance.randrange(40)
        case 3:
            return chance.choice((None, True, False))
        case 4:
            return chance.choice((0.0, 1.5, float("inf"), float("nan"), -0.0))
        case 5:
            return msgspec.msgpack.Ext(chance.randrange(-128, 128), chance.randbytes(chance.randrange(20)))
        case 6:
            return chance.randrange(2**32)
        case 7:
            return {str(chance.randrange(9)): _value(chance, depth - 1) for _ in range(chance.randrange(4))}
    return [_value(chance, depth - 1) for _ in range(chance.randrange(6))]


def _noise(chance: random.Random) -> bytes:
    """Random bytes, often after the right version byte."""
    noise = chance.randbytes(chance.randrange(200))
    return bytes([VERSION]) + noise if chance.random() < 0.8 else noise


def _nested(chance: random.Random) -> bytes:
    """Deeply nested arrays or maps; at the top, or in the place of a field."""
    depth = chance.choice((1, 10, 100, 500, 1_000, 2_000, 5_000))
    opening = chance.choice((b"\x91", b"\x81\xa1a", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01", b"\x92\x03"))
    before = chance.choice((b"", b"\x93\x07\x01", b"\x96\x03\x01", b"\x94\x04\x01"))
    return bytes([VERSION]) + before + opening * depth + chance.choice((b"", b"\xc0", b"\x01" * 9))


def _lying(chance: random.Random) -> bytes:
    """A header that announces far more bytes than follow: memory must not be allocated for them."""
    header = chance.choice((b"\xc6", b"\xdb", b"\xdd", b"\xdf", b"\xc9")) + chance.choice(
        (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00\xff\xff\xff")
    )
    before = chance.choice(
        (b"", b"\x93\x07\x01", b"\x96\x03\x01", b"\x94\x02\x01", b"\x94\x06\x01", b"\x94\x06\x01\xc4\x00")
    )
    return bytes([VERSION]) + before + header + chance.randbytes(chance.randrange(30))


# --- the long run ----------------------------------------------------------------------------------------------------


def main(count: int, seed: int = 1) -> None:
    """Check this number of frames, and print the outcomes."""
    console, outcomes, begin = Console(highlight=False), Counter[str](), time.monotonic()
    columns = (TextColumn("frames"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("frames", total=count)
        for number, body in enumerate(frames(count, seed)):
            try:
                outcomes[check(body)] += 1
            except Exception:
                console.print(f"[red]number {number} of seed {seed}[/red]: {body.hex()}", soft_wrap=True)
                raise
            if number % 1_000 == 0:
                bar.update(task, completed=number)
    console.print(f"{count:,} frames in {time.monotonic() - begin:.0f} s, seed {seed}: each a request or a WireError")
    for name, how_often in outcomes.most_common():
        console.print(f"  {how_often:>12,}  {name}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
