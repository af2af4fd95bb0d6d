"""The reader of WebSocket frames, and the turns in which streams are read, without a socket."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paychan.api.budgets.turns import Allowance, Turns
from paychan.api.stream.reader import WebSocket
from paychan.api.stream.websocket import (
    BAD_TEXT,
    BINARY,
    CONTINUATION,
    PING,
    POLICY,
    PONG,
    PROTOCOL_ERROR,
    TEXT,
    TOO_BIG,
    FrameReader,
    Violation,
    accept_head,
    close_frame,
    frame,
    read_close,
    upgrade_problem,
)
from tests.api.streams import masked

LIMIT = 1000
HEADERS = {
    "Upgrade": "WebSocket",
    "Connection": "keep-alive, Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def read(raw: bytes) -> list[tuple[int, bytes]]:
    """Return all messages that a reader finds in some bytes."""
    reader = FrameReader(LIMIT)
    reader.feed(raw)
    return list(iter(reader.take, None))


messages = st.lists(st.tuples(st.sampled_from((TEXT, BINARY, PING, PONG)), st.text(max_size=20).map(str.encode)))


@settings(deadline=None)
@given(messages, st.data())
def test_messages_may_arrive_in_any_pieces(sent: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """For any division into pieces, the reader returns the messages in the order of sending."""
    raw = b"".join(masked(0x80 | opcode, payload) for opcode, payload in sent)
    reader, found = FrameReader(LIMIT), list[tuple[int, bytes]]()
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        reader.feed(raw[:size])
        raw = raw[size:]
        found += iter(reader.take, None)

    assert found == sent
    assert reader.unread_bytes == 0


def test_fragments_become_one_message() -> None:
    """A control frame may be between fragments; the last fragment may be empty."""
    raw = masked(0x01, b"a\xc3") + masked(0x89, b"!") + masked(0x00, b"\xa4b") + masked(0x80, b"")

    assert read(raw) == [(CONTINUATION, b""), (PING, b"!"), (CONTINUATION, b""), (TEXT, "aäb".encode())]


VIOLATIONS = {
    "unmasked": (b"\x82\x01!", PROTOCOL_ERROR),
    "unmasked close": (b"\x88\x00", PROTOCOL_ERROR),
    "reserved bit": (masked(0xC2, b"abcd"), PROTOCOL_ERROR),
    "reserved opcode": (masked(0x83, b"abcd"), PROTOCOL_ERROR),
    "reserved control": (masked(0x8B, b""), PROTOCOL_ERROR),
    "fragmented ping": (masked(0x09, b""), PROTOCOL_ERROR),
    "long ping": (masked(0x89, bytes(126)), PROTOCOL_ERROR),
    "nothing to continue": (masked(0x80, b"abcd"), PROTOCOL_ERROR),
    "message in a message": (masked(0x02, b"ab") + masked(0x82, b"cd"), PROTOCOL_ERROR),
    "125 in two bytes": (b"\x82\xfe\x00\x7d" + bytes(4 + 125), PROTOCOL_ERROR),
    "65535 in eight bytes": (b"\x82\xff" + (65535).to_bytes(8), PROTOCOL_ERROR),
    "negative length": (b"\x82\xff" + (1 << 63).to_bytes(8), PROTOCOL_ERROR),
    "empty fragment": (masked(0x02, b""), POLICY),
    "empty continuation": (masked(0x02, b"a") + masked(0x00, b""), POLICY),
    "too big": (b"\x82\xfe" + (LIMIT + 1).to_bytes(2), TOO_BIG),
    "huge": (b"\x82\xff" + (1 << 62).to_bytes(8), TOO_BIG),
    "too big in parts": (masked(0x02, bytes(LIMIT - 9)) + masked(0x80, bytes(10)), TOO_BIG),
    "text": (masked(0x81, b"\xff"), BAD_TEXT),
    "text in parts": (masked(0x01, b"\xc3") + masked(0x80, b"("), BAD_TEXT),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_fault_79_a_protocol_violation_has_a_close_code(name: str) -> None:
    """Masks, lengths, fragments, control frames and text are checked early (RFC 6455 5.1, 5.2, 5.4, 5.5, 8.1)."""
    raw, code = VIOLATIONS[name]

    with pytest.raises(Violation) as broken:
        read(raw)

    assert broken.value.code == code


@pytest.mark.parametrize(("payload", "code"), [(b"", None), (b"\x03\xe8", 1000), (b"\x03\xe9bye", 1001)])
def test_a_close_frame_has_a_code(payload: bytes, code: int | None) -> None:
    assert read_close(payload) == code
    assert close_frame(None) == b"\x88\x00"


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535])
def test_fault_79_codes_that_must_not_be_sent_are_an_error(code: int) -> None:
    """RFC 6455 7.4.1: a frame must not have the codes 1005, 1006 and 1015, nor undefined codes."""
    with pytest.raises(Violation):
        read_close(code.to_bytes(2))


@pytest.mark.parametrize("payload", [b"\x03", b"\x03\xe8\xff"])
def test_fault_79_a_close_frame_is_read_strictly(payload: bytes) -> None:
    """A close frame with half a code, or with a reason that is not UTF-8, is a violation."""
    with pytest.raises(Violation):
        read_close(payload)


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_frames_are_written_in_the_shortest_form(size: int) -> None:
    head = {0: b"\x82\x00", 125: b"\x82\x7d", 126: b"\x82\x7e\x00\x7e", 65535: b"\x82\x7e\xff\xff"}

    assert frame(BINARY, bytes(size)) == head.get(size, b"\x82\x7f" + size.to_bytes(8)) + bytes(size)


def test_the_upgrade_is_that_of_the_rfc() -> None:
    """The answer to the key of RFC 6455 1.3 is that of its example."""
    assert upgrade_problem(HEADERS) is None
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n" in accept_head(HEADERS["Sec-WebSocket-Key"])


@pytest.mark.parametrize(
    "change",
    [
        {"Upgrade": "h2c"},
        {"Connection": "close"},
        {"Sec-WebSocket-Version": "8"},
        {"Sec-WebSocket-Key": ""},
        {"Sec-WebSocket-Key": "short="},
    ],
)
def test_fault_79_an_incomplete_upgrade_is_refused(change: dict[str, str]) -> None:
    """The refusal names the header."""
    assert (upgrade_problem(HEADERS | change) or "").startswith(next(iter(change)))


# --- turns ----------------------------------------------------------------------------------------------------------


class Endless:
    """A worker that always has more work; each step advances the clock of the test."""

    is_queued = ends_turn = False

    def __init__(self) -> None:
        self.steps, self.goes_on = 0, True

    def work(self, until: float) -> bool:  # noqa: ARG002
        self.steps += 1
        return self.goes_on


async def test_fault_60_the_loop_turns_although_streams_have_data() -> None:
    """Streams with endless data leave the loop to other work after each turn, and take turns in order."""
    turns, workers = Turns(), [Endless(), Endless(), Endless()]
    for worker in workers:
        turns.schedule(worker)

    for _ in range(20):
        await asyncio.sleep(0)

    steps = [worker.steps for worker in workers]
    assert min(steps) > 0
    assert max(steps) - min(steps) <= 1
    for worker in workers:
        worker.goes_on = False
    await asyncio.sleep(0.01)


async def test_fault_60_answers_are_written_in_turns_too() -> None:
    """If many streams have refusals to write, one of them works in each turn of the loop, and reading continues."""
    turns, reader, began = Turns(), Endless(), list[int]()
    turns.schedule(reader)

    async def answer(number: int) -> None:
        await turns.slice()
        began.append(number)

    answering = [asyncio.create_task(answer(number)) for number in range(5)]
    counts = []
    while len(began) < 5:
        await asyncio.sleep(0)
        counts.append(len(began))
    reader.goes_on = False
    await asyncio.gather(*answering)

    assert began == [0, 1, 2, 3, 4]
    assert all(after - before <= 1 for before, after in itertools.pairwise(counts))
    assert reader.steps > 0
    await asyncio.sleep(0.01)


class Listener:
    """A session that accepts every message."""

    has_room = True

    def __init__(self) -> None:
        self.messages, self.ends = 0, 0

    def message(self, payload: bytes, *, binary: bool) -> None:  # noqa: ARG002
        self.messages += 1

    def turn_over(self) -> None:
        pass

    def ended(self) -> None:
        self.ends += 1


class Pipe(asyncio.Transport):
    """A transport that stores the written bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed, self.paused = b"", False, False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


