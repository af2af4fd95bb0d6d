"""The signer process, `paychan-signer FILE`: builds the parts, listens, and stops on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import atexit
import gc
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO, cast

import structlog
import typer

from paychan.protocol.settings import SettingsError
from paychan.protocol.settlement import Reserve
from paychan.protocol.types import Network, UnixTime
from paychan.shared.commandline import run as run_command_line
from paychan.shared.encoding import prepare_output
from paychan.shared.logsink import LogSink, open_missing_descriptors
from paychan.shared.plainhelp import plain_unless_wide
from paychan.shared.stuck import end_when_stuck
from signer import vital
from signer.cli.options import ConfigFile, PassphraseDescriptor, PassphraseFile
from signer.cli.program import new_app
from signer.cli.terminal import fail
from signer.config import SignerConfig, load_signer_config
from signer.judge.facts import Limits
from signer.judge.handler import Handler
from signer.judge.queries import Identity
from signer.keys.ring import DEBUG_KEY, KeyRing, KeysFailed, KeySource, StaticKey
from signer.ledger.base import Entry, LedgerFailed
from signer.ledger.disk import Disk, LedgerReserve
from signer.ledger.leveldb import LevelDbLedger
from signer.sandbox.directories import PlaceError, check_file, check_places
from signer.sandbox.isolation import IsolationError, isolate, keep_private
from signer.secret.sources import NoSecret
from signer.seed.file import SeedError
from signer.seed.open import note_token_keys, refuse_another_token, refuse_new_token_keys, seed_sources
from signer.server.connections import FAREWELLS, Connections
from signer.server.connections import Limits as PeerLimits
from signer.server.socket_file import SocketError, listening_socket, room_for
from signer.token.client import RemoteToken
from signer.token.derived_keys import generations
from signer.token.sessions import TokenError

PROBE_SECONDS = 5.0
"""Interval of test writes, so that a disk fault shows even while nothing else is written."""

log = structlog.get_logger()


app = new_app()


@app.command()
def run(file: ConfigFile, passphrase_fd: PassphraseDescriptor = None, passphrase_file: PassphraseFile = None) -> None:
    """Start the signer; the word `run` is optional. The signer serves its Unix socket until SIGTERM or SIGINT."""
    _or_exit(lambda: start(file, passphrase_fd, passphrase_file))


def main() -> None:
    """Run the command line of `app`: `run` alone, or all commands if `signer.commands` has added them."""
    keep_private()
    open_missing_descriptors()
    prepare_output()
    sink = LogSink(2)
    atexit.register(sink.drain)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False),
        ],
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", sink)),
    )
    run_command_line(plain_unless_wide(typer.main.get_command(app)), typer)


_STACK_BYTES = 1024 * 1024
"""Stack of one thread: the default of 8 MiB would count in full against a limit on addresses (RLIMIT_AS)."""


def start(file: Path, passphrase_fd: int | None = None, passphrase_file: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        SettingsError: the configuration, seed, socket or ledger can't be used, or a required protection is missing.
    """
    config = load_signer_config(file)
    threading.stack_size(_STACK_BYTES)
    if config.state_place.note:
        log.warning("state in an old place", note=config.state_place.note)
    sys.stderr = LogSink(2)  # also tracebacks
    with ExitStack() as cleanup:
        token = cleanup.enter_context(closing(RemoteToken(config))) if config.key.mode == "pkcs11" else None
        with _as_settings(file, config):
            protections = _isolate(config, token)
            check_file(file)
            check_places(config)
            keys = load_keys(config, token, passphrase_fd, passphrase_file)
            asyncio.run(_serve(config, keys, protections, token))


@contextmanager
def _as_settings(file: Path, config: SignerConfig) -> Iterator[None]:
    """Name the setting that a failure of a part belongs to."""
    try:
        yield
    except SeedError as error:
        raise SettingsError(str(file), "key.seed_file" if config.key.seed_file else "", str(error)) from None
    except (IsolationError, NoSecret, PlaceError, SocketError, TokenError) as error:
        raise SettingsError(str(file), error.key, str(error)) from None
    except KeysFailed as error:
        raise SettingsError(str(file), "pkcs11.token", str(error)) from None
    except LedgerFailed as error:
        raise SettingsError(str(file), "state_dir", str(error)) from None


def _isolate(config: SignerConfig, token: RemoteToken | None) -> tuple[str, ...]:
    """Sandbox this process, then the token's process, before any key is read; log and return the protections."""
    directories = sorted({config.state_dir, config.socket_path.parent})
    protections = isolate(config.isolation, directories=directories, group=config.socket.group)
    if token is not None:
        token.open()
        protections += tuple(f"{text} (token's process)" for text in token.protections if text not in protections)
    for text in protections:
        if text.startswith("no "):
            log.warning("isolation", missing=text.removeprefix("no "))
        else:
            log.info("isolation", granted=text)
    return protections


def load_keys(
    config: SignerConfig,
    token: RemoteToken | None = None,
    passphrase_fd: int | None = None,
    passphrase_file: Path | None = None,
) -> KeyRing:
    """Open the key store that the configuration names. The caller has already opened the token, if there is one.

    Raises:
        SeedError: the seed can't be used or created.
        NoSecret: there is no passphrase for the seed.
    """
    sources: list[KeySource]
    if config.key.mode == "debug":
        log.warning("DEBUG KEY: publicly known, its coins can be stolen")
        sources = [StaticKey(DEBUG_KEY)]
    elif token is not None:
        refuse_new_token_keys(config, token)
        refuse_another_token(config, token)
        sources = [*generations(token, config.pkcs11)]
        note_token_keys(config, token)
    else:
        sources = seed_sources(config, passphrase_fd, passphrase_file)
    return KeyRing(sources, config.payout, config.previous_payouts)


