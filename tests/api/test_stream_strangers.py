"""Streams of clients that mean no good, or vanish: what they cost, and that everything they took is given back."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection

from paychan.protocol.wire.payment_frames import MAX_FRAME_PAYMENTS, Taken, write_payments
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.streams import close_code, masked, open_stream, pay_frame, raw_stream, stream_url, upgrade
from tests.api.ways import BOTH_WAYS
from tests.api.wire import connect, read_all
from tests.lib.application import Application, yes
from tests.lib.rbpcp import V2, Payer
from tests.lib.system import System

MOST_STREAMS = 3

UNPAID = {
    "empty pings": masked(0x89, b""),
    "pings": masked(0x89, bytes(125)),
    "pongs": masked(0x8A, b"unasked"),
    "empty fragments": masked(0x00, b""),
    "tiny fragments": masked(0x00, b"!"),
    "empty messages": masked(0x82, b""),
    "empty lists": masked(0x81, b"[]"),
    "no payments": masked(0x81, b"5"),
}
"""Frames for which nobody pays."""


@pytest.fixture(scope="module", params=[True, False], ids=["lane", "handlers"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server with few places, which soon sees that a client does nothing."""
    http = f"fast_lane = {str(request.param).lower()}\nbody_seconds = 1\nidle_seconds = 2"
    stream = f"max_streams = {MOST_STREAMS}\nping_seconds = 0.5"
    with System(tmp_path_factory.mktemp("small"), sections={"stream": stream, "http": http}) as running:
        yield running


@pytest.fixture(scope="module")
def rest(small: System) -> int:
    """Sockets that the server has when no client is there."""
    return at_rest(small)


@pytest.fixture
def payer(small: System, http: httpx.Client) -> V2:
    return opened(small, http)


@pytest.fixture
def open_s(system: System, http: httpx.Client) -> V2:
    """A payer of one dialect: frames are the same for both."""
    return opened(system, http)


def opened(system: System, http: httpx.Client) -> V2:
    client = V2(system.url, Payer(), http, Dialect.S)
    assert client.open(client.payer.payment(100_000)).status_code == 201
    return client


def nameless(client: V2) -> str:
    """URL of a stream without the secret."""
    return stream_url(client).partition("?")[0]


