"""A real `paychan-signer` whose keys are in a real token."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    CertificateReply,
    CertificateRequest,
    FundingReply,
    KeyReply,
    KeyRequest,
    Refusal,
    Reply,
    Request,
    ReserveReply,
    ReserveRequest,
    SettlementReply,
    SettlementRequest,
    encode_frame,
)
from paychan.signer_client.reply_checks import check_certificate
from tests.lib.kernel import interpreter_accepts
from tests.lib.pseudoterminal import PseudoTerminal
from tests.lib.signer_process import COMMAND, SignerProcess
from tests.lib.softhsm import SoftHsm, softhsm
from tests.signer.crowd import until
from tests.signer.messages import CLIENT_KEY, EXPIRY, make_claim, make_fundings
from tests.signer.talking import connect
from tests.signer.test_service import ask

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="looking into another process's memory needs root")


@pytest.fixture
def token(tmp_path: Path) -> Iterator[SoftHsm]:
    with softhsm(tmp_path / "hsm") as made:
        yield made


def answer(signer: SignerProcess, request: Request) -> Reply | None:
    return ask(signer.socket, request)


def channel_key(signer: SignerProcess, number: int = 0) -> KeyReply:
    reply = answer(signer, KeyRequest(1, CLIENT_KEY, UnixTime(EXPIRY + number)))
    assert isinstance(reply, KeyReply), reply
    return reply


def settlement(key: KeyReply, channels: int = 3, after: int = 0) -> SettlementRequest:
    """A request to settle this number of channels of one key, numbered from `after`."""
    numbers = range(after, after + channels)
    claims = [make_claim(key.server_key, number=number, change_sat=0) for number in numbers]
    return SettlementRequest(7, tuple(claims), key.destination_script, Sat(5_000))


def shown(signer: SignerProcess, request: SettlementRequest) -> SettlementRequest:
    """The request, after the signer was shown the outputs that it spends."""
    for funding in make_fundings(request):
        assert isinstance(answer(signer, funding), FundingReply)
    return request


def settle(signer: SignerProcess, request: SettlementRequest) -> bytes:
    """The signed transaction; Bitcoin's interpreter accepts its inputs."""
    reply = answer(signer, shown(signer, request))
    assert isinstance(reply, SettlementReply), reply
    transaction = reply.settlement.transaction
    for index, claim in enumerate(request.claims):
        assert interpreter_accepts(claim.terms.funding_script, transaction, index, claim.funding_sat)
    return transaction


def test_signer_settles_with_keys_of_the_token(token: SoftHsm, tmp_path: Path) -> None:
    """The process returns a key of the token, signs settlements that nodes accept, certifies, and has no seed."""
    with SignerProcess(tmp_path, token.signer_config) as signer:
        transaction = settle(signer, settlement(channel_key(signer)))

        assert transaction
        assert isinstance(answer(signer, ReserveRequest(2)), ReserveReply)
        begin = UnixTime(int(time.time()))
        request = CertificateRequest(3, CLIENT_KEY, begin, UnixTime(begin + 60))
        certified = answer(signer, request)
        assert isinstance(certified, CertificateReply), certified
        assert check_certificate(certified, request).identity == certified.identity_key
        assert not signer.seed.exists()
        assert token.pin not in signer.log.read_text()


def test_large_settlements_too(token: SoftHsm, tmp_path: Path) -> None:
    """A settlement with more inputs than the token signs at a time is signed as well, with all its inputs."""
    with SignerProcess(tmp_path, token.signer_config) as signer:
        settle(signer, settlement(channel_key(signer), channels=30))


def test_keys_of_the_token_survive_a_kill(token: SoftHsm, tmp_path: Path) -> None:
    """After `kill -9` and a new start the same channels have the same keys, and can be settled."""
    signer = SignerProcess(tmp_path, token.signer_config)
    signer.start()
    before = channel_key(signer)
    signer.kill()

    with signer:
        assert channel_key(signer) == before
        settle(signer, settlement(before))


