"""Creates the configured backends of a server, and lists contradictions between their settings and the server's.

A backend that is unreachable is no error here: the server starts without node and signer, and uses them once they
answer. Errors are the problems that waiting does not solve: another network, a port in use, settings that the signer's
contradict.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import assert_never

from actors.context import wall_clock
from paychan.callback.http import HttpApplication
from paychan.callback.outbox import Outbox, announce_again
from paychan.callback.signing import KeyFileError, load_keys
from paychan.chain.base import Chain, ChainFailed, ChainUnfit
from paychan.chain.bitcoind.chain import BitcoindChain
from paychan.chain.bitcoind.wallet import LONG_SECONDS
from paychan.chain.debug import DebugChain
from paychan.chain.electrum.chain import ElectrumChain
from paychan.config import ServerConfig
from paychan.protocol.channel import Channel
from paychan.protocol.settings import SettingsError
from paychan.protocol.wire.signer_messages import HealthReply
from paychan.shared.places import how_to_make
from paychan.signer_client.limits import contradictions
from paychan.signer_client.unix import UnixSigner
from paychan.store.leveldb.store import LevelDbStore
from paychan.supervisor import Supervisor

_RESCAN_PATIENCE_SECONDS = 1.0
"""A shorter rescan is awaited; a longer one continues in the background."""


_OTHERS_WRITE = 0o022


class StartError(Exception):
    """The server can't start; the message names the problem and its remedy."""


def make_state_dir(path: Path, store_path: Path) -> None:
    """Create the directory of the server's data, or check that it is writable; check that no other user can write to it.

    Raises:
        StartError: the directory or the store's can't be used.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        msg = f"can't make {path}: {error.strerror}. {how_to_make(path)}"
        raise StartError(msg) from error
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        msg = f"{path} is on a file system that is mounted read-only. Mount it for writing, or change state_dir"
        raise StartError(msg)
    if not os.access(path, os.W_OK | os.X_OK):
        msg = f"can't write to {path}. Give it to this user, or change state_dir"
        raise StartError(msg)
    for directory in (path, store_path.parent, store_path):
        problem = _place_problem(directory)
        if problem:
            raise StartError(problem)


def _place_problem(path: Path) -> str:
    """Return why another user could replace or remove the store: the signer checks its directories in the same way."""
    for above in path.parents:
        if above.exists() and above.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            return f"{above} can be written by all users, who could replace {path}: `chmod o-w {above}`"
    if not path.exists():
        return ""
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to uid {status.st_uid}, this is uid {os.geteuid()}: `chown` it, or start as that user"
    is_sticky_parent = status.st_mode & stat.S_ISVTX and status.st_uid == 0
    if status.st_mode & _OTHERS_WRITE and not is_sticky_parent:
        return f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, others can write to it: `chmod go-w {path}`"
    return ""


def make_signer(config: ServerConfig, source: str) -> UnixSigner:
    """Create the signer's client; it refuses a signer whose settings contradict this configuration."""
    return UnixSigner(
        config.signer_socket, config.signer.deadline_seconds, lambda health: _misfit(health, config, source)
    )


def _misfit(health: HealthReply, config: ServerConfig, source: str) -> str:
    """Return how the settings that a signer reports contradict the configuration; empty if they don't."""
    if (health.network, health.debug) != (config.network, config.debug):
        return (
            f"the signer serves {health.network} (debug: {health.debug}), the server {config.network} "
            f"(debug: {config.debug}). Give both the same network"
        )
    batch_channels = config.settlement.batch_channels if config.settlement.batch_seconds else 0
    problems = contradictions(health, config.rules, batch_channels)
    return f"{source}: " + "; ".join(problems) if problems else ""


def make_chain(config: ServerConfig, source: str, supervisor: Supervisor | None = None) -> Chain:
    """Create the configured backend; it does not connect yet.

    With a supervisor, the backend belongs to a server, and rescans run in the background. Without one it belongs to a
    command, which waits for its rescan.

    Raises:
        SettingsError: the backend can't be created as configured; `source` names the file.
    """
    chosen, network = config.chain, config.bitcoin_network
    try:
        if chosen.backend == "debug":
            return DebugChain()
        if chosen.backend == "electrum":
            certificate = Path(chosen.certificate_file) if chosen.certificate_file else None
            return ElectrumChain(
                chosen.url, network, timeout_seconds=chosen.timeout_seconds, certificate_file=certificate
            )
        if chosen.backend == "bitcoind":
            return BitcoindChain(
                chosen.url,
                network,
                credentials=Path(chosen.credentials_file),
                wallet=chosen.wallet,
                timeout_seconds=chosen.timeout_seconds,
                search_seconds=0 if supervisor else LONG_SECONDS,
                supervisor=supervisor,
                rescan_patience_seconds=_RESCAN_PATIENCE_SECONDS if supervisor else LONG_SECONDS,
            )
        assert_never(chosen.backend)
    except (ValueError, ChainUnfit) as error:
        raise SettingsError(source, "chain", str(error)) from None


async def open_chain(config: ServerConfig, source: str) -> Chain:
    """Create the configured backend for a command, and check that its node is usable now.

    Raises:
        SettingsError: the backend can't be created as configured; `source` names the file.
        StartError: the node is not usable.
    """
    chain = make_chain(config, source)
    try:
        await chain.check()
    except ChainFailed as error:
        await chain.close()
        raise StartError(str(error)) from error
    return chain


def make_application(config: ServerConfig, store: LevelDbStore) -> tuple[HttpApplication | None, Outbox | None]:
    """Create the two ways to the application, if one is configured: questions, and messages that wait in the store.

    Raises:
        StartError: the file of the keys can't be used.
    """
    callback = config.callback
    if not callback.url:
        return None, None
    try:
        keys = load_keys(config.callback_keys)
    except KeyFileError as error:
        raise StartError(str(error)) from None
    application = HttpApplication(
        callback.url, callback.timeout_seconds, config.bitcoin_network, keys=keys, clock=wall_clock
    )
    if not callback.events:
        return application, None
    outbox = Outbox(store, application, wall_clock)
    store.announce_by(outbox.announce)
    return application, outbox


def restored_messages(config: ServerConfig) -> Callable[[Channel | None, Channel], Sequence[bytes]] | None:
    """Return the function that makes the messages about restored channels; None if the application gets none."""
    return announce_again(wall_clock()) if config.callback.url and config.callback.events else None
