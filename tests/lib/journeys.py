"""Walks the journeys of a channel through running processes, and returns the calls that each made.

`bench/journeys.py` prints them as a table. The processes are the real server, signer, token's process and payer. Each
journey is walked several times, and the walk that occurs most often counts: work that a process does now and then beside
a journey does not count.

    walk_payment(directory, version=1).files    # files of the server, in the order in which a payment enters them
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import psutil
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from coincurve import PrivateKey
from websockets.sync.client import connect

from paychan.client import Payer as ClientPayer
from paychan.protocol.address import key_script
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import Payment, encode_v1, sign_payment
from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.payment_frames import Taken, read_answers, write_payments
from paychan.protocol.wire.signer_messages import (
    FundingReply,
    FundingRequest,
    KeyReply,
    KeyRequest,
    Reply,
    Request,
    SettlementReply,
    SettlementRequest,
    decode_reply,
    encode_frame,
    frame_size,
)
from tests.lib.calls import Call, CallFile, recorded
from tests.lib.rbpcp import V1, V2, Payer
from tests.lib.signer_process import REGTEST, SignerProcess
from tests.lib.softhsm import SoftHsm
from tests.lib.system import Daemon, System

TIMES = 5
"""Walks of one journey; the first ones warm caches up."""

EXPIRY = UnixTime(1_900_000_000)
_FEE_SAT = Sat(5_000)
_HOUR = 3_600
_PATIENCE_SECONDS = 90.0
_SCAN, _SCAN_END = "Watcher.scan", "Watcher._wait"
_QUIET = {"channel": "idle_seconds = 3600", "watcher": "interval_seconds = 3600", "settlement": "margin_hours = 0"}
_FREE = "base_price_sat = 0\nadd_settlement_fee = false\nv2_price_sat = 0\n"


class Visit(NamedTuple):
    """Functions of one file that were called in a row.

    `entered` is false if the first of them was called by its own file, to which a call had returned.
    """

    file: str
    functions: tuple[str, ...]
    entered: bool


@dataclass(frozen=True)
class Walk:
    """The calls of one journey, in order."""

    calls: tuple[Call, ...]

    @property
    def visits(self) -> tuple[Visit, ...]:
        """The calls, grouped by file, in order.

        Two calls of one file in a row are one visit, even if another file makes both.
        """
        groups = ([*group] for _, group in groupby(self.calls, key=lambda call: call.file))
        return tuple(
            Visit(group[0].file, tuple(call.function for call in group), group[0].caller != group[0].file)
            for group in groups
        )

    @property
    def files(self) -> tuple[str, ...]:
        """The files that were entered, in the order of their first entry."""
        return tuple(dict.fromkeys(call.file for call in self.calls))

    @property
    def functions(self) -> int:
        """Number of different functions."""
        return len({(call.file, call.function) for call in self.calls})

    @property
    def entered_again(self) -> dict[str, int]:
        """Files that were entered more than once, with the number of entries."""
        entries = Counter(visit.file for visit in self.visits if visit.entered)
        return {file: count for file, count in entries.items() if count > 1}


def usual(walks: Sequence[Walk]) -> Walk:
    """Return the walk that occurs most often; of equally frequent ones, the shortest."""
    counts = Counter(tuple((call.file, call.function) for call in walk.calls) for walk in walks)
    best = min(counts, key=lambda names: (-counts[names], len(names)))
    return next(walk for walk in walks if tuple((call.file, call.function) for call in walk.calls) == best)


class RecordedSystem(System):
    """Signer and server that note their calls in a file."""

    def __init__(self, directory: Path, sections: dict[str, str]) -> None:
        super().__init__(directory, sections=sections)
        self.calls = CallFile(directory / "calls")

    def start_signer(self) -> None:
        self.signer = Daemon(
            self.directory / "signer.log", "paychan-signer", str(self.signer_file), **self.calls.environment
        )

    def start_server(self) -> None:
        with _environment(self.calls.environment):
            super().start_server()

    @property
    def processes(self) -> tuple[int, int]:
        """The server's process, then the signer's."""
        assert self.server is not None
        assert self.signer is not None
        return self.server.process.pid, self.signer.process.pid

    def walk(self, step: Callable[[], object]) -> Walk:
        """Take one step, and return the calls of the server."""
        self.calls.take_quiet(*self.processes)
        step()
        server = self.processes[0]
        return Walk(tuple(call for call in self.calls.take_quiet(*self.processes) if call.process == server))


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- the server -------------------------------------------------------------------------------------------------------


def walk_payment(directory: Path, version: int = 1) -> Walk:
    """Pay over a kept connection to the server; each request arrives whole."""
    with RecordedSystem(directory, _QUIET) as system, httpx.Client(trust_env=False, verify=False) as http:
        payer = Payer()
        client = (V1 if version == 1 else V2)(system.url, payer, http)
        assert client.open(payer.payment(100_000)).status_code == 201
        paid = iter(range(100_001, 200_000))
        where = urlsplit(system.url)
        with socket.create_connection((where.hostname, where.port)) as connection:

            def pay() -> None:
                connection.sendall(_request(client, payer.payment(next(paid))))
                answer = b""
                while not answer.endswith(b"}\n"):
                    answer += connection.recv(1 << 16) or _ended()
                assert answer.startswith(b"HTTP/1.1 200 "), answer

            return usual([system.walk(pay) for _ in range(TIMES)])


def _request(client: V1 | V2, payment: Payment) -> bytes:
    if isinstance(client, V1):
        url, body = f"{client.resource}?payment={encode_v1(payment)}", b""
    else:
        url, body = client.resource(), client.body(payment)
    where = urlsplit(url)
    head = f"PUT {where.path}?{where.query} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def walk_stream(directory: Path) -> Walk:
    """Pay over a payment stream, one payment in a frame."""
    with RecordedSystem(directory, _QUIET) as system, httpx.Client(trust_env=False, verify=False) as http:
        client = V2(system.url, Payer(), http)
        assert client.open(client.payer.payment(100_000)).status_code == 201
        paid = iter(range(100_001, 200_000))
        url = client.resource("/stream").replace("http", "ws", 1)
        with connect(url, proxy=None, compression=None, ping_interval=None) as stream:

            def pay() -> None:
                stream.send(write_payments([client.payer.payment(next(paid))]))
                frame = stream.recv(timeout=30)
                assert isinstance(frame, bytes)
                assert isinstance(read_answers(frame)[0], Taken)

            return usual([system.walk(pay) for _ in range(TIMES)])


def walk_opening(directory: Path) -> Walk:
    """Open a channel in version 2 by one request."""
    with RecordedSystem(directory, _QUIET) as system, httpx.Client(trust_env=False, verify=False) as http:

        def open_one() -> None:
            client = V2(system.url, Payer(), http)
            assert client.open(client.payer.payment(100_000)).status_code == 201

        return usual([system.walk(open_one) for _ in range(TIMES)])


def walk_expiry(directory: Path) -> Walk:
    """Let the server settle a channel at its expiry: from the begin of the scan that finds the channel to its end.

    The clock of server and signer is set forward, from one channel's settlement period to the next one's.
    """
    sections = {
        "open": f"{_FREE}min_duration_hours = 1",
        "channel": "settlement_period_hours = 1",
        "settlement": "margin_hours = 0",
        "watcher": "interval_seconds = 0.2",
    }
    begun = int(time.time())
    payers = [Payer(begun + _HOUR * (3 + number)) for number in range(TIMES)]
    walks = []
    with RecordedSystem(directory, sections) as system, httpx.Client(trust_env=False, verify=False) as http:
        for payer in payers:
            assert V1(system.url, payer, http).open(payer.payment(100_000)).status_code == 201
        for payer in payers:
            system.calls.take_quiet(*system.processes)
            system.calls.set_forward(payer.expiry - _HOUR + 1 - begun)
            walks.append(_settling_scan(system))
            assert system.channel(payer.outpoint)["close_reason"] == "expiry"
    return usual(walks)


def _settling_scan(system: RecordedSystem) -> Walk:
    """Return the server's calls in the next scan that settles."""
    calls: list[Call] = []
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        calls += [call for call in system.calls.take() if call.process == system.processes[0]]
        begins = [number for number, call in enumerate(calls) if call.function == _SCAN]
        for begin, end in pairwise(begins):
            scan = tuple(takewhile(lambda call: call.function != _SCAN_END, calls[begin:end]))
            if any(call.file.startswith("actors/settling/steps") for call in scan):
                return Walk(scan)
        time.sleep(0.01)
    msg = "no scan settled"
    raise AssertionError(msg)