def test_many_clients_get_keys_at_once(token: SoftHsm, tmp_path: Path) -> None:
    """Sixteen channels that are opened at the same time over separate connections get sixteen keys."""
    with SignerProcess(tmp_path, token.signer_config) as signer, ThreadPoolExecutor(16) as threads:
        keys = {reply.server_key for reply in threads.map(lambda number: channel_key(signer, number), range(16))}

    assert len(keys) == 16


HANGING = """
import ctypes, sys
from signer import service
from signer.token import cryptoki

def hang(session, *_):
    print("hangs", file=sys.stderr, flush=True)
    ctypes.CDLL(None).sleep(1000)

cryptoki.Session.sign = hang
cryptoki.Session.close = hang
service.main()
"""


def test_signer_ends_although_the_token_hangs(token: SoftHsm, tmp_path: Path) -> None:
    """SIGTERM ends the process within seconds, although signatures and later the closing of sessions hang in the token."""
    signer = SignerProcess(tmp_path, token.signer_config)
    signer.start(sys.executable, "-c", HANGING)
    request = shown(signer, settlement(channel_key(signer)))
    with connect(signer.socket) as connection:
        connection.sendall(encode_frame(request))
        until(lambda: signer.log.read_text().count("hangs") == len(request.claims))
        begun = time.monotonic()

        assert signer.stop() == 0

    assert time.monotonic() - begun < 10
    assert signer.log.read_text().count("hangs") == len(request.claims) + 1
    assert "signer stopped" in signer.log.read_text()
    assert not signer.socket.exists()


def asked_for_pin(token: SoftHsm, tmp_path: Path) -> SignerProcess:
    """A signer without any source of the PIN."""
    lines = [line for line in token.signer_config.splitlines() if not line.startswith("pin_file")]
    return SignerProcess(tmp_path, "\n".join(lines) + "\n")


HANGING_ONCE = """
import ctypes
from signer import service
from signer.token import cryptoki

sign, calls = cryptoki.Session.sign, []

def hang_once(*arguments):
    calls.append(1)
    return sign(*arguments) if len(calls) > 1 else ctypes.CDLL(None).sleep(1000)

cryptoki.Session.sign = hang_once
service.main()
"""


def test_a_hanging_signature_delays_no_other(token: SoftHsm, tmp_path: Path) -> None:
    """While one signature hangs in the token, it makes others; the late request is refused, and succeeds when sent again."""
    signer = SignerProcess(tmp_path, token.signer_config + "sessions = 2\n[socket]\nrequest_seconds = 2.0\n")
    signer.start(sys.executable, "-c", HANGING_ONCE)
    key = channel_key(signer)
    first, second = (shown(signer, settlement(key, channels=1, after=number)) for number in range(2))
    with ThreadPoolExecutor() as threads:
        hanging = threads.submit(answer, signer, first)
        time.sleep(0.5)
        for _ in range(5):
            assert isinstance(answer(signer, second), SettlementReply)
        assert not hanging.done()
        refusal = hanging.result()

    assert isinstance(refusal, Refusal)
    assert refusal.tag == "policy-deadline"
    assert isinstance(answer(signer, first), SettlementReply)
    assert signer.stop() == 0


def test_pin_is_typed_on_a_terminal(token: SoftHsm, tmp_path: Path) -> None:
    """Without a source of the PIN there is a prompt; Ctrl-C later ends the signer and its token's process."""
    signer = asked_for_pin(token, tmp_path)
    with PseudoTerminal([COMMAND, signer.file]) as terminal:
        terminal.read_until("Pin of token 'paychan': ")
        terminal.enter(token.pin)
        terminal.read_until("signer started")
        assert isinstance(answer(signer, ReserveRequest(1)), ReserveReply)
        assert terminal.end_by_control_c() == 0
    assert token.pin not in terminal.output
    assert "signer stopped" in terminal.output
    assert "Traceback" not in terminal.output


