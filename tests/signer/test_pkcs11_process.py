"""A real `paychan-signer` whose keys are in a real token."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paychan.protocol.signerwire import (
    FundingReply,
    KeyReply,
    KeyRequest,
    Reply,
    Request,
    ReserveReply,
    ReserveRequest,
    SettlementReply,
    SettlementRequest,
    encode_frame,
)
from paychan.protocol.types import Sat, UnixTime
from tests.lib.kernel import interpreter_accepts
from tests.lib.signer_process import COMMAND, SignerProcess
from tests.lib.softhsm import SoftHsm, softhsm
from tests.signer.crowd import until
from tests.signer.messages import CLIENT_KEY, EXPIRY, make_claim, make_fundings
from tests.signer.talking import connect
from tests.signer.test_service import ask


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


def settlement(key: KeyReply) -> SettlementRequest:
    """A request to settle three channels of one key."""
    claims = [make_claim(key.server_key, number=number, change_sat=0) for number in range(3)]
    return SettlementRequest(7, tuple(claims), key.destination_script, Sat(5_000))


def settle(signer: SignerProcess, request: SettlementRequest) -> bytes:
    """The signed transaction, whose inputs Bitcoin's interpreter accepts."""
    for funding in make_fundings(request):
        assert isinstance(answer(signer, funding), FundingReply)
    reply = answer(signer, request)
    assert isinstance(reply, SettlementReply), reply
    transaction = reply.settlement.transaction
    for index, claim in enumerate(request.claims):
        assert interpreter_accepts(claim.terms.funding_script, transaction, index, claim.funding_sat)
    return transaction


def test_signer_settles_with_keys_of_the_token(token: SoftHsm, tmp_path: Path) -> None:
    """The process gives a key out of the token, signs settlements that nodes accept, and has no seed."""
    with SignerProcess(tmp_path, token.signer_config) as signer:
        transaction = settle(signer, settlement(channel_key(signer)))

        assert transaction
        assert isinstance(answer(signer, ReserveRequest(2)), ReserveReply)
        assert not signer.seed.exists()
        assert token.pin not in signer.log.read_text()


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
    """Sixteen channels that are opened at the same time over connections of their own get sixteen keys."""
    with SignerProcess(tmp_path, token.signer_config) as signer, ThreadPoolExecutor(16) as threads:
        keys = {reply.server_key for reply in threads.map(lambda number: channel_key(signer, number), range(16))}

    assert len(keys) == 16


HANGING = """
import ctypes, sys
from signer import cryptoki, service

def hang(session, *_):
    print("hangs", file=sys.stderr, flush=True)
    ctypes.CDLL(None).sleep(1000)

cryptoki.Session.sign = hang
cryptoki.Session.close = hang
service.main()
"""


def test_signer_ends_although_the_token_hangs(token: SoftHsm, tmp_path: Path) -> None:
    """SIGTERM ends the process within seconds, in order, while one call hangs in the token and another where sessions are closed."""
    signer = SignerProcess(tmp_path, token.signer_config)
    signer.start(sys.executable, "-c", HANGING)
    request = settlement(channel_key(signer))
    for funding in make_fundings(request):
        assert isinstance(answer(signer, funding), FundingReply)
    with connect(signer.socket) as connection:
        connection.sendall(encode_frame(request))
        until(lambda: "hangs" in signer.log.read_text())
        begun = time.monotonic()

        assert signer.stop() == 0

    assert time.monotonic() - begun < 10
    assert signer.log.read_text().count("hangs") == 2
    assert "signer stopped" in signer.log.read_text()
    assert not signer.socket.exists()


def test_signer_refuses_to_start_with_a_wrong_pin(token: SoftHsm, tmp_path: Path) -> None:
    """With a wrong PIN the process ends with status 2 and one line that names the setting, and not the PIN."""
    token.pin_file.write_text("not the PIN\n")
    signer = SignerProcess(tmp_path, token.signer_config)

    command = [COMMAND, signer.file]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=30)

    assert done.returncode == 2
    assert "pkcs11.pin_file: the token refused the PIN (C_Login: CKR_PIN_INCORRECT)" in done.stderr
    assert "not the PIN" not in done.stderr
