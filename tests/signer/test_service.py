"""The signer as a process over its real socket: which peers are served, and that no peer delays the others."""

from __future__ import annotations

import grp
import os
import random
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.keytree import HARDENED, Node
from paychan.protocol.types import Network
from paychan.protocol.wire.signer_messages import (
    MAX_FRAME_BYTES,
    ChildReply,
    Health,
    KeyReply,
    KeyRequest,
    Refusal,
    Request,
    ReserveReply,
    ReserveRequest,
    SettlementReply,
    decode_reply,
    encode_frame,
    frame_size,
)
from paychan.protocol.wire.signer_versions import VERSION
from signer.keys.ring import RESERVE_PATH, KeyRing, channel_words, hardened_keys
from tests.lib.customer import wait_for
from tests.lib.signer_process import COMMAND, DEBUG, REGTEST, SignerProcess
from tests.signer.messages import (
    CLIENT_KEY,
    EXPIRY,
    make_child_request,
    make_funding,
    make_request,
    make_reserve_request,
    mutated,
)
from tests.signer.talking import HEALTHY, ask, connect, receive, show

HALF_FRAME = encode_frame(Health(1))[:-1]


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SignerProcess]:
    """One process for all tests that leave its state unchanged."""
    with SignerProcess(tmp_path_factory.mktemp("signer")) as running:
        yield running


# --- served peers ---------------------------------------------------------------------------------------------------


def test_socket_is_private(signer: SignerProcess) -> None:
    """Socket and seed have mode 0600: no other user can even connect."""
    status = signer.socket.stat()

    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert stat.S_IMODE(signer.seed.stat().st_mode) == 0o600
    assert ask(signer.socket, Health(1)) == HEALTHY


SPEAK_AS_NOBODY = """
import os, socket, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(bytes.fromhex(sys.argv[2]))
answer = b""
while chunk := connection.recv(4096):
    answer += chunk
print(answer.hex())
"""


def ask_as_nobody(path: Path, message: bytes) -> bytes:
    """All bytes that the signer sends to a process of user and group 65534."""
    command = [sys.executable, "-c", SPEAK_AS_NOBODY, str(path), message.hex()]
    return bytes.fromhex(subprocess.run(command, capture_output=True, check=True, text=True, timeout=30).stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_policy_peer() -> None:
    """A process of a user who is not on the list is refused by its credentials, even if it can open the socket."""
    with tempfile.TemporaryDirectory() as name, SignerProcess(Path(name)) as running:
        Path(name).chmod(0o755)
        running.socket.chmod(0o666)
        reply = decode_reply(ask_as_nobody(running.socket, encode_frame(Health(1)))[4:])

    assert isinstance(reply, Refusal)
    assert (reply.id, reply.tag) == (0, "policy-peer")
    assert "uid 65534" in reply.reason


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_users_of_the_group_on_the_list_are_answered() -> None:
    """With a group, the socket has mode 0660 and belongs to it, and a listed user of the group is served."""
    with tempfile.TemporaryDirectory() as name:
        allowed = f'[socket]\ngroup = "{grp.getgrgid(65534).gr_name}"\nallowed_uids = [65534, {os.geteuid()}]\n'
        with SignerProcess(Path(name), REGTEST + allowed) as running:
            Path(name).chmod(0o755)
            status = running.socket.stat()
            # garbage after the request, so that the signer ends the connection
            frame = ask_as_nobody(running.socket, encode_frame(Health(1)) + b"\xff" * 4)

    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, 65534)
    assert decode_reply(frame[4 : 4 + frame_size(frame[:4])]) == HEALTHY


@pytest.mark.parametrize("piece_bytes", [1, 3, 7, 1_000])
def test_requests_that_come_in_pieces_or_together_are_answered(signer: SignerProcess, piece_bytes: int) -> None:
    """If the bytes of a connection arrive in any pieces, each request gets its reply."""
    stream = b"".join(encode_frame(Health(number)) for number in range(8))
    with connect(signer.socket) as connection:
        for begin in range(0, len(stream), piece_bytes):
            connection.sendall(stream[begin : begin + piece_bytes])
            time.sleep(0.002)
        connection.sendall(encode_frame(Health(8)))
        replies = [receive(connection) for _ in range(9)]

        assert sorted(reply.id for reply in replies if reply) == list(range(9))
        for number in range(3):  # whole and alone
            connection.sendall(encode_frame(Health(number)))
            assert getattr(receive(connection), "id", None) == number