def test_control_c_at_the_prompt_for_the_pin(token: SoftHsm, tmp_path: Path) -> None:
    """Ctrl-C at the prompt for the PIN ends both processes without a traceback."""
    with PseudoTerminal([COMMAND, asked_for_pin(token, tmp_path).file]) as terminal:
        terminal.read_until("Pin of token 'paychan': ")
        assert terminal.end_by_control_c() in (130, 1)
    assert "Traceback" not in terminal.output


def test_signer_refuses_to_start_with_a_wrong_pin(token: SoftHsm, tmp_path: Path) -> None:
    """With a wrong PIN the process ends with status 2 and one line that names the setting, not the PIN."""
    token.pin_file.write_text("not the PIN\n")
    signer = SignerProcess(tmp_path, token.signer_config)

    command = [COMMAND, signer.file]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=30)

    assert done.returncode == 2
    assert "pkcs11.pin_file: the token refused the PIN (C_Login: CKR_PIN_INCORRECT)" in done.stderr
    assert "not the PIN" not in done.stderr


def token_process(signer: SignerProcess) -> int:
    """Process id of the signer's only child."""
    (child,) = Path(f"/proc/{signer.pid}/task/{signer.pid}/children").read_text().split()
    return int(child)


def has_in_memory(pid: int, wanted: bytes) -> bool:
    """Whether the memory of a process contains these bytes; needs root."""
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            places, rights = line.split()[:2]
            if "r" not in rights or "[v" in line:  # the kernel's own pages can't be read
                continue
            start, end = (int(place, 16) for place in places.split("-"))
            memory.seek(start)
            if wanted in memory.read(end - start):
                return True
    return False


@needs_root
def test_signer_itself_never_sees_the_pin_and_has_no_network(tmp_path: Path) -> None:
    """Only the token's process has the PIN in its memory, and only it may use a network; the log states both."""
    pin = "a PIN of this test only"
    with softhsm(tmp_path / "hsm", pin=pin) as token, SignerProcess(tmp_path, token.signer_config) as signer:
        settle(signer, settlement(channel_key(signer)))
        child = token_process(signer)

        assert has_in_memory(child, pin.encode())
        assert not has_in_memory(signer.pid, pin.encode())
        mine = Path("/proc/self/ns/net").readlink()
        assert Path(f"/proc/{child}/ns/net").readlink() == mine
        assert Path(f"/proc/{signer.pid}/ns/net").readlink() != mine
        log = signer.log.read_text()
        assert "network out of reach (namespace, seccomp)" in log
        assert "missing=\"network isolation: the token's library may need it (token's process)\"" in log


def test_signer_ends_when_its_tokens_process_does(token: SoftHsm, tmp_path: Path) -> None:
    """A crash of the library ends the token's process; the signer logs that and ends with status 1, for a restart."""
    signer = SignerProcess(tmp_path, token.signer_config)
    signer.start()
    before = channel_key(signer)

    os.kill(token_process(signer), signal.SIGSEGV)

    assert signer.process is not None
    assert signer.process.wait(10) == 1
    assert "token's process has ended" in signer.log.read_text()
    assert "Traceback" not in signer.log.read_text()
    with signer:
        assert channel_key(signer) == before


CRASHING = """
import ctypes
from signer import service
from signer.token import keys

keys.Library = lambda _path: ctypes.string_at(0)
service.main()
"""


def test_a_library_that_crashes_at_once_is_named(token: SoftHsm, tmp_path: Path) -> None:
    """A library that crashes at the start ends the start with one line that names the setting."""
    signer = SignerProcess(tmp_path, token.signer_config)

    with pytest.raises(RuntimeError, match=r"pkcs11\.module: the library crashed while it was opened") as caught:
        signer.start(sys.executable, "-c", CRASHING)

    assert "Traceback" not in str(caught.value)


