"""`paychan up`: starts signer and server like the original's runEverything.sh, and stops both together."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO, cast

import httpx
import msgspec
from rich.markup import escape
from tornado.netutil import bind_sockets

from paychan.cli.echo import Echo
from paychan.cli.terminal import command, err, fail, out, show_facts, whole
from paychan.config import ServerConfig, check_environment, load_server_config
from paychan.protocol.settings import SettingsError
from paychan.protocol.types import Network
from paychan.running import Running, read_running
from paychan.shared.called import program_path
from paychan.shared.holders import cannot_listen
from paychan.shared.layout import Value
from paychan.shared.logsink import LogSink, open_missing_descriptors
from paychan.shared.tls import verification

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 2.0
_STOP_SECONDS = 15.0

_ORIGINAL_CLIENT_KEY = "03da3afe4f58992a8cc909522c2ec859ef218fd92fda0a67c23fb40e0303030405"
"""The client key for which the original's benchmark requests the server's key (RBPCP §15)."""


class _StopSignals:
    """Records a stop signal. It is handled where no step is half done: no child may be left running."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True


def up(signer_file: Path, server_file: Path, place: Path, options: tuple[str, ...] = ()) -> int:
    """Run both processes until a stop signal arrives or one of them ends; return the exit status.

    `options` are more arguments of `paychan serve`.
    """
    try:
        check_environment()
        config = load_server_config(server_file)
    except SettingsError as error:
        fail(str(error), status=2)
    open_missing_descriptors()
    out.file, err.file = (
        cast("IO[str]", LogSink(1)),
        cast("IO[str]", LogSink(2)),
    )  # a reader of this output that stops or exits must not end the supervision
    stop, echo = _StopSignals(), Echo()
    children: dict[str, subprocess.Popen[bytes]] = {}
    if busy := busy_ports(config):
        fail(". ".join(busy))
    try:
        children["paychan-signer"] = _start("paychan-signer", str(signer_file))
        _wait_for_signer(config, echo, children, stop)
        if stop.received:
            return 0
        children["paychan serve"] = _start("paychan", "serve", str(server_file), *options)
        running = _wait_until_serving(config, children, stop)
        if running is not None:
            _show(config, running, place, server_file.parent)
            _watch(config, running, children, stop)
    except (ChildProcessError, httpx.HTTPError) as error:
        err.print(f"[red]paychan:[/red] {escape(str(error))}", soft_wrap=True)
        return 1
    else:
        return 0
    finally:
        try:
            _end(children)
        finally:
            echo.restore()
        for console in (out, err):
            cast("LogSink", console.file).drain()


def busy_ports(config: ServerConfig) -> list[str]:
    """Name each port that can't be listened on, with its holder and the setting: a start would name the first alone."""
    where = config.management
    wanted = ((config.http.listen, config.port, "http.port (or PORT)"), (where.listen, where.port, "management.port"))
    found = []
    for address, port, key in wanted:
        try:
            for each in bind_sockets(port, address):
                each.close()
        except OSError as error:
            found.append(cannot_listen(error, address, port, key))
    return found


def _start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a console script of this installation in its own session: Ctrl-C reaches only this process, which stops it.

    If this process is killed, the kernel stops the child.
    """
    path = program_path(program)
    if shutil.which(path) is None:
        fail(f"{program} is not installed beside {sys.executable}. Install the package: pip install .")
    # preexec_fn is safe: this process has no threads
    return subprocess.Popen([path, *arguments], start_new_session=True, preexec_fn=_end_with_us)  # noqa: S603, PLW1509


def _end_with_us() -> None:
    """Run in the child: let the kernel send it SIGTERM when its parent has ended."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _check_alive(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, child in children.items():
        status = child.poll()
        if status is not None:
            msg = f"{name} ended with status {status}; its last lines above have the reason"
            raise ChildProcessError(msg)