@pytest.mark.parametrize("seed", range(4))
def test_frames_of_all_sizes_in_any_pieces_are_answered(signer: SignerProcess, seed: int) -> None:
    """Small frames and frames larger than the input buffer, many more than are read at a time, in pieces of any size."""
    chance = random.Random(seed)
    requests = [
        make_funding(chance.choice((1, 400, 481, 482, 483, 2_900)), number, request_id=number)
        if chance.random() < 0.2
        else Health(number)
        for number in range(1, 200)
    ]
    stream = b"".join(map(encode_frame, requests))

    def send(connection: socket.socket) -> None:
        begin = 0
        while begin < len(stream):
            size = chance.choice((1, 5, 100, 4_096, 16_384, 16_385, 200_000))
            connection.sendall(stream[begin : begin + size])
            begin += size

    with connect(signer.socket) as connection:
        sending = threading.Thread(target=send, args=(connection,))
        sending.start()
        replies = [receive(connection) for _ in requests]
        sending.join()

    assert sorted((reply.id, type(reply).__name__) for reply in replies if reply) == [
        (request.id, "HealthReply" if isinstance(request, Health) else "FundingReply") for request in requests
    ]


# --- invalid input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: signer\r\n\r\n",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        b"\xff" * 4,
        bytes(4),
        (4).to_bytes(4, "big") + b"\x00\x92\x01\x05",
        (4).to_bytes(4, "big") + b"\x04\x92\x01\x05",
        (4).to_bytes(4, "big") + bytes([VERSION + 1]) + b"\x92\x01\x05",
        (1).to_bytes(4, "big") + bytes([VERSION]),
        (4).to_bytes(4, "big") + bytes([VERSION]) + b"\x92\x09\x05",
        (4).to_bytes(4, "big") + bytes([VERSION]) + b"\x92\x65\x05",
        (3).to_bytes(4, "big") + bytes([VERSION]) + b"\x91\x03",
        (2).to_bytes(4, "big") + bytes([VERSION]) + b"\xc1",
        (60_001).to_bytes(4, "big") + bytes([VERSION]) + b"\x91" * 60_000,
    ],
    ids=[
        "http", "oversized", "4-GiB", "empty", "version-0", "version-4", "later-version", "no-body",
        "unknown-number", "a-reply", "missing-fields", "no-msgpack", "deep",
    ],
)  # fmt: skip
def test_garbage_is_refused_and_ends_the_connection(signer: SignerProcess, garbage: bytes) -> None:
    """Input that is no message of this version gets a refusal with id 0 and ends the connection; others stay open."""
    with connect(signer.socket) as bad, connect(signer.socket) as good:
        bad.sendall(garbage)
        reply = receive(bad)
        assert isinstance(reply, Refusal)
        assert (reply.id, reply.tag) == (0, "protocol-message")
        assert receive(bad) is None

        good.sendall(encode_frame(Health(1)))
        assert receive(good) == HEALTHY


def test_requests_before_garbage_are_answered(signer: SignerProcess) -> None:
    """Requests that came whole are answered under their ids, before the refusal of the bytes after them."""
    requests = [KeyRequest(number, CLIENT_KEY, EXPIRY) for number in range(1, 6)]
    with connect(signer.socket) as connection:
        connection.sendall(b"".join(map(encode_frame, requests)) + bytes(4))
        replies = [receive(connection) for _ in range(6)]

    assert sorted(reply.id for reply in replies if isinstance(reply, KeyReply)) == [1, 2, 3, 4, 5]
    assert isinstance(replies[-1], Refusal)


