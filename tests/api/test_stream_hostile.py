"""Streams of hostile clients, and of clients that vanish: their cost is limited, and all their resources are freed."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import ClientConnection

from paychan.protocol.wire.payment_frames import MAX_FRAME_PAYMENTS, Taken, write_payments
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.both_paths import BOTH_PATHS
from tests.api.streams import close_code, masked, open_stream, pay_frame, raw_stream, stream_url, upgrade
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
"""Frames without a payment."""


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "handlers"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server with few slots and short timeouts."""
    http = f"fast_lane = {str(request.param).lower()}\nbody_seconds = 1\nidle_seconds = 2"
    stream = f"max_streams = {MOST_STREAMS}\nping_seconds = 0.5"
    with System(tmp_path_factory.mktemp("small"), sections={"stream": stream, "http": http}) as running:
        yield running


@pytest.fixture(scope="module")
def rest(small: System) -> int:
    """Number of the server's sockets without clients."""
    return at_rest(small)


@pytest.fixture
def payer(small: System, http: httpx.Client) -> V2:
    return opened(small, http)


@pytest.fixture
def open_s(system: System, http: httpx.Client) -> V2:
    """Open a channel in one dialect, as frames are the same for both."""
    return opened(system, http)


def opened(system: System, http: httpx.Client) -> V2:
    client = V2(system.url, Payer(), http, Dialect.S)
    assert client.open(client.payer.payment(100_000)).status_code == 201
    return client


def nameless(client: V2) -> str:
    """Return the URL of a stream without the secret."""
    return stream_url(client).partition("?")[0]


