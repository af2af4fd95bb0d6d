"""The clients of a load: channels whose requests are built before the clock starts, and a lean exchange of them.

They share the machine with the server, so of an answer they read only status and Content-Length. Any status but 2xx
ends the run with its reason.
"""

from __future__ import annotations

import resource
import socket
import time
from array import array
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import NoReturn
from urllib.parse import urlencode

from coincurve import PrivateKey

from paychan.protocol.address import decode_address
from paychan.protocol.kinds.base import ChannelTerms
from paychan.protocol.payment import Payment, encode_v1, sign_payment
from paychan.protocol.types import Network, OutPoint, Sat
from paychan.protocol.wire.rbpcp import Dialect, encode_json, opening_secret, payment_data

CHANGE_ADDRESS = "mmA2XECa7bVERzQKkyy1pNBQ3PC4HnxTC5"
OPENING_SAT = 100_000
CHANNEL_SECONDS = 7 * 24 * 3600
"""Change address (of v1), opening payment and duration, as in GenTestData (RBPCP §15)."""


class BenchError(Exception):
    """The run cannot continue; the text says why."""


def stop(reason: str) -> NoReturn:
    """End the run with an error."""
    raise BenchError(reason)


@dataclass(frozen=True)
class Server:
    """Address of the server."""

    host: str
    port: int


@dataclass(frozen=True)
class Funded:
    """A channel that can be opened, and its client key."""

    key: PrivateKey
    terms: ChannelTerms
    outpoint: OutPoint
    value_sat: Sat


@dataclass(frozen=True)
class Session:
    """The requests of one client, ready to be sent."""

    opening: bytes
    payments: list[bytes]
    closing: bytes


@dataclass(frozen=True)
class Paid:
    """A client's measurements: CLOCK_MONOTONIC of first send and last answer, latencies in ns, its own CPU seconds."""

    first_ns: int
    last_ns: int
    latencies: array[int]
    cpu_seconds: float


# --- a client's requests --------------------------------------------------------------------------------------------


def session_v1(server: Server, payments: list[Payment], terms: ChannelTerms, outpoint: OutPoint) -> Session:
    """Build v1 requests: POST, PUTs, and a DELETE with the last payment, all in the query."""
    new = {
        "client_pubkey": terms.client_key.hex(),
        "exp_time": terms.expiry.lock_time,
        "change_address": CHANGE_ADDRESS,
    }
    channel = f"/v1/channels/{outpoint.txid_hex}/{outpoint.vout}?payment="
    texts = [encode_v1(payment) for payment in payments]
    return Session(
        request("POST", f"/v1/channels/new?{urlencode(new)}&payment={texts[0]}", server),
        [request("PUT", channel + text, server) for text in texts[1:]],
        request("DELETE", channel + texts[-1], server),
    )


def session_v2(server: Server, payments: list[Payment], terms: ChannelTerms, outpoint: OutPoint) -> Session:
    """Build v2 requests: POST, PUTs, and a closing PUT that offers no fee, all in JSON bodies."""
    channel, secret = f"/v2/channels/{outpoint.txid_hex}/{outpoint.vout}", opening_secret(payments[0]).hex()
    facts = {
        "redeem_script": terms.redeem_script.hex(),
        "funding_txid": outpoint.txid_hex,
        "funding_vout": outpoint.vout,
        "change_address": terms.funding_address(Network.TEST),
    }
    opening = encode_json(payment_data(payments[0], Dialect.S, **facts))
    bodies = [
        encode_json({"payment_data": payment_data(payment, Dialect.S), "application_data": ""})
        for payment in payments[1:]
    ]
    return Session(
        request("POST", f"{channel}?secret={secret}", server, opening),
        [request("PUT", f"{channel}?secret={secret}", server, body) for body in bodies],
        request("PUT", f"{channel}/close?secret={secret}", server, bodies[-1]),
    )


def request(method: str, target: str, server: Server, body: bytes = b"") -> bytes:
    """Build an HTTP/1.1 request."""
    kind = "Content-Type: application/json\r\n" if body else ""
    head = (
        f"{method} {target} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\n{kind}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def generate(server: Server, funded: Funded, count: int, version: int) -> Session:
    """Sign all payments, as GenTestData did."""
    terms, first = funded.terms, funded.value_sat - OPENING_SAT
    script = decode_address(CHANGE_ADDRESS, Network.TEST) if version == 1 else terms.funding_script
    payments = [
        sign_payment(funded.key, terms, funded.outpoint, funded.value_sat, script, Sat(first - paid))
        for paid in range(count + 1)
    ]
    return (session_v1 if version == 1 else session_v2)(server, payments, terms, funded.outpoint)


# --- a client -------------------------------------------------------------------------------------------------------


def exchange(connection: socket.socket, sent: bytes) -> None:
    """Send a request and read its answer to the last byte.

    Raises:
        BenchError: a status other than 2xx, an answer without Content-Length, or a closed connection.
    """
    connection.sendall(sent)
    answer = _more(connection)
    while (end := answer.find(b"\r\n\r\n")) < 0:
        answer += _more(connection)
    head = answer[:end].lower()
    start = head.find(b"\r\ncontent-length:")
    status = head.partition(b"\r\n")[0].decode("latin1")
    if start < 0 or not status.startswith("http/1.1 2"):
        what = sent[:40].decode("latin1")
        stop(f"{what}…: {answer[9 : len(status)].decode('latin1')}")
    size = int(head[start + 17 :].partition(b"\r\n")[0])
    while len(answer) < end + 4 + size:
        answer += _more(connection)


def _more(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    if not part:
        stop("the server closed the connection")
    return part


def client(server: Server, funded: Funded, count: int, version: int, go: Event, close: Event, pipe: Connection) -> None:
    """Open, pay over and close one channel; report "ready", then `Paid`, then "closed", or the text of a failure."""
    try:
        session = generate(server, funded, count, version)
        with socket.create_connection((server.host, server.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            exchange(connection, session.opening)
            pipe.send("ready")
            go.wait()
            pipe.send(pay(connection, session.payments))
            close.wait()
            exchange(connection, session.closing)
            pipe.send("closed")
    except (BenchError, OSError) as error:
        pipe.send(BenchError(str(error)))


def pay(connection: socket.socket, payments: list[bytes]) -> Paid:
    """Send the payments one after another."""
    clock, latencies = time.monotonic_ns, array("q")
    used = resource.getrusage(resource.RUSAGE_SELF)
    first = last = clock()
    for sent in payments:
        exchange(connection, sent)
        now = clock()
        latencies.append(now - last)
        last = now
    spent = resource.getrusage(resource.RUSAGE_SELF)
    cpu = spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime
    return Paid(first, last, latencies, cpu)