def test_signatures_of_a_crashed_token_can_be_requested_again(token: SoftHsm, tmp_path: Path) -> None:
    """Signatures that a crashed token had not finished are made after the next start."""
    signer = SignerProcess(tmp_path, token.signer_config + "sessions = 1\n")
    signer.start(sys.executable, "-c", HANGING)
    request = shown(signer, settlement(channel_key(signer)))
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(answer, signer, request)
        until(lambda: "hangs" in signer.log.read_text())
        os.kill(token_process(signer), signal.SIGKILL)
        assert not isinstance(waiting.result(), SettlementReply)

    assert signer.process is not None
    assert signer.process.wait(10) == 1
    assert "Traceback" not in signer.log.read_text()
    with signer:
        settle(signer, request)


def test_no_process_of_the_token_outlives_the_signer(token: SoftHsm, tmp_path: Path) -> None:
    """The token's process ends with the signer, also after `kill -9`, so that the next start can use the token."""
    for end in (SignerProcess.stop, SignerProcess.kill):
        signer = SignerProcess(tmp_path, token.signer_config)
        signer.start()
        child = Path(f"/proc/{token_process(signer)}")
        end(signer)
        until(lambda child=child: not child.exists())  # type: ignore[misc]


FEW_AT_A_TIME = (
    "from signer import service; from signer.token import process; process.KEYS_IN_MESSAGE = 2; service.main()"
)


def test_signer_reads_many_keys(token: SoftHsm, tmp_path: Path) -> None:
    """Keys that take several messages are all known after a start."""
    with SignerProcess(tmp_path, token.signer_config) as signer:
        before = [channel_key(signer, number) for number in range(5)]
    signer = SignerProcess(tmp_path, token.signer_config)
    signer.start(sys.executable, "-c", FEW_AT_A_TIME)

    assert [channel_key(signer, number) for number in range(5)] == before
    signer.stop()


FAILING = """
from signer import service
from signer.token import cryptoki
from signer.token.constants import Code, CryptokiError

def fail(*_):
    raise CryptokiError(Code.DEVICE_ERROR, "C_Sign")

cryptoki.Session.sign = fail
service.main()
"""


SLOW_LOGIN = """
import sys, time
from signer.token import cryptoki

login = cryptoki.Session.login

def slow_login(session, pin):
    print("login begins", file=sys.stderr, flush=True)
    time.sleep(0.5)
    try:
        login(session, pin)
    finally:
        print("login ends", file=sys.stderr, flush=True)

cryptoki.Session.login = slow_login
"""


def test_the_signer_stops_after_a_login_under_way(token: SoftHsm, tmp_path: Path) -> None:
    """A process that ended in a login would leave SoftHSM's token file empty, or log in with a wiped PIN."""
    signer = SignerProcess(tmp_path, token.signer_config)
    signer.start(sys.executable, "-c", SLOW_LOGIN + FAILING)
    before = signer.log.read_text().count("login begins")
    with connect(signer.socket) as wire:
        wire.sendall(encode_frame(shown(signer, settlement(channel_key(signer)))))
        until(lambda: signer.log.read_text().count("login begins") > before)
        assert signer.stop() == 0
    written = signer.log.read_text()
    assert written.count("login ends") == written.count("login begins") > before

    with signer:
        channel_key(signer)


def test_a_failing_token_is_reported_and_used_again(token: SoftHsm, tmp_path: Path) -> None:
    """A request for three signatures of a failing token gets one refusal with the token's error, without a traceback."""
    signer = SignerProcess(tmp_path, token.signer_config)
    signer.start(sys.executable, "-c", FAILING)
    request = shown(signer, settlement(channel_key(signer)))
    for _ in range(2):
        refusal = answer(signer, request)
        assert isinstance(refusal, Refusal)
        assert refusal.tag == "protocol-keys"
        assert refusal.reason == "the key store: token 'paychan' failed: C_Sign: CKR_DEVICE_ERROR"
    assert signer.stop() == 0
    assert "Traceback" not in signer.log.read_text()

    with signer:
        settle(signer, request)
