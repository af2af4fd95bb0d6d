"""`paychan-signer status` and `heartbeat`: their output for a healthy and for a broken signer."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    HealthReply,
    Refusal,
    Reply,
    StatusReply,
    decode_request,
    encode_frame,
    frame_size,
)
from paychan.shared.called import as_called
from paychan.shared.wording import clock
from signer.cli.status import heartbeat, status

app = typer.Typer()
app.command()(status)
app.command()(heartbeat)

IDENTITY = bytes.fromhex("02" + "ab" * 32)
HEALTHY = HealthReply(1, "regtest", "hardened", debug=False, identity_key=IDENTITY)
QUIET = StatusReply(2, UnixTime(0), 1_234, "ab" * 32, Sat(0), Sat(0), UnixTime(0), (), ("memory locked",))
LIMITED = """
value_per_hour_sat = 1_000_000
value_per_day_sat = 5_000_000
heartbeat_hours = 24
value_without_heartbeat_sat = 50_000
"""


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal wide enough for whole lines."""
    monkeypatch.setenv("COLUMNS", "160")


def config(directory: Path, policy: str = "") -> Path:
    file = directory / "signer.toml"
    file.write_text(f'network = "regtest"\nstate_dir = "{directory}"\n[key]\nmode = "hardened"\n[policy]\n{policy}')
    return file


def say(*words: object) -> Result:
    """Run a command that must not raise."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@contextmanager
def answering(directory: Path, *replies: Reply | bytes) -> Iterator[None]:
    """A signer with these replies; it closes the connection after the last one."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as file:
            for reply in replies:
                decode_request(file.read(frame_size(file.read(4))))
                connection.sendall(reply if isinstance(reply, bytes) else encode_frame(reply))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "signer.sock"))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(20)
    (directory / "signer.sock").unlink()


def shown(directory: Path, policy: str = "", health: HealthReply = HEALTHY, **changes: Any) -> dict[str, str]:
    """Rows of `status` by their names."""
    said = {**msgspec.structs.asdict(QUIET), "started_at": int(time.time()) - 7_265}
    with answering(directory, health, StatusReply(**{**said, **changes})):
        result = say("status", config(directory, policy))
    assert result.exit_code == 0, result.output
    rows = [line.partition("  ") for line in result.stdout.splitlines()]
    return {name.strip(): value.strip() for name, _, value in rows}


# --- status ----------------------------------------------------------------------------------------------------------


def test_status_of_an_idle_signer(tmp_path: Path) -> None:
    """The status shows network, keys, running time, the head of the log, and sums with their limits."""
    rows = shown(tmp_path)

    assert rows["network"] == "regtest"
    assert rows["keys"] == "hardened"
    assert rows["identity"] == IDENTITY.hex()
    assert rows["running"].startswith("since 2")
    assert rows["running"].endswith(", 2 h 1 min")
    assert (rows["decisions"], rows["head"]) == ("1,234", "ab" * 32)
    assert rows["last hour"] == "0 sat signed of 10,000,000,000 sat (0 %)"
    assert rows["last day"] == "0 sat signed, no limit"
    assert (rows["heartbeat"], rows["trial"], rows["protections"]) == ("not required", "none", "memory locked")


def test_signed_sums_are_shown_with_the_limits(tmp_path: Path) -> None:
    """Sums of the last hour and day are shown with the limits of the file."""
    rows = shown(tmp_path, LIMITED, signed_last_hour_sat=Sat(850_000), signed_last_day_sat=Sat(5_000_000))

    assert rows["last hour"] == "850,000 sat signed of 1,000,000 sat (85 %)"
    assert rows["last day"] == "5,000,000 sat signed of 5,000,000 sat (100 %)"


def test_heartbeat_is_shown_with_its_effect(tmp_path: Path) -> None:
    """For a missing, stale or fresh heartbeat, the status shows the limit and its time."""
    limit = as_called(
        "up to 50,000 sat are settled until `paychan-signer heartbeat FILE`", str(tmp_path / "signer.toml")
    )
    now = int(time.time())
    stale, fresh = UnixTime(now - 30 * 3_600 - 5), UnixTime(now - 23 * 3_600 - 5)

    assert shown(tmp_path, LIMITED, heartbeat_at=UnixTime(0))["heartbeat"] == f"none yet: {limit}"
    assert shown(tmp_path, LIMITED, heartbeat_at=stale)["heartbeat"] == f"1 d 6 h old: {limit}"
    assert shown(tmp_path, LIMITED, heartbeat_at=fresh)["heartbeat"] == (
        f"23 h old: more than 50,000 sat are settled until {clock(fresh + 24 * 3_600)}"
    )


def test_weaknesses_are_shown(tmp_path: Path) -> None:
    """The status shows policies on trial, missing protections, the debug key and a network other than the file's."""
    rows = shown(
        tmp_path,
        health=HealthReply(1, "test", "debug", debug=True),
        trial=("policy-fee", "policy-rate"),
        protections=("no seccomp: not built in", "not dumpable"),
    )

    assert rows["network"] == "test, but the file says regtest"
    assert rows["keys"] == "debug: publicly known"
    assert rows["trial"] == "only logged, not refused: policy-fee, policy-rate"
    assert rows["protections"] == "no seccomp: not built in"


