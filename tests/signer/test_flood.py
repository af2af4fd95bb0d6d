"""Floods against the real signer process: what it holds is bounded, and the honest peer is answered within its deadline.

Bounds of memory are those of 64 connections, the default. Measured on the whole: 58 MiB at rest, 5 MiB more with ten thousand
connections of all kinds, 24 MiB more with replies that nobody reads, up to 30 MiB more for transactions as large as a frame.
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
from hashlib import sha256
from pathlib import Path

import pytest
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript

from paychan.protocol.settlement import Settlement
from paychan.protocol.wire.signer_messages import (
    MAX_FRAME_BYTES,
    VERSION,
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
from signer.keys.ring import KeyRing, hardened_keys
from signer.server.scheduling import WORKERS
from signer.server.socket_file import BACKLOG, RESERVED_FILES
from tests.lib.signer_process import REGTEST, SignerProcess
from tests.signer.connected import HANDLER, PATIENT, client, served, show, sign
from tests.signer.crowd import Crowd, is_over, many_files, memory_bytes, open_files, until
from tests.signer.messages import CHANGE_SCRIPT, CLIENT_KEY, EXPIRY, make_request
from tests.signer.talking import HEALTHY, ask, connect, receive

pytestmark = pytest.mark.timeout(400)

MIB = 1 << 20
CROWD = 10_000
MANY = BACKLOG + 1_000
"""So many are open on their side when the signer accepts them: more than wait in its queue."""

HEALTH = encode_frame(Health(1))
PATIENT_CONFIG = REGTEST + "[socket]\nrequest_seconds = 60.0\n"

BOUND = 32 * MIB
"""More than at rest. Each of 64 connections may hold two buffers of 16 KiB, and once what a socket holds, 208 KiB: 16 MiB."""

LARGE_BOUND = 96 * MIB
"""More than at rest: eight frames of 1 MiB, copied on the way, and the objects that Python makes of two of them: 18 MiB each."""


def large_prefix(size: int) -> bytes:
    return size.to_bytes(4, "big") + bytes([VERSION])


KINDS = {
    "idle": b"",
    "half a prefix": bytes(2),
    "half a frame": HEALTH[:-1],
    "half a usual frame": large_prefix(60_000) + bytes(50_000),
    "half a large frame": large_prefix(MAX_FRAME_BYTES) + bytes(500_000),
    "oversized": b"\xff" * 4,
    "empty": bytes(4),
    "http": b"GET / HTTP/1.1\r\nHost: signer\r\n\r\n",
    "old version": HEALTH[:4] + b"\x01" + HEALTH[5:],
    "unknown number": HEALTH[:4] + bytes([VERSION]) + b"\x92\x63\x01",
    "a request, replies unread": HEALTH,
}


async def honest(path: Path, keys: KeyRing) -> Settlement:
    """What a server asks; each call within the default deadline, three times as long on a machine that others use too."""
    async with client(path, 15.0) as signer:
        assert await signer.health() == HEALTHY
        assert (await signer.public_key(CLIENT_KEY, EXPIRY)).server_key == keys.new(CLIENT_KEY, EXPIRY).public_key
        request = make_request(keys)
        await show(signer, request)
        return await sign(signer, request)


def keys_of(running: SignerProcess) -> KeyRing:
    return KeyRing([hardened_keys(running.master)])


async def test_ten_thousand_connections(tmp_path: Path) -> None:
    """With ten thousand connections at once, of all kinds and coming on and on, memory and files stay bounded, and an honest peer that comes then is served."""
    with many_files(CROWD + 500), SignerProcess(tmp_path) as running:
        keys = keys_of(running)
        before = await honest(running.socket, keys)
        at_rest, files = memory_bytes(running.pid), open_files(running.pid)
        with Crowd(running.socket, CROWD, list(KINDS.values())) as crowd:
            crowd.wait_for(CROWD)
            for _ in range(5):
                assert await honest(running.socket, keys) == before
            assert open_files(running.pid) < files + 64 + 64 + 32  # places, farewells, and those on their way
        until(lambda: open_files(running.pid) <= files + 1)

        assert memory_bytes(running.pid, "VmHWM") - at_rest < BOUND
        assert await honest(running.socket, keys) == before
        assert len(running.log.read_bytes()) < MIB


@pytest.mark.parametrize(
    "kind", ["idle", "half a frame", "half a usual frame", "half a large frame", "http", "a request, replies unread"]
)
async def test_flood_of_one_kind(tmp_path: Path, kind: str) -> None:
    """No kind of connection keeps the honest out, or takes more memory, when all that come are of that kind."""
    with many_files(2_500), SignerProcess(tmp_path) as running:
        keys = keys_of(running)
        before = await honest(running.socket, keys)
        at_rest = memory_bytes(running.pid)
        with Crowd(running.socket, MANY, [KINDS[kind]]) as crowd:
            crowd.wait_for(MANY)
            assert await honest(running.socket, keys) == before

        assert memory_bytes(running.pid, "VmHWM") - at_rest < (LARGE_BOUND if "large" in kind else BOUND)


async def test_half_large_frames(tmp_path: Path) -> None:
    """Frames of 1 MiB that never end, on as many connections as there are, take bounded memory, and keep no honest large frame out."""
    frame = encode_frame(funding_of(25_000))
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
        assert memory_bytes(running.pid, "VmHWM") - at_rest < LARGE_BOUND
        running.stop()
        for thread in sending:
            thread.join()


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it was cut off, as it should be
        connection.sendall(data)


async def test_whole_large_frames(tmp_path: Path) -> None:
    """Forty funding transactions as large as a block, from twenty servers at once, are all remembered, in bounded memory."""
    with SignerProcess(tmp_path, REGTEST + "[socket]\nrequest_seconds = 600.0\n") as running:
        async with client(running.socket, 110.0) as signer:
            await signer.health()
        at_rest = memory_bytes(running.pid)
        fundings = [funding_of(25_000, number) for number in range(4)]

        async def serve(number: int) -> None:
            async with client(running.socket, 110.0) as signer:
                for each in range(2):
                    funding = fundings[(number + each) % 4]
                    await signer.show_funding(funding.transaction, funding.outputs)

        await asyncio.gather(*map(serve, range(20)))

        assert ask(running.socket, Health(1)) == HEALTHY
        assert memory_bytes(running.pid, "VmHWM") - at_rest < LARGE_BOUND


# --- one slow request ---------------------------------------------------------------------------------------------------


def funding_of(outputs: int, number: int = 0) -> FundingRequest:
    """A funding transaction with very many outputs."""
    spent = CTxIn(COutPoint(sha256(b"large %d" % number).digest(), 0))
    transaction = CTransaction([spent], [CTxOut(1_000, CScript(CHANGE_SCRIPT))] * outputs)
    return FundingRequest(9, transaction.serialize(), (outputs - 1,))


def large_settlement(keys: KeyRing) -> SettlementRequest:
    return make_request(keys, drained=199, request_id=9)


@pytest.mark.parametrize("kind", ["funding", "settlement"])
def test_large_request_holds_up_nobody(tmp_path: Path, kind: str) -> None:
    """A transaction as large as a block, or a settlement of 200 channels, is worked on while smaller requests are answered, of the same connection too."""
    with SignerProcess(tmp_path, PATIENT_CONFIG) as running, connect(running.socket) as connection:
        large = funding_of(25_000) if kind == "funding" else large_settlement(keys_of(running))
        connection.sendall(encode_frame(large) + HEALTH + encode_frame(KeyRequest(2, CLIENT_KEY, EXPIRY)))

        small = [receive(connection) for _ in range(2)]

        assert sorted(type(reply).__name__ for reply in small) == ["HealthReply", "KeyReply"]
        last = receive(connection)
        if isinstance(large, FundingRequest):
            assert last == FundingReply(9)
        else:
            assert isinstance(last, Refusal)
            assert last.tag == "protocol-funding"  # judged: each channel's key, and each client's signature


async def test_hanging_key_store_holds_up_only_who_asks(tmp_path: Path) -> None:
    """Although more requests hang in the key store than threads wait for it, all that needs no key is answered, of the same connection too."""
    release = threading.Event()

    def handle(request: Request) -> Reply:
        if isinstance(request, KeyRequest):
            release.wait(PATIENT)
        return HANDLER(request)

    try:
        async with served(tmp_path, handle) as path, client(path) as signer:
            hanging = [asyncio.create_task(signer.public_key(CLIENT_KEY, EXPIRY)) for _ in range(WORKERS + 8)]
            await asyncio.sleep(0.05)
            large = funding_of(1_000)

            assert (await signer.health()).network == "regtest"
            await signer.show_funding(large.transaction, large.outputs)

            assert not any(call.done() for call in hanging)
            release.set()
            assert len({(await call).server_key for call in hanging}) == 1
    finally:
        release.set()


# --- replies that nobody reads --------------------------------------------------------------------------------------------


async def test_replies_that_nobody_reads(tmp_path: Path) -> None:
    """Peers that send requests on and on and read nothing are cut off; what they leave unread takes bounded memory."""
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


async def test_what_a_peer_left_that_was_cut_off_is_not_answered(tmp_path: Path) -> None:
    """Of the requests that lie in our buffer when a peer that reads nothing is cut off, none is worked on any more."""
    answered = 0

    def handle(request: Request) -> Reply:
        nonlocal answered
        answered += 1
        return HANDLER(request)

    async with served(tmp_path, handle, request_seconds=0.5) as path:
        with connect(path) as greedy:
            greedy.setblocking(False)
            while not is_over(greedy):
                with contextlib.suppress(OSError):  # full, or over
                    greedy.send(HEALTH * 1_000)
                await asyncio.sleep(0)
            by_then = answered
            await asyncio.sleep(0.5)

    assert by_then > 100
    assert answered - by_then < 10


# --- files --------------------------------------------------------------------------------------------------------------


async def test_no_file_left(tmp_path: Path) -> None:
    """When the kernel gives no file descriptor any more, connections make room, the ledger goes on, and the honest are served; nothing of it remains."""
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
    """A soft limit below what `socket.max_connections` needs is raised: they all have a place at the same time."""
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
    """There are as many connections as the hard limit allows beside the ledger's files, and never none."""
    code = (
        "import resource; from signer.server.socket_file import room_for; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); print(room_for({wanted}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert int(ended.stdout) == room
