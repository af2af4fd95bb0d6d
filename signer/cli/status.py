"""`paychan-signer status` and `heartbeat`: commands for the operator of a running signer."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec
import typer
from msgspec import Struct

from paychan.protocol.settings import SettingsError
from paychan.protocol.wire.signer_messages import (
    Health,
    HealthReply,
    Refusal,
    Reply,
    Request,
    StatusReply,
    StatusRequest,
    WireError,
    decode_reply,
    encode_frame,
    frame_size,
)
from paychan.shared.layout import Cell, Value
from paychan.shared.leveldb_files import sync_directory
from paychan.shared.wording import clock, moment, sat, span
from signer.cli.options import ConfigFile
from signer.cli.terminal import JsonOption, completed, fail, say, show_facts, show_json
from signer.config import Policy, SignerConfig, load_signer_config

_ANSWER_SECONDS = 5.0

_Kind = TypeVar("_Kind", HealthReply, StatusReply)


class Unanswered(Exception):
    """The signer gave no answer; the text says why and what to do."""


class _Answers(Struct, frozen=True):
    health: HealthReply
    status: StatusReply


def status(
    file: ConfigFile,
    as_json: JsonOption = False,
) -> None:
    """Show the state of the running signer: keys, decisions, value signed recently against its limits, and protections.

    The exit status is 0 if it answers without a problem, else 1. The limits are those of the file; a running signer
    has read its own at its start.
    """
    config = _config(file)
    try:
        answers = ask(config.socket_path)
    except Unanswered as error:
        fail(str(error))
    if as_json:
        said = (msgspec.structs.asdict(answers.health), msgspec.structs.asdict(answers.status))
        values = {name: value for reply in said for name, value in reply.items() if name != "id"}
        show_json({**values, "identity_key": answers.health.identity_key.hex()})
    else:
        _show(answers, config, time.time())
    if answers.health.problem:
        raise typer.Exit(1)


def heartbeat(file: ConfigFile) -> None:
    """Tell the signer that the operator watches it; until the heartbeat is too old, it settles more than small sums.

    Set the age with `policy.heartbeat_hours`, and the small sum with `policy.value_without_heartbeat_sat`.
    """
    config = _config(file)
    path, policy = config.heartbeat_path, config.policy
    try:
        beat(path)
    except OSError as error:
        fail(f"{path} can't be written: {error.strerror}; run this as the signer's user")
    if not policy.heartbeat_hours:
        say("Noted; policy.heartbeat_hours is 0, so nothing depends on it.")
        return
    until = time.time() + 3600 * policy.heartbeat_hours
    say(
        f"Noted. Until {clock(until)} ({policy.heartbeat_hours} h) the signer settles what its other policies allow; "
        f"after that, up to {sat(policy.value_without_heartbeat_sat)}."
    )


def beat(path: Path) -> None:
    """Set the file's modification time to now, durably; create the file if there is none. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        os.utime(descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def ask(path: Path) -> _Answers:
    """Ask the signer that listens at this path for its health and status.

    Raises:
        Unanswered: none runs, it refuses the connection, or it speaks another version.
    """
    uid = os.geteuid()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_ANSWER_SECONDS)
            connection.connect(str(path))
            health = _answer(connection, Health(1), HealthReply)
            return _Answers(health, _answer(connection, StatusRequest(2), StatusReply))
    except FileNotFoundError:
        reason = f"no signer is running: there is no {path}. Start it: `paychan-signer FILE`"
    except ConnectionRefusedError:
        reason = f"no signer is running: {path} is left from a killed one. Start it: `paychan-signer FILE`"
    except PermissionError:
        reason = f"uid {uid} may not open {path}: run this as the signer's user, or join socket.group"
    except TimeoutError:
        reason = f"the signer at {path} gave no answer within {_ANSWER_SECONDS:.0f} s: see its log"
    except OSError as error:
        reason = f"the signer at {path} gave no answer ({error.strerror}): see its log"
    except WireError as error:
        reason = f"the process at {path} is no signer of this version ({error}): update this command or the signer"
    raise Unanswered(reason)