def flood(connection: socket.socket, kind: str, size: int) -> int | None:
    """Send frames of a kind in one write; return the server's close code, or None."""
    frames = UNPAID[kind]
    with suppress(ConnectionError):
        connection.sendall(masked(0x02, b"!") * (frames[0] == 0) + frames * (size // len(frames)))
    return close_code(connection)


# --- work that is counted -------------------------------------------------------------------------------------------


@BOTH_PATHS
@pytest.mark.parametrize("kind", UNPAID)
def test_fault_60_pings_before_the_secret_end_the_stream(new_v2: Callable[[Dialect], V2], kind: str) -> None:
    """Before the secret a client may send one message and a few control frames; 480 kB of control frames get 1008."""
    with closing(raw_stream(nameless(new_v2(Dialect.S)))) as stream:
        assert flood(stream, kind, 480_000) in (1008, 4404, None)  # a reset may overtake the close frame


@BOTH_PATHS
@pytest.mark.parametrize("kind", UNPAID)
def test_fault_60_frames_without_a_payment_end_a_stream(open_s: V2, kind: str) -> None:
    """After some hundreds the same frames end a stream whose client named the secret; the channel stays open."""
    with closing(raw_stream(stream_url(open_s))) as stream:
        assert flood(stream, kind, 480_000) in (1008, 4400, None)
    assert open_s.pay(open_s.payer.payment(100_001)).status_code == 200


@BOTH_PATHS
def test_fault_60_few_pings_before_the_secret_are_answered(open_s: V2) -> None:
    """An honest client may send a ping, then the secret, then payments."""
    with closing(raw_stream(nameless(open_s))) as stream:
        stream.sendall(masked(0x89, b"there?") + masked(0x81, b'{"secret": "%s"}' % open_s.secret.encode()))
        stream.sendall(masked(0x82, write_payments([open_s.payer.payment(100_001)])))
        came = b""
        while len(came) < 8 + 20:
            came += stream.recv(100)
    assert came.startswith(b"\x8a\x06there?\x82\x12\x01\x00")


@BOTH_PATHS
def test_fault_60_a_large_first_message_is_refused(open_s: V2) -> None:
    """A first message larger than a secret needs ends the stream before the message is complete."""
    with closing(raw_stream(nameless(open_s))) as stream:
        stream.sendall(b"\x81\xfe\x04\x00")  # announces 1,024 bytes
        assert close_code(stream) == 1009


@BOTH_PATHS
def test_fault_60_only_one_message_is_read_before_the_secret(open_s: V2) -> None:
    """A wrong secret ends the stream, also if the right one follows at once."""
    wrong, right = (b'{"secret": "%s"}' % secret.encode() for secret in ("11" * 32, open_s.secret))
    with closing(raw_stream(nameless(open_s))) as stream:
        stream.sendall(masked(0x81, wrong) + masked(0x81, right))
        assert close_code(stream) == 4404


@BOTH_PATHS
def test_fault_79_the_close_frame_has_the_code_of_the_violation(open_s: V2) -> None:
    """Over a real socket, an unmasked frame, text that is not UTF-8, and 1005 each get their close code."""
    for sent, code in ((b"\x82\x01!", 1002), (masked(0x81, b"\xff"), 1007), (masked(0x88, b"\x03\xed"), 1002)):
        with closing(raw_stream(stream_url(open_s))) as stream:
            stream.sendall(sent)
            assert close_code(stream) == code


# --- slots ----------------------------------------------------------------------------------------------------------


def test_fault_68_streams_without_a_secret_take_no_slot(small: System, payer: V2) -> None:
    """While many streams wait without a secret, clients that name theirs get a slot, by URL and by message."""
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


def test_fault_68_the_oldest_stream_without_a_secret_is_closed(small: System, payer: V2) -> None:
    """If the waiting room is full, a new stream closes the one that has waited longest with 4404."""
    with ExitStack() as stack:
        waiting = [stack.enter_context(closing(raw_stream(nameless(payer)))) for _ in range(33)]
        began = time.monotonic()
        assert close_code(waiting[0]) == 4404
        assert close_code(waiting[-1]) == 4404  # its own timeout had ended
        assert time.monotonic() - began < 30
    assert small.server is not None


@pytest.mark.parametrize("system", [True], indirect=True, ids=["lane"])
def test_fault_68_a_channel_has_a_share_of_the_slots(open_s: V2) -> None:
    """A ninth stream of a channel replaces the channel's stream with the oldest payment."""
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


# --- freed on every path --------------------------------------------------------------------------------------------


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
    """Build a frame with the largest number of payments; two such frames are the limit in flight."""
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
"""The ways in which a client vanishes; after the last two its socket stays open."""


def sockets(system: System) -> int:
    """Count the open sockets of the server."""
    assert system.server is not None
    found = 0
    for file in Path(f"/proc/{system.server.process.pid}/fd").iterdir():
        with suppress(OSError):
            found += str(file.readlink()).startswith("socket:")
    return found


def at_rest(system: System) -> int:
    """Count the server's sockets without clients, after it has opened its connection to the signer."""
    before = sockets(system)
    with httpx.Client(trust_env=False, verify=False) as http:
        opened(system, http)
    _wait_for(system, before + 1)
    return before + 1


def _wait_for(system: System, most: int) -> None:
    deadline = time.monotonic() + 60
    while (now := sockets(system)) > most and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now <= most, f"{now} sockets are open, {most} were"


def _soon(connect: Callable[[], ClientConnection]) -> ClientConnection:
    """Connect, with retries: the server may still hold slots for clients that have just vanished."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return connect()
        except (InvalidStatus, InvalidMessage):  # refused, or closed for another connection before its answer
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def assert_all_freed(system: System, client: V2, rest: int, paid_sat: int = 100_000) -> None:
    """Wait until the server has closed the sockets (a test's HTTP client may have one), then use every slot at once."""
    _wait_for(system, rest + 1)
    with ExitStack() as stack:
        for _ in range(MOST_STREAMS):  # each pays at once: a stream that has not paid may be closed for the next one
            stream = stack.enter_context(_soon(lambda: open_stream(client)))
            assert len(pay_frame(stream, [client.payer.payment(paid_sat)])) == 1
        with pytest.raises(InvalidStatus):
            open_stream(client)
    _wait_for(system, rest + 1)


@pytest.mark.parametrize("point", POINTS)
def test_fault_61_clients_that_vanish_leave_nothing(
    small: System, rest: int, payer: V2, point: Callable[[V2], socket.socket]
) -> None:
    """At every point of a stream's life, after reset, close, half close or silence, slot and descriptors are freed."""
    with ExitStack() as stack:
        for vanish in WAYS.values():
            for _ in range(1 if point is _takes_nothing else 2):
                with suppress(ConnectionError, AssertionError, TimeoutError):  # all slots may be in use at that moment
                    vanish(stack.enter_context(closing(point(payer))))
        assert_all_freed(small, payer, rest)


def test_fault_61_clients_that_vanish_while_their_channel_wakes(small: System, http: httpx.Client) -> None:
    """After a restart every channel sleeps: payments of clients that vanished count, and their slots are freed."""
    clients = [opened(small, http) for _ in range(MOST_STREAMS)]
    assert small.server is not None
    small.server.stop()
    small.start_server()
    rest = sockets(small) + 1  # for the signer's connection
    for client in clients:
        client.url = small.url
        stream = raw_stream(stream_url(client))
        stream.sendall(masked(0x82, write_payments([client.payer.payment(100_001)])))
        _reset(stream)
    for client in clients:
        with httpx.Client(trust_env=False, verify=False) as fresh:
            client.http = fresh
            assert client.pay(client.payer.payment(100_002)).json()["value_received"] in (1, 2)
    assert_all_freed(small, clients[0], rest, 100_002)


def test_fault_61_clients_that_vanish_while_the_application_is_asked(tmp_path: Path, http: httpx.Client) -> None:
    """256 payments wait for an application that does not answer; the clients vanish, and the slots are freed."""
    with Application() as application:
        sections = {
            "callback": f'url = "{application.url}"\ntimeout_seconds = 0.5',
            "stream": f"max_streams = {MOST_STREAMS}\nping_seconds = 0.5",
        }
        with System(tmp_path, sections=sections) as system, ExitStack() as stack:
            clients = [opened(system, http) for _ in range(MOST_STREAMS)]
            rest = sockets(system) + MOST_STREAMS  # each channel may have a connection to the application
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


@BOTH_PATHS
@pytest.mark.parametrize("end", ["close frame", "reset", "broken frame"])
def test_fault_61_payments_of_a_client_that_leaves_are_paid(open_s: V2, end: str) -> None:
    """Payments in the same segment as the connection's end are submitted to the channel; only the answer is lost."""
    sent = b"".join(masked(0x82, write_payments([open_s.payer.payment(100_000 + n)])) for n in range(1, 21))
    last = {"close frame": masked(0x88, b"\x03\xe8"), "reset": b"", "broken frame": b"\x83\x80"}[end]
    stream = raw_stream(stream_url(open_s))
    stream.sendall(sent + last)
    if end == "reset":
        stream.shutdown(socket.SHUT_WR)
    read_all(stream)
    stream.close()
    assert open_s.pay(open_s.payer.payment(100_021)).json()["value_received"] == 1