async def _serve(config: SignerConfig, keys: KeyRing, protections: tuple[str, ...], token: RemoteToken | None) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.set_exception_handler(vital.end_without_memory)
    end_when_stuck(loop)
    if token is not None:
        loop.add_reader(token, stop.set)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # log rotation, lost terminal: they must not end it
        loop.add_signal_handler(number, partial(log.info, "signal ignored", signal=number.name))
    peers = PeerLimits(
        config.allowed_uids, config.socket.request_seconds, config.socket.idle_seconds, _max_connections(config)
    )
    identity = Identity(config.network, config.key.mode, config.debug, protections)
    reserve_bytes = config.disk.reserve_mb * 1_000_000
    reserve = LedgerReserve(config.ledger_path, config.audit_path, reserve_bytes)
    with (
        closing(_ledger(config, reserve)) as ledger,
        listening_socket(config.socket_path, config.socket.group) as listener,  # last: connections begin here
    ):
        if ledger.torn_bytes:
            log.warning("a crash tore the audit log's last line, which was cut off", bytes=ledger.torn_bytes)
        limits = limits_of(config)
        for tag in sorted(limits.trial):
            log.warning("POLICY ON TRIAL: requests that it would refuse are signed and logged", policy=tag)
        disk = Disk(config.state_dir, reserve_bytes)
        heartbeat = partial(_heartbeat_at, config.heartbeat_path)
        handler = Handler(keys, ledger, identity, limits, heartbeat=heartbeat, disk=disk)
        connections = Connections(handler.handle, peers)
        roles = {
            "connections": connections.accept(listener),
            "probe": _probe(ledger, reserve, config.socket_path),
        }
        tasks = [loop.create_task(role) for role in roles.values()]
        for name, task in zip(roles, tasks, strict=True):
            vital.watch(name, task, stop.is_set)
        _spare_the_collector()
        log.info("signer started", **_described(config, keys))
        try:
            await stop.wait()
        finally:
            stop.set()  # also after a cancellation, so that `vital.watch` accepts the end of the tasks
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        handler.close()
    if token is not None and token.has_ended:
        log.error("the token's process has ended: its library may have crashed; start the signer again")
        raise typer.Exit(1)
    log.info("signer stopped")


def _ledger(config: SignerConfig, reserve: LedgerReserve) -> LevelDbLedger:
    ledger = LevelDbLedger(
        config.ledger_path,
        config.audit_path,
        audit_file_bytes=config.disk.audit_file_mb * 1_000_000,
        on_failure=partial(vital.end, "ledger"),
    )
    ledger.guard_disk(reserve.size, reserve.before_write)
    return ledger


async def _probe(ledger: LevelDbLedger, reserve: LedgerReserve, socket_path: Path) -> None:
    """Make a test write every few seconds, so that a health reply knows the state of the disk while nothing is settled.

    A failed write ends the process, as every failed write does. A removed socket ends it too: no peer could connect.
    """
    while True:
        reserve.fill_up()
        await ledger.put(Entry())
        if not stat.S_ISSOCK(_mode(socket_path)):
            vital.end("socket", f"{socket_path} was removed")
        await asyncio.sleep(PROBE_SECONDS)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _spare_the_collector() -> None:
    """Run the garbage collector rarely, and not on objects that stay for ever: a request leaves no cycles."""
    gc.collect()
    gc.set_threshold(5_000, 20, 20)
    gc.freeze()


def _max_connections(config: SignerConfig) -> int:
    """The configured number, or fewer if the kernel allows fewer file descriptors."""
    most = config.socket.max_connections
    allowed = room_for(most + FAREWELLS) - FAREWELLS
    if allowed < most:
        log.warning("fewer connections than socket.max_connections: raise the limit of open files", connections=allowed)
    return max(1, allowed)


def limits_of(config: SignerConfig) -> Limits:
    """Take the limits of the policies from the settings."""
    policy = config.policy
    return Limits(
        max_fee_percent=policy.max_fee_percent,
        max_fee_sat=policy.max_fee_sat,
        max_fee_sat_per_vb=policy.max_fee_sat_per_vb,
        aged_seconds=60 * policy.aged_minutes,
        value_per_hour_sat=policy.value_per_hour_sat,
        value_per_day_sat=policy.value_per_day_sat,
        requests_per_second=policy.requests_per_second,
        keys_per_second=policy.keys_per_second,
        max_fundings=policy.max_fundings,
        heartbeat_seconds=3600 * policy.heartbeat_hours,
        value_without_heartbeat_sat=policy.value_without_heartbeat_sat,
        trial=frozenset(policy.trial),
        debug=config.debug,
    )


def _heartbeat_at(path: Path) -> UnixTime:
    """Time of the operator's last heartbeat; 0: never."""
    try:
        return UnixTime(int(path.stat().st_mtime))
    except OSError:
        return UnixTime(0)


def _described(config: SignerConfig, keys: KeyRing) -> dict[str, str]:
    network = Network(config.network)
    return {
        "network": config.network_name,
        "key_mode": config.key.mode,
        "state": str(config.state_dir),
        "socket": str(config.socket_path),
        "destination": config.settlement.destination_address or "derived per channel",
        "identity": keys.identity().hex(),
        "reserve": Reserve(keys.reserve().public_key).funding_address(network),
    }


def _or_exit(command: Callable[[], None]) -> None:
    """Report a wrong file, key or seed in one line and exit with status 2, as for a wrong command line."""
    try:
        command()
    except SettingsError as error:
        fail(str(error), 2)


if __name__ == "__main__":
    main()
