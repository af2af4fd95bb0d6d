"""Floods of the real signer process: its memory is bounded, and an honest peer is answered within its deadline.

Bounds of memory are for 64 connections, the default. Measured in all: 58 MiB at rest, 5 MiB more with ten thousand
connections of all kinds, 24 MiB more with unread replies, up to 30 MiB more for transactions as large as a frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from paychan.protocol.settlement import Settlement
from paychan.protocol.wire.signer_messages import (
    MAX_FRAME_BYTES,
    FundingReply,
    FundingRequest,
    Health,
    KeyRequest,
    Refusal,
    Reply,
    Request,
    SettlementRequest,
    encode_frame,
)
from paychan.protocol.wire.signer_versions import VERSION
from signer.keys.ring import KeyRing, hardened_keys
from signer.server.socket_file import BACKLOG, RESERVED_FILES
from tests.lib.signer_process import REGTEST, SignerProcess
from tests.signer.connected import HANDLER, PATIENT, client, served, show, sign
from tests.signer.crowd import Crowd, is_over, many_files, memory_bytes, open_files, until
from tests.signer.messages import CLIENT_KEY, EXPIRY, make_funding, make_request
from tests.signer.talking import HEALTHY, ask, connect, receive

pytestmark = pytest.mark.timeout(400)

MIB = 1 << 20
CROWD = 10_000
MANY = BACKLOG + 1_000
"""Connections that are open on the client side when the signer accepts them: more than its queue holds."""

HEALTH = encode_frame(Health(1))
PATIENT_CONFIG = REGTEST + "[socket]\nrequest_seconds = 60.0\n"

BOUND = 32 * MIB
"""Above the use at rest. Each of 64 connections may hold two buffers of 16 KiB and one socket buffer of 208 KiB: 16 MiB."""


def large_prefix(size: int) -> bytes:
    return size.to_bytes(4, "big") + bytes([VERSION])


KINDS = {
    "idle": b"",
    "half a prefix": bytes(2),
    "half a frame": HEALTH[:-1],
    "half a usual frame": large_prefix(60_000) + bytes(50_000),
    "half a large frame": large_prefix(MAX_FRAME_BYTES) + bytes(MAX_FRAME_BYTES - 100),
    "oversized": b"\xff" * 4,
    "empty": bytes(4),
    "http": b"GET / HTTP/1.1\r\nHost: signer\r\n\r\n",
    "old version": HEALTH[:4] + b"\x01" + HEALTH[5:],
    "unknown number": HEALTH[:4] + bytes([VERSION]) + b"\x92\x63\x01",
    "a request, replies unread": HEALTH,
}


async def honest(path: Path, keys: KeyRing) -> Settlement:
    """The requests of a server, each within three times the default deadline, because the machine has other work."""
    async with client(path, 15.0) as signer:
        assert await signer.health() == HEALTHY
        assert (await signer.public_key(CLIENT_KEY, EXPIRY)).server_key == keys.new(CLIENT_KEY, EXPIRY).public_key
        request = make_request(keys)
        await show(signer, request)
        return await sign(signer, request)


def keys_of(running: SignerProcess) -> KeyRing:
    return KeyRing([hardened_keys(running.master)])


async def test_ten_thousand_connections(tmp_path: Path) -> None:
    """During ten thousand connections of all kinds, memory and files stay bounded, and an honest peer is served."""
    with many_files(CROWD + 500), SignerProcess(tmp_path) as running:
        keys = keys_of(running)
        before = await honest(running.socket, keys)
        at_rest, files = memory_bytes(running.pid), open_files(running.pid)
        with Crowd(running.socket, CROWD, list(KINDS.values())) as crowd:
            crowd.wait_for(CROWD)
            for _ in range(5):
                assert await honest(running.socket, keys) == before
            assert (
                open_files(running.pid) < files + 64 + 64 + 32
            )  # slots, connections being refused, and connections being accepted
        until(lambda: open_files(running.pid) <= files + 1)

        assert memory_bytes(running.pid, "VmHWM") - at_rest < BOUND
        assert await honest(running.socket, keys) == before
        assert len(running.log.read_bytes()) < MIB


@pytest.mark.parametrize(
    "kind", ["idle", "half a frame", "half a usual frame", "half a large frame", "http", "a request, replies unread"]
)
async def test_flood_of_one_kind(tmp_path: Path, kind: str) -> None:
    """A flood of any single kind of connection neither keeps honest peers out nor takes more memory."""
    with many_files(2_500), SignerProcess(tmp_path) as running:
        keys = keys_of(running)
        before = await honest(running.socket, keys)
        at_rest = memory_bytes(running.pid)
        with Crowd(running.socket, MANY, [KINDS[kind]]) as crowd:
            crowd.wait_for(MANY)
            assert await honest(running.socket, keys) == before

        assert memory_bytes(running.pid, "VmHWM") - at_rest < BOUND


async def test_half_large_frames(tmp_path: Path) -> None:
    """Frames of the largest size that never end, on all connections, take bounded memory, and keep no honest large frame out."""
    frame = encode_frame(make_funding(MOST_OUTPUTS))
    patient = REGTEST + "[socket]\nrequest_seconds = 600.0\n"
    with SignerProcess(tmp_path, patient) as running, ExitStack() as crowd:
        at_rest = memory_bytes(running.pid)
        sending = [
            threading.Thread(target=_send, args=(crowd.enter_context(connect(running.socket)), frame[:-1]))
            for _ in range(60)
        ]
        for thread in sending:
            thread.start()
        until(lambda: memory_bytes(running.pid) > at_rest)

        assert isinstance(ask(running.socket, frame), FundingReply)
        assert ask(running.socket, Health(1)) == HEALTHY
        assert memory_bytes(running.pid, "VmHWM") - at_rest < BOUND
        running.stop()
        for thread in sending:
            thread.join()


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it was disconnected, as intended
        connection.sendall(data)


async def test_whole_large_frames(tmp_path: Path) -> None:
    """Forty of the largest funding transactions, from twenty servers at once, are all recorded, in bounded memory."""
    with SignerProcess(tmp_path, REGTEST + "[socket]\nrequest_seconds = 600.0\n") as running:
        async with client(running.socket, 110.0) as signer:
            await signer.health()
        at_rest = memory_bytes(running.pid)
        fundings = [make_funding(MOST_OUTPUTS, number) for number in range(4)]

        async def serve(number: int) -> None:
            async with client(running.socket, 110.0) as signer:
                for each in range(2):
                    funding = fundings[(number + each) % 4]
                    await signer.show_funding(funding.transaction, funding.outputs)

        await asyncio.gather(*map(serve, range(20)))

        assert ask(running.socket, Health(1)) == HEALTHY
        assert memory_bytes(running.pid, "VmHWM") - at_rest < BOUND


# --- one slow request ------------------------------------------------------------------------------------------------


MOST_OUTPUTS = 2_939
"""Outputs of P2PKH scripts in the largest transaction that nodes relay: 99,979 bytes."""


def large_settlement(keys: KeyRing) -> SettlementRequest:
    return make_request(keys, drained=199, request_id=9)


@pytest.mark.parametrize("kind", ["funding", "settlement"])
def test_large_request_delays_no_other(tmp_path: Path, kind: str) -> None:
    """Smaller requests are answered while the largest transaction, or 200 channels, are processed."""
    with SignerProcess(tmp_path, PATIENT_CONFIG) as running, connect(running.socket) as connection:
        large = make_funding(MOST_OUTPUTS) if kind == "funding" else large_settlement(keys_of(running))
        connection.sendall(encode_frame(large) + HEALTH + encode_frame(KeyRequest(2, CLIENT_KEY, EXPIRY)))

        small = [receive(connection) for _ in range(2)]

        assert sorted(type(reply).__name__ for reply in small) == ["HealthReply", "KeyReply"]
        last = receive(connection)
        if isinstance(large, FundingRequest):
            assert last == FundingReply(9)
        else:
            assert isinstance(last, Refusal)
            assert last.tag == "protocol-funding"  # it was judged: each channel's key, and each client's signature


async def test_hanging_key_store_delays_only_its_own_requests(tmp_path: Path) -> None:
    """While requests hang in the key store, all requests without a key are answered."""
    release = threading.Event()

    def handle(request: Request) -> Reply:
        if isinstance(request, KeyRequest):
            release.wait(PATIENT)
        return HANDLER(request)

    try:
        async with served(tmp_path, handle) as path, client(path) as signer:
            hanging = [asyncio.create_task(signer.public_key(CLIENT_KEY, EXPIRY)) for _ in range(24)]
            await asyncio.sleep(0.05)
            large = make_funding(1_000)

            assert (await signer.health()).network == "regtest"
            await signer.show_funding(large.transaction, large.outputs)

            assert not any(call.done() for call in hanging)
            release.set()
            assert len({(await call).server_key for call in hanging}) == 1
    finally:
        release.set()


# --- unread replies --------------------------------------------------------------------------------------------------


async def test_unread_replies(tmp_path: Path) -> None:
    """Peers that send requests without end and read nothing are disconnected; their unread replies take bounded memory."""
    hasty = REGTEST + "[socket]\nrequest_seconds = 3.0\n[policy]\nrequests_per_second = 1000000\n"
    with SignerProcess(tmp_path, hasty) as running, ExitStack() as crowd:
        keys = keys_of(running)
        await honest(running.socket, keys)
        request = make_request(keys)
        at_rest = memory_bytes(running.pid)
        greedy = [crowd.enter_context(connect(running.socket)) for _ in range(50)]
        sending = [
            threading.Thread(target=_send, args=(connection, encode_frame(request) * 3_000))
            for connection in greedy[:5]
        ]
        sending += [threading.Thread(target=_send, args=(connection, HEALTH * 40_000)) for connection in greedy[5:]]
        for thread in sending:
            thread.start()
        until(lambda: all(map(is_over, greedy)))

        assert memory_bytes(running.pid, "VmHWM") - at_rest < 2 * BOUND
        assert "socket.send() raised" not in running.log.read_text()
        assert isinstance(await honest(running.socket, keys), Settlement)
        for thread in sending:
            thread.join()


async def test_buffered_requests_of_a_disconnected_peer_are_not_answered(tmp_path: Path) -> None:
    """Buffered requests of a peer that reads nothing are not processed after it is disconnected."""
    answered = 0

    def handle(request: Request) -> Reply:
        nonlocal answered
        answered += 1
        return HANDLER(request)

    async with served(tmp_path, handle, request_seconds=0.5) as path:
        with connect(path) as greedy:
            greedy.setblocking(False)
            while not is_over(greedy):
                with contextlib.suppress(OSError):  # full, or closed
                    greedy.send(HEALTH * 1_000)
                await asyncio.sleep(0)
            by_then = answered
            await asyncio.sleep(0.5)

    assert by_then > 100
    assert answered - by_then < 10


# --- files -----------------------------------------------------------------------------------------------------------


async def test_no_free_file_descriptor(tmp_path: Path) -> None:
    """Without free file descriptors, connections make room, the ledger continues, and honest peers are served."""
    with many_files(2_500), SignerProcess(tmp_path) as running:
        keys = keys_of(running)
        before = await honest(running.socket, keys)
        files = open_files(running.pid)
        limit = files + 12
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (limit, limit))
        with Crowd(running.socket, MANY, [KINDS["idle"]]):
            until(lambda: "can't accept" in running.log.read_text())

            assert ask(running.socket, Health(1)) == HEALTHY
        until(lambda: open_files(running.pid) <= files + 1)

        assert await honest(running.socket, keys) == before


def test_limit_of_files_is_raised(tmp_path: Path) -> None:
    """A soft limit below the need of `socket.max_connections` is raised: all connections are open at the same time."""
    running = SignerProcess(tmp_path, REGTEST + "[socket]\nmax_connections = 400\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        running.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with many_files(1_000), ExitStack() as crowd:
        crowd.callback(running.stop)
        connections = [crowd.enter_context(connect(running.socket)) for _ in range(400)]
        for _ in range(2):
            for connection in connections:
                connection.sendall(HEALTH)
                assert receive(connection) == HEALTHY


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "room"),
    [(1024, 4096, 64, 64), (1024, 4096, 1064, 1064), (1024, 1024, 1064, 1024 - RESERVED_FILES), (64, 64, 128, 1)],
)
def test_room_that_the_limit_allows(soft: int, hard: int, wanted: int, room: int) -> None:
    """The hard limit, minus the ledger's files, bounds the number of connections; it is at least one."""
    code = (
        "import resource; from signer.server.socket_file import room_for; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); print(room_for({wanted}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert int(ended.stdout) == room