def test_unfinished_frames_affect_no_other_peer(signer: SignerProcess) -> None:
    """A peer that leaves in the middle of a frame, at any byte, affects no other."""
    frame = encode_frame(KeyRequest(1, CLIENT_KEY, EXPIRY))
    for size in range(len(frame)):
        with connect(signer.socket) as connection:
            connection.sendall(frame[:size])

    assert ask(signer.socket, Health(1)) == HEALTHY


# --- no peer delays another -----------------------------------------------------------------------------------------

HASTY = REGTEST + "[socket]\nrequest_seconds = 0.3\nidle_seconds = 0.3\nmax_connections = 8\n"


def test_policy_deadline_of_half_a_frame(tmp_path: Path) -> None:
    """Half a frame is refused after the time limit, and an idle connection is closed without a message."""
    with SignerProcess(tmp_path, HASTY) as running, connect(running.socket) as half, connect(running.socket) as idle:
        half.sendall(HALF_FRAME)
        reply = receive(half)

        assert isinstance(reply, Refusal)
        assert (reply.id, reply.tag) == (0, "policy-deadline")
        assert receive(half) is None
        assert receive(idle) is None


def test_slow_peers_do_not_hold_up_others(signer: SignerProcess) -> None:
    """While twenty peers have sent half a frame, an honest one is answered."""
    with ExitStack() as slow:
        for _ in range(20):
            slow.enter_context(connect(signer.socket)).sendall(HALF_FRAME)

        assert ask(signer.socket, Health(1)) == HEALTHY


def test_peer_that_reads_no_replies_is_disconnected(tmp_path: Path) -> None:
    """A peer that sends without end and reads nothing delays no other, and is disconnected before all is processed."""
    with SignerProcess(tmp_path, HASTY) as running, connect(running.socket) as greedy:
        greedy.setblocking(False)
        asked = greedy.send(encode_frame(Health(1)) * 20_000) // len(encode_frame(Health(1)))

        assert ask(running.socket, Health(1)) == HEALTHY
        end = select.poll()
        end.register(greedy, 0)
        assert end.poll(20_000)  # reports the end without reading
        answered = 0
        while chunk := read_what_is_left(greedy):
            answered += len(chunk)

    assert 0 < answered < asked * 60


def read_what_is_left(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 20)
    except ConnectionResetError:  # it was disconnected with unread requests
        return b""


def test_the_connection_idle_longest_makes_room(tmp_path: Path) -> None:
    """A new connection, when all slots are in use, replaces the one that has been idle longest."""
    with SignerProcess(tmp_path, REGTEST + "[socket]\nmax_connections = 2\n") as running, ExitStack() as connections:
        first, second = (connections.enter_context(asked(running.socket)) for _ in range(2))
        ask_again(first)

        third = connections.enter_context(asked(running.socket))

        assert receive(second) is None
        for connection in (first, third):
            ask_again(connection)


def asked(path: Path) -> socket.socket:
    """A connection that has been answered."""
    connection = connect(path)
    ask_again(connection)
    return connection


def ask_again(connection: socket.socket) -> None:
    connection.sendall(encode_frame(Health(1)))
    assert receive(connection) == HEALTHY


def test_half_a_frame_keeps_no_slot(tmp_path: Path) -> None:
    """Peers that occupy all slots with half frames are closed for new connections, long before their time limit."""
    patient = REGTEST + "[socket]\nmax_connections = 4\nrequest_seconds = 600.0\n"
    with SignerProcess(tmp_path, patient) as running, ExitStack() as connections:
        for _ in range(8):
            connections.enter_context(connect(running.socket)).sendall(HALF_FRAME)

        assert ask(running.socket, Health(1)) == HEALTHY


# --- start and stop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end the process with status 0 and remove the socket, also with connections open."""
    with SignerProcess(tmp_path) as running, connect(running.socket) as connection:
        connection.sendall(HALF_FRAME)
        os.kill(running.pid, number)
        assert running.process is not None
        assert running.process.wait(20) == 0
        assert not running.socket.exists()

    lines = running.log.read_text().splitlines()
    assert ['event="signer stopped"' in line for line in lines] == [False] * (len(lines) - 1) + [True]