@pytest.fixture
async def joined() -> tuple[WebSocket, Listener, Pipe]:
    """A WebSocket whose client has named its secret."""
    listener, pipe = Listener(), Pipe()
    websocket = WebSocket(listener, Turns(), 65536, 20.0)
    websocket.connection_made(pipe)
    websocket.admit()
    return websocket, listener, pipe


async def test_fault_60_one_turn_reads_few_frames(joined: tuple[WebSocket, Listener, Pipe]) -> None:
    """A megabyte of tiny messages is processed in several turns; meanwhile the socket is not read."""
    websocket, listener, pipe = joined
    websocket.data_received(masked(0x82, b"") * 150_000)
    assert pipe.paused

    assert websocket.work(float("inf"))
    assert 0 < listener.messages <= 64
    before = listener.messages
    assert websocket.work(0)  # the time of this turn has ended
    assert listener.messages == before + 1
    websocket.abort()


@pytest.mark.parametrize(
    "flood",
    [
        masked(0x89, b""),
        masked(0x89, bytes(125)),
        masked(0x8A, b""),
        masked(0x8A, b"unasked"),
        masked(0x02, b"!") + masked(0x00, b"!") * 2,
    ],
    ids=["ping", "long ping", "pong", "pong with text", "fragments"],
)
async def test_fault_60_frames_without_a_payment_are_counted(
    joined: tuple[WebSocket, Listener, Pipe], flood: bytes
) -> None:
    """A few hundred frames without a message are allowed; more end the stream with 1008."""
    websocket, listener, pipe = joined
    websocket.data_received(flood)
    rest = masked(0x00, b"!") if flood[0] == 0x02 else flood
    for _ in range(600):
        websocket.data_received(rest)
        websocket.work(float("inf"))

    assert listener.ends == 1
    assert close_frame(POLICY, "too many frames without a payment") in pipe.written
    assert len(pipe.written) < 300 * 127 + 200