def _answer(connection: socket.socket, request: Request, kind: type[_Kind]) -> _Kind:
    reply = _exchange(connection, request)
    if isinstance(reply, kind):
        return reply
    if isinstance(reply, Refusal):
        hint = ": add it there, or run this as an allowed user" if reply.tag == "policy-peer" else ""
        msg = f"the signer refuses the connection ({reply.tag}): {reply.reason}{hint}"
        raise Unanswered(msg)
    msg = f"got {type(reply).__name__}, want {kind.__name__}"
    raise WireError(msg)


def _exchange(connection: socket.socket, request: Request) -> Reply:
    connection.sendall(encode_frame(request))
    with connection.makefile("rb") as file:
        prefix = file.read(4)
        body = file.read(frame_size(prefix)) if len(prefix) == 4 else b""
    if not body:
        msg = "it closed the connection"
        raise WireError(msg)
    return decode_reply(body)


def _config(file: Path) -> SignerConfig:
    try:
        return load_signer_config(file)
    except SettingsError as error:
        fail(str(error), status=2)


# --- output ----------------------------------------------------------------------------------------------------------


def _show(answers: _Answers, config: SignerConfig, now: float) -> None:
    health, said = answers.health, answers.status
    keys = Value(f"{health.key_mode}: publicly known", "red") if health.debug else health.key_mode
    show_facts(
        ("network", _network(health, config)),
        ("problem", Value(health.problem, "red") if health.problem else "none"),
        ("keys", keys),
        ("identity", Value(health.identity_key.hex(), whole=True)),
        ("running", f"since {clock(said.started_at)}, {span(now - said.started_at)}"),
        ("written", _written(said, now)),
        ("decisions", f"{said.decisions:,}"),
        ("head", said.head),
        ("last hour", _against(said.signed_last_hour_sat, config.policy.value_per_hour_sat)),
        ("last day", _against(said.signed_last_day_sat, config.policy.value_per_day_sat)),
        ("heartbeat", _heartbeat(said.heartbeat_at, config.policy, now)),
        ("trial", _trial(said.trial)),
        *(
            ("" if number else "protections", Value(text, "yellow" if text.startswith("no ") else ""))
            for number, text in enumerate(said.protections)
        ),
    )


def _network(health: HealthReply, config: SignerConfig) -> Cell:
    if (health.network, health.debug) == (config.network, config.debug):
        return config.network_name
    return Value(f"{health.network}, but the file says {config.network}", "red")


def _written(said: StatusReply, now: float) -> str:
    free = f"{said.free_bytes:,} bytes are free"
    if not said.written_at:
        return f"not yet; {free}"
    return f"{moment(said.written_at, now)}; {free}"


def _against(value_sat: int, limit_sat: int) -> Cell:
    if not limit_sat:
        return f"{sat(value_sat)} signed, no limit"
    colour = "red" if value_sat >= limit_sat else "yellow" if value_sat * 10 >= limit_sat * 8 else "green"
    return Value(f"{sat(value_sat)} signed of {sat(limit_sat)} ({value_sat * 100 // limit_sat} %)", colour)


def _heartbeat(heartbeat_at: int, policy: Policy, now: float) -> Cell:
    if not policy.heartbeat_hours:
        return "not required"
    limit = sat(policy.value_without_heartbeat_sat)
    age = f"{span(max(0.0, now - heartbeat_at))} old" if heartbeat_at else "none yet"
    until = heartbeat_at + 3600 * policy.heartbeat_hours
    if now > until:
        return Value(completed(f"{age}: up to {limit} are settled until `paychan-signer heartbeat FILE`"), "red")
    return Value(f"{age}: more than {limit} are settled until {clock(until)}", "green")


def _trial(tags: Iterable[str]) -> Cell:
    named = ", ".join(tags)
    return Value(f"only logged, not refused: {named}", "red") if named else "none"