def flood(connection: socket.socket, kind: str, size: int) -> int | None:
    """Send bytes of a kind in one write, and return with what code the server closes."""
    frames = UNPAID[kind]
    with suppress(ConnectionError):
        connection.sendall(masked(0x02, b"!") * (frames[0] == 0) + frames * (size // len(frames)))
    return close_code(connection)


# --- work that is counted -------------------------------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize("kind", UNPAID)
def test_fault_60_pings_before_the_secret_end_the_stream(new_v2: Callable[[Dialect], V2], kind: str) -> None:
    """On a channel that need not exist a client can send one message and a few control frames; 480 kB of them get 1008."""
    with closing(raw_stream(nameless(new_v2(Dialect.S)))) as stream:
        assert flood(stream, kind, 480_000) in (1008, 4404, None)  # a reset may overtake the close frame


@BOTH_WAYS
@pytest.mark.parametrize("kind", UNPAID)
def test_fault_60_frames_without_a_payment_end_a_stream(open_s: V2, kind: str) -> None:
    """The same frames end a stream whose client knows the secret, after some hundreds of them; the channel goes on."""
    with closing(raw_stream(stream_url(open_s))) as stream:
        assert flood(stream, kind, 480_000) in (1008, 4400, None)
    assert open_s.pay(open_s.payer.payment(100_001)).status_code == 200


@BOTH_WAYS
def test_fault_60_few_pings_before_the_secret_are_answered(open_s: V2) -> None:
    """What an honest client sends before its secret is welcome: a ping, then the secret, then payments."""
    with closing(raw_stream(nameless(open_s))) as stream:
        stream.sendall(masked(0x89, b"there?") + masked(0x81, b'{"secret": "%s"}' % open_s.secret.encode()))
        stream.sendall(masked(0x82, write_payments([open_s.payer.payment(100_001)])))
        came = b""
        while len(came) < 8 + 20:
            came += stream.recv(100)
    assert came.startswith(b"\x8a\x06there?\x82\x12\x01\x00")


@BOTH_WAYS
def test_fault_60_a_large_first_message_is_refused(open_s: V2) -> None:
    """A secret needs few bytes: a first message of more ends the stream before it has come."""
    with closing(raw_stream(nameless(open_s))) as stream:
        stream.sendall(b"\x81\xfe\x04\x00")  # 1,024 bytes, it says
        assert close_code(stream) == 1009


@BOTH_WAYS
def test_fault_60_only_one_message_is_looked_at_before_the_secret(open_s: V2) -> None:
    """A wrong secret ends the stream, also when the right one comes right behind it."""
    wrong, right = (b'{"secret": "%s"}' % secret.encode() for secret in ("11" * 32, open_s.secret))
    with closing(raw_stream(nameless(open_s))) as stream:
        stream.sendall(masked(0x81, wrong) + masked(0x81, right))
        assert close_code(stream) == 4404


@BOTH_WAYS
def test_fault_79_the_close_frame_says_what_was_wrong(open_s: V2) -> None:
    """Over a real socket: an unmasked frame, text that is no text, and 1005, each with its code."""
    for sent, code in ((b"\x82\x01!", 1002), (masked(0x81, b"\xff"), 1007), (masked(0x88, b"\x03\xed"), 1002)):
        with closing(raw_stream(stream_url(open_s))) as stream:
            stream.sendall(sent)
            assert close_code(stream) == code


# --- places ---------------------------------------------------------------------------------------------------------


def test_fault_68_strangers_take_no_place(small: System, payer: V2) -> None:
    """However many streams wait without a secret, clients that name theirs have their places, by URL and by message."""
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(closing(raw_stream(nameless(payer).replace(payer.payer.outpoint.txid_hex, "11" * 32))))
        for _ in range(MOST_STREAMS - 1):
            stream = stack.enter_context(open_stream(payer))
            assert pay_frame(stream, [payer.payer.payment(100_000)]) == [
                Taken(payer.payer.payment(100_000).change_sat, 0)
            ]
        late = stack.enter_context(closing(raw_stream(nameless(payer))))
        late.sendall(masked(0x81, b'{"secret": "%s"}' % payer.secret.encode()))
        late.sendall(masked(0x82, write_payments([payer.payer.payment(100_000)])))
        assert late.recv(20)[:4] == b"\x82\x12\x01\x00"
    assert small.server is not None


def test_fault_68_the_oldest_stranger_makes_room(small: System, payer: V2) -> None:
    """The waiting room is small: who waits longest in it is told 4404 when one more comes."""
    with ExitStack() as stack:
        waiting = [stack.enter_context(closing(raw_stream(nameless(payer)))) for _ in range(33)]
        began = time.monotonic()
        assert close_code(waiting[0]) == 4404
        assert close_code(waiting[-1]) == 4404  # its own time was over
        assert time.monotonic() - began < 30
    assert small.server is not None


@pytest.mark.parametrize("system", [True], indirect=True, ids=["lane"])
def test_fault_68_a_channel_has_a_share_of_the_places(open_s: V2) -> None:
    """A ninth stream of a channel takes the place of the one that has paid nothing for the longest."""
    with ExitStack() as stack:
        streams = [stack.enter_context(open_stream(open_s)) for _ in range(8)]
        assert len(pay_frame(streams[0], [open_s.payer.payment(100_000)])) == 1
        ninth = stack.enter_context(open_stream(open_s))
        assert len(pay_frame(ninth, [open_s.payer.payment(100_000)])) == 1
        with pytest.raises(ConnectionClosed) as end:
            streams[1].recv(timeout=10)
        assert end.value.rcvd is not None
        assert (end.value.rcvd.code, end.value.rcvd.reason) == (4503, "stream_replaced")
        assert len(pay_frame(streams[0], [open_s.payer.payment(100_000)])) == 1


# --- given back on every path ---------------------------------------------------------------------------------------


def _half_a_request(client: V2) -> socket.socket:
    connection = connect(client.url)
    connection.sendall(upgrade(stream_url(client))[:60])
    return connection


def _request(client: V2) -> socket.socket:
    connection = connect(client.url)
    connection.sendall(upgrade(stream_url(client)))
    return connection


def _request_and_payments(client: V2) -> socket.socket:
    connection = connect(client.url)
    connection.sendall(upgrade(stream_url(client)) + _full(client) * 3)
    return connection


def _stranger(client: V2) -> socket.socket:
    return raw_stream(nameless(client))


def _introduction(client: V2) -> socket.socket:
    stream = raw_stream(nameless(client))
    stream.sendall(masked(0x81, b'{"secret": "%s"}' % client.secret.encode()) + _full(client))
    return stream


def _half_a_frame(client: V2) -> socket.socket:
    stream = raw_stream(stream_url(client))
    stream.sendall(_full(client)[:1000])
    return stream


def _half_a_message(client: V2) -> socket.socket:
    stream = raw_stream(stream_url(client))
    stream.sendall(masked(0x02, b"\x01"))
    return stream


def _in_flight(client: V2) -> socket.socket:
    stream = raw_stream(stream_url(client))
    stream.sendall(_full(client) * 5)
    return stream


def _refusals(client: V2) -> socket.socket:
    stream = raw_stream(stream_url(client))
    stream.sendall(masked(0x82, write_payments([client.payer.payment(99_999)] * MAX_FRAME_PAYMENTS)) * 3)
    return stream


def _bad_signatures(client: V2) -> socket.socket:
    stream = raw_stream(stream_url(client))
    stream.sendall(masked(0x82, write_payments([Payer().payment(100_001)] * 3)) * 3)
    return stream


def _takes_nothing(client: V2) -> socket.socket:
    stream = raw_stream(stream_url(client))
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stream.settimeout(0.3)
    refused = masked(0x82, write_payments([client.payer.payment(99_999)] * MAX_FRAME_PAYMENTS))  # answers are long
    with suppress(OSError):
        while True:
            stream.sendall(refused)
    stream.settimeout(10)
    return stream


def _closed_by_us(client: V2) -> socket.socket:
    stream = raw_stream(stream_url(client))
    stream.sendall(masked(0x88, b"\x03\xe8"))
    return stream


def _closed_by_server(client: V2) -> socket.socket:
    stream = raw_stream(stream_url(client))
    stream.sendall(masked(0x82, b""))
    assert stream.recv(1) == b"\x88"
    return stream


POINTS = [
    _half_a_request,
    _request,
    _request_and_payments,
    _stranger,
    _introduction,
    _half_a_frame,
    _half_a_message,
    _in_flight,
    _refusals,
    _bad_signatures,
    _takes_nothing,
    _closed_by_us,
    _closed_by_server,
]


def _full(client: V2) -> bytes:
    """A frame of as many payments as one may hold; two of them are as many as may be in flight."""
    return masked(0x82, write_payments([client.payer.payment(100_000)] * MAX_FRAME_PAYMENTS))


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _half_close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


WAYS: dict[str, Callable[[socket.socket], object]] = {
    "reset": _reset,
    "close": socket.socket.close,
    "half close": _half_close,
    "silence": lambda _: None,
}
"""How a client vanishes; after the last two its socket stays open."""


def sockets(system: System) -> int:
    """Sockets that the server has open."""
    assert system.server is not None
    found = 0
    for file in Path(f"/proc/{system.server.process.pid}/fd").iterdir():
        with suppress(OSError):
            found += str(file.readlink()).startswith("socket:")
    return found


def at_rest(system: System) -> int:
    """How many sockets the server has when it has no client: it has asked its signer, and clients have left."""
    before = sockets(system)
    with httpx.Client(trust_env=False) as http:
        opened(system, http)
    _wait_for(system, before + 1)
    return before + 1


def _wait_for(system: System, most: int) -> None:
    deadline = time.monotonic() + 60
    while (now := sockets(system)) > most and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now <= most, f"{now} sockets are open, {most} were"


def _soon(connect: Callable[[], ClientConnection]) -> ClientConnection:
    """Connect; clients that vanished before the server saw them may still be let in for a moment."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return connect()
        except InvalidStatus:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def all_given_back(system: System, client: V2, rest: int, paid_sat: int = 100_000) -> None:
    """Wait until the server has its sockets back (a test's own HTTP client may have one), then use every place at once."""
    _wait_for(system, rest + 1)
    with ExitStack() as stack:
        streams = [stack.enter_context(_soon(lambda: open_stream(client))) for _ in range(MOST_STREAMS)]
        for stream in streams:
            assert len(pay_frame(stream, [client.payer.payment(paid_sat)])) == 1
        with pytest.raises(InvalidStatus):
            open_stream(client)
    _wait_for(system, rest + 1)


@pytest.mark.parametrize("point", POINTS)
def test_fault_61_clients_that_vanish_leave_nothing(
    small: System, rest: int, payer: V2, point: Callable[[V2], socket.socket]
) -> None:
    """At every point of a stream's life, by reset, end, half an end or silence: place and files come back."""
    with ExitStack() as stack:
        for vanish in WAYS.values():
            for _ in range(1 if point is _takes_nothing else 2):
                with suppress(ConnectionError, AssertionError, TimeoutError):  # places may be short meanwhile
                    vanish(stack.enter_context(closing(point(payer))))
        all_given_back(small, payer, rest)


def test_fault_61_clients_that_vanish_while_their_channel_wakes(small: System, http: httpx.Client) -> None:
    """After a restart every channel sleeps: payments of clients that left meanwhile are paid, and their places given back."""
    clients = [opened(small, http) for _ in range(MOST_STREAMS)]
    assert small.server is not None
    small.server.stop()
    small.start_server()
    rest = sockets(small) + 1  # for the signer's
    for client in clients:
        client.url = small.url
        stream = raw_stream(stream_url(client))
        stream.sendall(masked(0x82, write_payments([client.payer.payment(100_001)])))
        _reset(stream)
    for client in clients:
        with httpx.Client(trust_env=False) as fresh:
            client.http = fresh
            assert client.pay(client.payer.payment(100_002)).json()["value_received"] in (1, 2)
    all_given_back(small, clients[0], rest, 100_002)


def test_fault_61_clients_that_vanish_while_the_application_is_asked(tmp_path: Path, http: httpx.Client) -> None:
    """256 payments wait for an application that says nothing; the clients leave, and the places come back."""
    with Application() as application:
        sections = {
            "callback": f'url = "{application.url}"\ntimeout_seconds = 0.5',
            "stream": f"max_streams = {MOST_STREAMS}\nping_seconds = 0.5",
        }
        with System(tmp_path, sections=sections) as system, ExitStack() as stack:
            clients = [opened(system, http) for _ in range(MOST_STREAMS)]
            rest = sockets(system) + MOST_STREAMS  # each channel's question may have a connection to the application
            application.answer = lambda _: (time.sleep(1), yes())[1]
            for client, vanish in zip(clients, (_reset, socket.socket.close, _half_close), strict=True):
                stream = stack.enter_context(closing(raw_stream(stream_url(client))))
                frames = [client.payer.payment(100_000 + n) for n in range(1, MAX_FRAME_PAYMENTS + 1)]
                stream.sendall(masked(0x82, write_payments(frames)) * 2)
                deadline = time.monotonic() + 10
                while not application.questions and time.monotonic() < deadline:
                    time.sleep(0.01)
                vanish(stream)
            application.answer = lambda _: yes()
            _wait_for(system, rest)
            fresh = opened(system, http)
            for n in range(1, MOST_STREAMS + 1):
                honest = stack.enter_context(_soon(lambda: open_stream(fresh)))
                assert len(pay_frame(honest, [fresh.payer.payment(100_000 + n)])) == 1


@BOTH_WAYS
@pytest.mark.parametrize("end", ["close frame", "reset", "broken frame"])
def test_fault_61_payments_of_a_client_that_leaves_are_paid(open_s: V2, end: str) -> None:
    """What came before the end of the connection, in the same segment, is given to the channel; only the answer is lost."""
    sent = b"".join(masked(0x82, write_payments([open_s.payer.payment(100_000 + n)])) for n in range(1, 21))
    last = {"close frame": masked(0x88, b"\x03\xe8"), "reset": b"", "broken frame": b"\x83\x80"}[end]
    stream = raw_stream(stream_url(open_s))
    stream.sendall(sent + last)
    if end == "reset":
        stream.shutdown(socket.SHUT_WR)
    read_all(stream)
    stream.close()
    assert open_s.pay(open_s.payer.payment(100_021)).json()["value_received"] == 1