def test_weaknesses_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, trial policies and a stale heartbeat are red."""
    console = Console(force_terminal=True, color_system="standard", highlight=False)
    monkeypatch.setattr("signer.cli.terminal.out", console)
    rows = shown(tmp_path, LIMITED, trial=("policy-fee",))
    text = "\n".join(rows.values())
    assert "\x1b[31monly logged, not refused: policy-fee" in text
    assert "\x1b[31mnone yet" in text


def test_programs_get_the_replies_as_json(tmp_path: Path) -> None:
    """With --json both replies are one object."""
    with answering(tmp_path, HEALTHY, QUIET):
        replies = json.loads(say("status", config(tmp_path), "--json").stdout)
    assert (replies["network"], replies["decisions"], replies["protections"]) == ("regtest", 1_234, ["memory locked"])
    assert replies["identity_key"] == IDENTITY.hex()
    assert "id" not in replies


@pytest.mark.parametrize("as_json", [False, True])
def test_fault_63_a_problem_is_shown_with_status_1(tmp_path: Path, as_json: bool) -> None:
    """A problem from health is shown, with the last write and the free space; the exit status is 1 for monitors."""
    ill = msgspec.structs.replace(HEALTHY, problem="a write hangs")
    said = msgspec.structs.replace(
        QUIET, problem=ill.problem, written_at=UnixTime(int(time.time()) - 60), free_bytes=1_234_567
    )
    with answering(tmp_path, ill, said):
        result = say("status", config(tmp_path), *["--json"] * as_json)

    assert result.exit_code == 1
    assert "a write hangs" in result.stdout
    assert as_json or "ago); 1,234,567 bytes are free" in result.stdout


def test_no_running_signer(tmp_path: Path) -> None:
    """Without a socket, or with that of a killed signer, the sentence says to start the signer; status 1."""
    missing = say("status", config(tmp_path))
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "signer.sock"))
    killed = say("status", config(tmp_path))

    assert (missing.exit_code, killed.exit_code) == (1, 1)
    assert f"no signer is running: there is no {tmp_path}/signer.sock. Start it:" in missing.stderr
    assert "is left from a killed one" in killed.stderr


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            Refusal(0, "policy-peer", "uid 65534 is not in socket.allowed_uids"),
            "refuses the connection (policy-peer): uid 65534 is not in socket.allowed_uids: add it there, or run this as an",
        ),
        (
            Refusal(0, "protocol-busy", "64 connections are open"),
            "refuses the connection (protocol-busy): 64 connections",
        ),
        (bytes.fromhex("00000004 02 92 01 05"), "is no signer of this version (message version 2, want"),
        (b"HTTP/1.1 400 Bad Request", "is no signer of this version (frame of 1213486160 bytes"),
        (QUIET, "is no signer of this version (got StatusReply, want HealthReply)"),
        (b"\0\0", "is no signer of this version (it closed the connection)"),
    ],
)
def test_wrong_replies_are_reported(tmp_path: Path, reply: Reply | bytes, sentence: str) -> None:
    """A refusal is shown with the remedy; a process that is no signer of this version is reported as such; status 1."""
    with answering(tmp_path, reply):
        result = say("status", config(tmp_path))
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert result.stdout == ""


def test_hanging_signer_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signer that accepts the connection and does not reply delays the operator only until a time limit."""
    monkeypatch.setattr("signer.cli.status._ANSWER_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "signer.sock"))
        listener.listen()
        result = say("status", config(tmp_path))
    assert result.exit_code == 1
    assert "gave no answer within" in result.stderr


def test_wrong_file_is_reported(tmp_path: Path) -> None:
    """A mistake in the configuration ends the command with its place; status 2."""
    result = say("status", config(tmp_path, "heartbeat_hours = 24\n"))
    assert result.exit_code == 2
    assert "policy.heartbeat_hours" in result.stderr


# --- heartbeat -------------------------------------------------------------------------------------------------------


def test_heartbeat_makes_the_file_new(tmp_path: Path) -> None:
    """Each heartbeat sets the modification time of the signer's heartbeat file, and prints how long it counts."""
    file, path = config(tmp_path, LIMITED), tmp_path / "signer.heartbeat"
    assert say("heartbeat", file).exit_code == 0
    os.utime(path, (1, 1))

    result = say("heartbeat", file)

    assert abs(path.stat().st_mtime - time.time()) < 10
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert result.stdout.startswith("Noted. Until 2")
    assert "after that, up to 50,000 sat." in result.stdout


def test_heartbeat_without_the_setting(tmp_path: Path) -> None:
    """Without the setting, the output says that nothing depends on the heartbeat."""
    assert "nothing depends on it" in say("heartbeat", config(tmp_path)).stdout


def test_heartbeat_does_not_follow_links(tmp_path: Path) -> None:
    """A link in place of the file is not followed."""
    (tmp_path / "signer.heartbeat").symlink_to(tmp_path / "elsewhere")
    result = say("heartbeat", config(tmp_path, LIMITED))
    assert result.exit_code == 1
    assert "can't be written" in result.stderr
    assert not (tmp_path / "elsewhere").exists()