# --- the payer --------------------------------------------------------------------------------------------------------


def walk_payer(directory: Path) -> Walk:
    """Pay by the payer's library: version 2, by threads."""
    with System(directory, sections=_QUIET) as system, ClientPayer(system.url, wallet=directory / "wallet") as payer:
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        channel.open()
        walks = []
        for _ in range(TIMES):
            with recorded() as calls:
                channel.pay(1)
            walks.append(Walk(tuple(calls)))
        return usual(walks)


# --- the signer -------------------------------------------------------------------------------------------------------


class RecordedSigner(SignerProcess):
    """A signer that notes its calls in a file."""

    def __init__(self, directory: Path, config: str) -> None:
        super().__init__(directory, config)
        self.calls = CallFile(directory / "calls")

    def start(self, *command: str) -> None:
        with _environment(self.calls.environment):
            super().start(*command)

    def ask(self, connection: socket.socket, request: Request) -> Reply:
        connection.sendall(encode_frame(request))
        size = frame_size(_receive(connection, 4))
        return decode_reply(_receive(connection, size))


def _receive(connection: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        got += connection.recv(size - len(got)) or _ended()
    return got


def _ended() -> bytes:
    msg = "the process closed the connection"
    raise AssertionError(msg)


def walk_signature(directory: Path) -> Walk:
    """Let the signer sign the settlement of one channel with keys in its memory."""
    return _walk_signature(directory, REGTEST)


def walk_token_signature(directory: Path) -> Walk:
    """The same with keys in a SoftHSM token; the calls of the token's process are included."""
    token = SoftHsm(directory / "token")
    with _environment(token.environment):
        return _walk_signature(directory, token.signer_config)


def _walk_signature(directory: Path, config: str) -> Walk:
    walks = []
    with RecordedSigner(directory, config) as signer, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(signer.socket))
        processes = signer.pid, *(child.pid for child in psutil.Process(signer.pid).children())
        for number in range(TIMES):
            request = _settlement(signer, connection, number)
            signer.calls.take_quiet(*processes)
            reply = signer.ask(connection, request)
            assert isinstance(reply, SettlementReply), reply
            walks.append(Walk(tuple(signer.calls.take_quiet(*processes))))
    return usual(walks)


def _settlement(signer: RecordedSigner, connection: socket.socket, number: int) -> SettlementRequest:
    """Show the signer a new channel, as a server does; return the request to settle it."""
    client = PrivateKey(bytes(31) + bytes([number + 1]))
    key = signer.ask(connection, KeyRequest(1, client.public_key.format(), EXPIRY))
    assert isinstance(key, KeyReply), key
    terms = make_terms(key.server_key, client.public_key.format(), EXPIRY)
    funding = CTransaction([CTxIn(COutPoint(bytes(32), number))], [CTxOut(1_000_000, CScript(terms.funding_script))])
    shown = signer.ask(connection, FundingRequest(1, funding.serialize(), (0,)))
    assert isinstance(shown, FundingReply), shown
    outpoint, script = OutPoint(bytes(funding.GetTxid()), 0), key_script(client.public_key.format())
    payment = sign_payment(client, terms, outpoint, Sat(1_000_000), script, Sat(400_000))
    claim = Claim(terms, outpoint, Sat(1_000_000), script, payment)
    return SettlementRequest(1, (claim,), key.destination_script, _FEE_SAT)