def test_start_logs_its_facts(signer: SignerProcess) -> None:
    """One line at the start has network, key mode, socket, destination, and the address of the reserve."""
    wait_for(lambda: "signer started" in signer.log.read_text(), "the line, which follows the socket")
    line = next(line for line in signer.log.read_text().splitlines() if "signer started" in line)

    assert (
        f'network=regtest key_mode=hardened state={signer.directory} socket={signer.socket} destination="derived per channel"'
        in line
    )
    assert f"identity={hardened_keys(signer.master).identity_key().public_key.hex()} " in line
    reserve = hardened_keys(signer.master).reserve_key()
    assert f"reserve={encode_address(key_script(reserve.public_key), Network.REGTEST)}" in line


def test_debug_is_loud(tmp_path: Path) -> None:
    """With the debug key, the signer warns at the start that its coins can be stolen."""
    with SignerProcess(tmp_path, DEBUG) as running:
        reply = ask(running.socket, KeyRequest(1, CLIENT_KEY, EXPIRY))

    assert isinstance(reply, KeyReply)
    assert reply.server_key.hex() == "0225b3aaf58992a8cc909522c2ec859ef218fd29fda0a6723cfb4e0529f80cc8f3"
    log = running.log.read_text()
    assert "level=warning" in log
    assert "DEBUG KEY: publicly known" in log
    assert "destination=mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY" in log


def test_socket_of_a_killed_signer_is_replaced(tmp_path: Path) -> None:
    """After SIGKILL the socket stays behind; the next start replaces it and has the same keys."""
    with SignerProcess(tmp_path) as running:
        before = ask(running.socket, KeyRequest(1, CLIENT_KEY, EXPIRY))
        running.kill()
        assert running.socket.exists()

        running.start()

        assert ask(running.socket, KeyRequest(1, CLIENT_KEY, EXPIRY)) == before


def test_second_signer_is_refused(signer: SignerProcess, tmp_path: Path) -> None:
    """A second signer on the same ledger or socket ends with an error that says so; the first one continues."""
    other = SignerProcess(tmp_path, f'{REGTEST}[socket]\npath = "{signer.socket}"\n')
    holder = f"process {signer.pid}"
    for file, reason in (
        (signer.file, f"state_dir: {signer.directory}/signer.ledger is in use by {holder} ("),
        (other.file, f"socket.path: {signer.socket} is in use by {holder} ("),
    ):
        ended = subprocess.run([COMMAND, file], capture_output=True, text=True, check=False, timeout=30)

        assert ended.returncode == 2
        assert f"{file}: {reason}" in ended.stderr
        assert ask(signer.socket, Health(1)) == HEALTHY


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    """Neither a socket that another program answers on nor an ordinary file is replaced."""
    running = SignerProcess(tmp_path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(running.socket))
        other.listen()
        ended = subprocess.run([COMMAND, running.file], capture_output=True, text=True, check=False, timeout=30)
        assert "another process answers" in ended.stderr
        assert running.socket.is_socket()
    running.socket.unlink()
    running.socket.write_text("something")

    ended = subprocess.run([COMMAND, running.file], capture_output=True, text=True, check=False, timeout=30)

    assert "exists and is not a socket" in ended.stderr
    assert running.socket.read_text() == "something"


LIVE_ADDRESS = "1BitcoinEaterAddressDontSendf59kuE"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('network = "live"\n[key]\nmode = "debug"\n', 'key.mode: the "debug" key'),
        (
            DEBUG.replace('"test"', '"live"').replace("mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY", LIVE_ADDRESS),
            "debug: debug exists",
        ),
        ('network = "live"\n[key]\nmode = "hardened"\n', "there is no"),
        (f'{REGTEST}[socket]\ngroup = "no-such-group"\n', "socket.group: there is no group"),
        (f'{REGTEST}seed_file = "/dev/null"\n', "key.seed_file: /dev/null is not a regular file"),
        (f'{REGTEST}[socket]\npath = "/dev/null/x"\n', "socket.path: /dev/null"),
        ("network = \n", "not TOML"),
    ],
)
def test_wrong_settings_end_the_start(tmp_path: Path, config: str, message: str) -> None:
    """Wrong settings end the start with status 2 and one line of file, key and reason, without a traceback."""
    running = SignerProcess(tmp_path, config)
    running.passphrase.write_text("correct horse battery staple")
    running.passphrase.chmod(0o600)
    command = [COMMAND, running.file, "--passphrase-file", running.passphrase]

    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"paychan-signer: {running.file}: ")
    assert message in last
    assert "Traceback" not in ended.stderr