async def test_honest_control_frames_and_fragments_are_allowed(joined: tuple[WebSocket, Listener, Pipe]) -> None:
    """Occasional pings, and messages of a few fragments each, never end a stream."""
    websocket, listener, pipe = joined
    message = masked(0x02, b"!") + masked(0x00, b"!") * 10 + masked(0x80, b"!")
    for _ in range(500):
        websocket.data_received(message)
        websocket.work(float("inf"))
        websocket.earn()  # as the session does for payments
    websocket.data_received(masked(0x89, b"there?"))
    websocket.work(float("inf"))

    assert (listener.messages, listener.ends) == (500, 0)
    assert pipe.written.endswith(frame(PONG, b"there?"))
    websocket.abort()


def test_an_allowance_grows_with_time_and_with_payments() -> None:
    """Time and payments add to an allowance, at most up to its burst."""
    allowance = Allowance(4, 2, 100.0)
    assert [allowance.spend(1, 100.0) for _ in range(5)] == [True] * 4 + [False]
    assert allowance.spend(1, 101.0)
    allowance.earn(100)
    assert [allowance.spend(1, 101.0) for _ in range(5)] == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (masked(0x88, b""), b"\x88\x00"),
        (masked(0x88, b"\x03\xe9bye"), b"\x88\x02\x03\xe9"),
        (masked(0x88, b"\x03\xed"), close_frame(PROTOCOL_ERROR, "close code is not allowed")),
        (masked(0x88, b"\x03\xe8\xff"), close_frame(BAD_TEXT, "text is not UTF-8")),
    ],
    ids=["no code", "a code", "1005", "bad reason"],
)
async def test_fault_79_a_close_is_answered_as_the_rfc_says(
    joined: tuple[WebSocket, Listener, Pipe], sent: bytes, answer: bytes
) -> None:
    """A close is answered with its code; 1005 means no code and is never sent."""
    websocket, listener, pipe = joined
    websocket.data_received(sent)
    websocket.work(float("inf"))

    assert pipe.written.endswith(answer)
    assert listener.ends == 1
    websocket.connection_lost(None)
