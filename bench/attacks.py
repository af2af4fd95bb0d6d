"""The attacks that `strangers.py` measures. Each runs until its process is killed, and counts what it has sent."""

from __future__ import annotations

import base64
import contextlib
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from coincurve import PrivateKey
from msgspec import Struct
from session import Server, Session, exchange, request

from paychan.protocol.payment import Payment, encode_v1
from paychan.protocol.types import Sat
from paychan.protocol.wire.payment_frames import write_payments

_ZERO_MASK = b"\x00\x00\x00\x00"
_UNKNOWN = f"/v2/channels/{'0' * 64}/0"


class Listeners(Struct):
    """The addresses that an anonymous client knows, and a channel that it may open."""

    server: Server
    management: Server
    session: Session


def _connect(server: Server) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=5)


def _frame(kind: int, content: bytes = b"") -> bytes:
    """Build a masked client frame."""
    size = len(content)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2)
    return bytes([0x80 | kind]) + length + _ZERO_MASK + content


def _upgrade(server: Server, target: str) -> bytes:
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    return (
        f"GET {target} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    ).encode()


def _again(work: Callable[[], None]) -> None:
    """Repeat `work` without end, and ignore closed connections."""
    while True:
        try:
            work()
        except OSError:
            time.sleep(0.001)


def _pings(listeners: Listeners, count: Any) -> None:
    """60: empty pings on a stream without a secret."""

    def once() -> None:
        with _connect(listeners.server) as connection:
            connection.sendall(_upgrade(listeners.server, _UNKNOWN + "/stream"))
            connection.recv(4096)
            while True:
                connection.sendall(_frame(9) * 2000)
                count.value += 2000

    _again(once)


def _opened_stream(listeners: Listeners) -> str:
    """Open the attacker's own channel; return the target of its stream."""
    with contextlib.suppress(Exception), _connect(listeners.server) as connection:
        exchange(connection, listeners.session.opening)
    path, _, query = listeners.session.payments[0].split(b" ", 2)[1].decode().partition("?")
    return f"{path}/stream?{query}"


def _bad_frame() -> bytes:
    wrong = Payment(Sat(1_000), PrivateKey().sign(b"\x07" * 32, hasher=None), 0x83)  # type: ignore[arg-type]
    return _frame(2, write_payments([wrong] * 256))


def _vanish(listeners: Listeners, count: Any) -> None:
    """61: streams whose client disconnects with 256 payments in flight."""
    target, bad = _opened_stream(listeners), _bad_frame()

    def once() -> None:
        with _connect(listeners.server) as connection:
            connection.sendall(_upgrade(listeners.server, target))
            connection.recv(4096)
            connection.sendall(bad)
            count.value += 1

    _again(once)


def _bad_signatures(listeners: Listeners, count: Any) -> None:
    """69: frames of 256 bad signatures."""
    target, bad = _opened_stream(listeners), _bad_frame()

    def once() -> None:
        with _connect(listeners.server) as connection:
            connection.sendall(_upgrade(listeners.server, target))
            connection.recv(4096)
            while True:
                connection.sendall(bad)
                count.value += 256

    _again(once)


def _requests(
    listeners: Listeners, count: Any, make: Callable[[], bytes], *, keep: bool = True, clients: int = 32
) -> None:
    """Send requests at full speed; each connection waits for the answer before its next request."""
    chosen = selectors.DefaultSelector()

    def begin() -> None:
        with contextlib.suppress(OSError):
            connection = _connect(listeners.server)
            chosen.register(connection, selectors.EVENT_READ)
            connection.sendall(make())
            count.value += 1

    while True:
        for _ in range(clients - len(chosen.get_map())):
            begin()
        for key, _ in chosen.select(0.1):
            connection: Any = key.fileobj
            try:
                if connection.recv(65536) and keep:
                    connection.sendall(make())
                    count.value += 1
                    continue
            except OSError:
                pass
            chosen.unregister(connection)
            connection.close()


def _key() -> str:
    return PrivateKey().public_key.format().hex()


def _terms(listeners: Listeners, count: Any) -> None:
    """33, 62, 64: terms for a fresh key and expiry each time."""
    key = _key()

    def make() -> bytes:
        expiry = int(time.time()) + 700_000 + secrets.randbelow(10_000_000)
        return request("GET", f"/v1/fundingInfo?client_pubkey={key}&exp_time={expiry}", listeners.server)

    _requests(listeners, count, make)


def _outputs(listeners: Listeners, count: Any) -> None:
    """65: lists of funding outputs for unused addresses."""
    key = _key()

    def make() -> bytes:
        expiry = int(time.time()) + 700_000 + secrets.randbelow(10_000_000)
        return request("GET", f"/v2/funding/{key}/{expiry}/outputs", listeners.server)

    _requests(listeners, count, make)


def _openings(listeners: Listeners, count: Any) -> None:
    """Openings of channels that are not funded."""

    def make() -> bytes:
        payment = encode_v1(Payment(Sat(1_000), PrivateKey().sign(b"\x07" * 32, hasher=None), 0x83))  # type: ignore[arg-type]
        query = f"client_pubkey={_key()}&exp_time=1900000000&change_address=mmA2XECa7bVERzQKkyy1pNBQ3PC4HnxTC5"
        return request("POST", f"/v1/channels/new?{query}&payment={payment}", listeners.server)

    _requests(listeners, count, make)


def _not_found(listeners: Listeners, count: Any) -> None:
    """78: requests for unknown paths (404), at full speed."""
    _requests(listeners, count, lambda: request("GET", "/nowhere", listeners.server))


def _not_found_anew(listeners: Listeners, count: Any) -> None:
    """78: requests for unknown paths (404), at full speed, on a new connection each."""
    _requests(listeners, count, lambda: request("GET", "/nowhere", listeners.server), keep=False)


def _unknown_payments(listeners: Listeners, count: Any) -> None:
    """78: payments to unknown channels."""
    body = b'{"payment_data":{"change_value":1,"signature_data":""},"application_data":""}'
    _requests(listeners, count, lambda: request("PUT", f"{_UNKNOWN}?secret={'0' * 64}", listeners.server, body))


def _malformed(listeners: Listeners, count: Any) -> None:
    """78: malformed payments."""
    _requests(listeners, count, lambda: request("PUT", f"/v1/channels/{'0' * 64}/0?payment=!", listeners.server))


def _hold(servers: list[Server], count: Any, content: bytes, drip: bytes) -> None:
    """Keep connections open and send a few bytes at intervals; replace the connections that the server closed."""
    while True:
        held: list[socket.socket] = []
        with contextlib.suppress(OSError):
            for number in range(1500):
                connection = _connect(servers[number % len(servers)])
                connection.setblocking(False)
                held.append(connection)
                connection.send(content)
                count.value += 1
        for _ in range(20):
            time.sleep(0.1)
            for connection in held:
                with contextlib.suppress(OSError):
                    connection.send(drip)
        for connection in held:
            connection.close()


def _idle(listeners: Listeners, count: Any) -> None:
    """66: idle connections."""
    _hold([listeners.server], count, b"", b"")


def _slow_heads(listeners: Listeners, count: Any) -> None:
    """66: request heads that arrive byte by byte."""
    _hold([listeners.server], count, b"PUT /v1/channels/", b"0")


def _slow_bodies(listeners: Listeners, count: Any) -> None:
    """66, 70: request bodies that never arrive, on both listeners."""
    head = b"POST /v1/channels/new HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n"
    _hold([listeners.server, listeners.management], count, head, b"0")


def _upgrades(listeners: Listeners, count: Any) -> None:
    """68: streams without a secret on unknown channels."""
    _hold([listeners.server], count, _upgrade(listeners.server, _UNKNOWN + "/stream"), b"")


def _page(listeners: Listeners, count: Any) -> None:
    """71: a web page that asks the management listener for a channel by key."""
    asked = (
        f"GET /channels/{_key()}/info HTTP/1.1\r\nHost: evil.example:{listeners.management.port}\r\n"
        "Origin: http://evil.example\r\nSec-Fetch-Site: cross-site\r\n\r\n"
    ).encode()
    _requests(Listeners(listeners.management, listeners.management, listeners.session), count, lambda: asked, clients=6)


def _nothing(_listeners: Listeners, _count: Any) -> None:
    """The control: growth and payment latency without any attack."""
    time.sleep(3_600)


ATTACKS: dict[str, Callable[[Listeners, Any], None]] = {
    "no attack": _nothing,
    "60 pings": _pings,
    "61 vanishing streams": _vanish,
    "62 terms": _terms,
    "65 outputs": _outputs,
    "openings": _openings,
    "66 idle": _idle,
    "66 slow heads": _slow_heads,
    "68 upgrades": _upgrades,
    "69 bad signatures": _bad_signatures,
    "70 slow bodies, both": _slow_bodies,
    "71 page": _page,
    "78 404s": _not_found,
    "78 404s, anew": _not_found_anew,
    "78 unknown channels": _unknown_payments,
    "78 malformed": _malformed,
}
"""The attacks by name. The number is that of the fault with which the attack was first seen."""