# --- secrets --------------------------------------------------------------------------------------------------------


def test_no_output_holds_a_secret(tmp_path: Path) -> None:
    """Neither logs, ledger nor replies of a full run, refusals and garbage included, contain the seed or a derived key."""
    with SignerProcess(tmp_path) as running:
        master, passphrase = running.master, running.passphrase.read_bytes().strip()
        keys = KeyRing([hardened_keys(master)])
        request = make_request(keys)
        with_reserve = make_reserve_request(keys)
        show(running.socket, request, with_reserve)
        wrong = mutated(request, "claims.0.payment.flag", 1)
        sent: list[Request | bytes] = [Health(1), KeyRequest(2, CLIENT_KEY, EXPIRY), request, wrong, bytes(4)]
        sent += [make_child_request(request), ReserveRequest(9), mutated(with_reserve, "fee_sat", 9_000)]
        replies = [ask(running.socket, message) for message in sent]
        shown = Path(f"/proc/{running.pid}/cmdline").read_bytes() + Path(f"/proc/{running.pid}/environ").read_bytes()
        assert running.stop() == 0
        assert running.process is not None

    kinds = [type(replies[number]) for number in (2, 5, 6, 7)]
    assert kinds == [SettlementReply, ChildReply, ReserveReply, SettlementReply]
    kept = b"".join(file.read_bytes() for file in (running.directory / "signer.ledger").iterdir())
    kept += (running.directory / "signer.audit").read_bytes()
    output = running.log.read_bytes() + kept + shown + b"".join(encode_frame(reply) for reply in replies if reply)
    words = [word | HARDENED for word in channel_words(CLIENT_KEY, EXPIRY)]
    nodes = [Node.from_seed(master)]
    nodes += [nodes[0].descend(RESERVE_PATH[:depth]) for depth in (1, 2)]
    for branch in (b"pchk", b"pchd"):
        for depth in range(5):
            path = [int.from_bytes(branch, "big") | HARDENED, *words][: depth + 1]
            nodes.append(nodes[0].descend(path))
    secrets = [master, passphrase, *(node.key.secret for node in nodes), *(node.chain_code for node in nodes)]
    for secret in secrets:
        for form in (secret, secret.hex().encode(), secret[::-1].hex().encode(), str(int.from_bytes(secret)).encode()):
            assert form not in output


def test_signer_keeps_out_of_core_dumps() -> None:
    """The process is not dumpable, so neither a core file nor a debugger of the same user shows its keys."""
    code = (
        "import ctypes, resource; from signer.sandbox.isolation import keep_private; keep_private(); "
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)

    assert ended.stdout.strip() == "0 (0, 0)"


def test_signer_stands_on_the_protocol_core_alone() -> None:
    """Importing the service loads no server code, no OpenSSL keys, and no unneeded part of the core."""
    code = "import sys, signer.service; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    loaded = set(ended.stdout.split())

    forbidden = {"pykka", "tornado", "psycopg", "httpx", "bitcoin.core.key", "actors"}
    forbidden |= {f"paychan.protocol.{name}" for name in ("channel", "machine", "record", "rest", "refund")}
    assert not loaded & forbidden
    assert {name for name in loaded if name.startswith("paychan.")} == {
        *("paychan.protocol", "paychan.shared"),
        *(name for name in loaded if name.startswith(("paychan.protocol.", "paychan.shared."))),
    }