def _wait_for_signer(
    config: ServerConfig, echo: Echo, children: dict[str, subprocess.Popen[bytes]], stop: _StopSignals
) -> None:
    """Return when the signer listens. While it asks for its passphrase, no output of the server disturbs the question.

    A signer that neither asks nor listens is not awaited longer: the server can do most of its work without it. Without a
    terminal, and in debug mode, the signer has nothing to ask.
    """
    if config.debug or not echo.is_terminal:
        return
    until = time.monotonic() + _PATIENCE_SECONDS
    while not stop.received and not _listens(config.signer_socket):
        _check_alive(children)
        if echo.is_off:
            until = time.monotonic() + _PATIENCE_SECONDS
        elif time.monotonic() > until:
            return
        time.sleep(0.05)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _wait_until_serving(
    config: ServerConfig, children: dict[str, subprocess.Popen[bytes]], stop: _StopSignals
) -> Running | None:
    """Return the server's URLs as soon as it listens; None if a stop signal arrives first."""
    report_at = time.monotonic() + _PATIENCE_SECONDS
    while not stop.received:
        _check_alive(children)
        if time.monotonic() > report_at:
            err.print(f"[yellow]paychan:[/yellow] the server at {config.state_dir} does not answer yet", soft_wrap=True)
            report_at += _PATIENCE_SECONDS
        running = read_running(config.state_dir)
        if running is not None and running.pid == children["paychan serve"].pid and _answers(running):
            return running
        time.sleep(0.05)
    return None


def _watch(
    config: ServerConfig, running: Running, children: dict[str, subprocess.Popen[bytes]], stop: _StopSignals
) -> None:
    """Report which parts the server lacks, and when they are available, until a stop signal arrives."""
    reported: list[str] = []
    next_look = 0.0
    while not stop.received:
        _check_alive(children)
        if time.monotonic() >= next_look:
            missing = _missing(config, running)
            for text in missing if missing != reported else ():
                err.print(f"[yellow]missing[/yellow]  {escape(text)}", soft_wrap=True)
            if reported and not missing:
                err.print("[green]complete[/green]: no part is missing any more")
            reported, next_look = missing, time.monotonic() + _LOOK_SECONDS
        time.sleep(0.1)


def _missing(config: ServerConfig, running: Running) -> list[str]:
    """Return the reasons why the server can't serve everything: in words, or in codes without a token (a full disk)."""
    token = ""
    with contextlib.suppress(OSError):
        token = config.management_token.read_text()
    headers = {"Authorization": f"Bearer {token}"}
    try:
        health = httpx.get(
            f"{running.management_url}/health",
            headers=headers,
            timeout=5,
            trust_env=False,
            verify=verification(running.management_url),
        ).json()
    except (httpx.HTTPError, ValueError) as error:
        return [f"an answer of the server: {error}"]
    signer = str(health["signer"])
    return [*(["signer"] if signer.startswith("absent") else []), *map(str, health["frozen"])]


def _answers(running: Running) -> bool:
    try:
        return httpx.get(
            f"{running.management_url}/health", timeout=5, trust_env=False, verify=verification(running.management_url)
        ).status_code in (200, 503)
    except httpx.HTTPError:
        return False


def _show(config: ServerConfig, running: Running, place: Path, settings: Path) -> None:
    """Show the server's URL, its settings and the next command."""
    nothing = " (funding is not checked, nothing is broadcast)" if config.debug else ""
    show_facts(
        f"paychan up {place}",
        ("URL", Value(running.url, "bold")),
        ("Network", config.network_name + nothing),
        ("Server key", _server_key(config, running)),
        ("Settings", whole(settings.resolve())),
        ("State", whole(config.state_dir)),
        ("Management", running.management_url),
        *((("Gateway", Value(running.gateway_url, "bold")),) if running.gateway_url else ()),
        ("Status", command("status", place)),
        ("Next", _next(config, running)),
        ("Stop", "Ctrl-C stops signer and server"),
    )


def _next(config: ServerConfig, running: Running) -> Value:
    if running.gateway_url and config.debug:
        return command("pay", f"{running.gateway_url}/", "--open")
    return command("channel", "new", running.url, *_options(config))


def _options(config: ServerConfig) -> tuple[str, ...]:
    """Return the options that `channel new` needs: addresses of regtest look like those of test."""
    if config.debug:
        return ("--debug",)
    return ("--network", "regtest") if config.bitcoin_network is Network.REGTEST else ()


def _server_key(config: ServerConfig, running: Running) -> str:
    """Return the one key of debug mode; on other networks each channel has its own."""
    if not config.debug:
        return "one for each channel"
    query = {"client_pubkey": _ORIGINAL_CLIENT_KEY, "exp_time": "1500000000"}
    try:
        answer = httpx.get(
            f"{running.url}/v1/fundingInfo", params=query, timeout=5, trust_env=False, verify=verification(running.url)
        )
    except httpx.HTTPError as error:
        return f"not known yet: {error}"
    if answer.status_code != 200:
        return f"not known: {answer.reason_phrase}"
    return str(msgspec.json.decode(answer.content)["server_pubkey"])


def _end(children: dict[str, subprocess.Popen[bytes]]) -> None:
    """Stop the server before the signer, which it may still need."""
    for child in reversed(children.values()):
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
