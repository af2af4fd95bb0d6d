"""The operator's commands with a real signer, by the console script: they show its decisions."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paychan.protocol.wire.signer_messages import FundingReply, FundingRequest, KeyReply, KeyRequest, Refusal
from tests.lib.signer_process import COMMAND, REGTEST, SignerProcess
from tests.lib.signerexample import FUNDING, OUTPOINT, SETTLEMENT_REQUEST, TERMS
from tests.signer.crowd import until
from tests.signer.test_service import ask

POLICY = """
[policy]
trial = ["policy-rate"]
heartbeat_hours = 24
value_without_heartbeat_sat = 50_000
"""


@pytest.fixture
def signer(tmp_path: Path) -> Iterator[SignerProcess]:
    """A signer that has returned a key, seen a funding transaction and refused a settlement for another key."""
    with SignerProcess(tmp_path, REGTEST + POLICY) as running:
        assert isinstance(ask(running.socket, KeyRequest(1, TERMS.client_key, TERMS.expiry.lock_time)), KeyReply)
        assert isinstance(ask(running.socket, FundingRequest(2, FUNDING.serialize(), (0,))), FundingReply)
        assert isinstance(ask(running.socket, SETTLEMENT_REQUEST), Refusal)
        until(
            lambda: (tmp_path / "signer.audit").read_bytes().count(b"\n") == 3
        )  # a refusal does not wait for its line
        yield running


def say(*words: object, status: int = 0) -> str:
    """Output of a command on a wide terminal; it must end with this status."""
    environment = {**os.environ, "COLUMNS": "200"}
    command = [COMMAND, *(str(word) for word in words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout + ended.stderr


def test_decisions_are_in_the_log(signer: SignerProcess) -> None:
    """The log of a running signer is valid and has each request, its user and its result."""
    shown = [json.loads(line) for line in say("audit", "show", signer.file, "--json").splitlines()]

    assert [entry["asked"] for entry in shown] == ["KeyRequest", "FundingRequest", "SettlementRequest"]
    assert [entry["verdict"] for entry in shown] == ["given", "given", "refused"]
    assert {entry["peer_uid"] for entry in shown} == {os.geteuid()}
    assert shown[2]["tag"] == "policy-template"
    assert shown[2]["about"]["claims"][0]["outpoint"] == str(OUTPOINT)
    assert abs(shown[2]["at_ms"] / 1000 - time.time()) < 60
    assert say("audit", "show", signer.file, "--outpoint", OUTPOINT, "--refused").count("policy-template") == 1
    assert "3, number 1 to 3" in say("audit", "verify", signer.file)


def test_status_is_that_of_the_log(signer: SignerProcess) -> None:
    """Number and head of the status are those of the log's last line, and `verify` finds them."""
    said = json.loads(say("status", signer.file, "--json"))

    assert (said["network"], said["decisions"], said["trial"]) == ("regtest", 3, ["policy-rate"])
    assert "number 3 has that hash" in say("audit", "verify", signer.file, "--head", said["head"])
    table = say("status", signer.file)
    assert "only logged, not refused: policy-rate" in table
    assert "none yet: up to 50,000 sat are settled" in table


def test_heartbeat_reaches_the_running_signer(signer: SignerProcess) -> None:
    """A heartbeat counts at once, without a restart."""
    say("heartbeat", signer.file)
    assert "s old: more than 50,000 sat are settled until" in say("status", signer.file)


def test_log_continues_after_a_restart_and_an_archive(signer: SignerProcess) -> None:
    """The log of a running signer can't be archived; that of a stopped one can, and the signer continues it."""
    assert "stop it first" in say("audit", "archive", signer.file, status=1)
    signer.stop()
    assert "no signer is running" in say("status", signer.file, status=1)
    say("audit", "archive", signer.file)
    signer.start()
    assert isinstance(ask(signer.socket, SETTLEMENT_REQUEST), Refusal)

    assert "5, number 1 to 5" in say("audit", "verify", signer.file)
    assert json.loads(say("status", signer.file, "--json"))["decisions"] == 5


@pytest.mark.parametrize("loss", ["cut", "deleted"])
def test_signer_does_not_start_without_the_end_of_its_log(signer: SignerProcess, loss: str) -> None:
    """A logged line that the ledger knows must exist; a new log after a loss states the loss."""
    path = signer.directory / "signer.audit"
    head = json.loads(say("status", signer.file, "--json"))["head"]
    signer.stop()
    if loss == "cut":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    else:
        path.unlink()

    assert "does not hold line 3" in say(signer.file, status=2)

    path.unlink(missing_ok=True)  # the attempt may have created one
    say("audit", "archive", signer.file, "--after", f"3:{head}")
    signer.start()
    assert isinstance(ask(signer.socket, SETTLEMENT_REQUEST), Refusal)
    assert "started anew after line 3" in say("audit", "show", signer.file)
    assert "2, number 4 to 5" in say("audit", "verify", path)


def test_edited_log_is_reported(signer: SignerProcess) -> None:
    """A refusal that was edited into a signature is found, with its line; status 1."""
    path = signer.directory / "signer.audit"
    path.write_bytes(path.read_bytes().replace(b'"refused"', b'"signed"'))
    assert "line 3: edited" in say("audit", "verify", signer.file, status=1)
