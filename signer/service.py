"""The signer as a process: `paychan-signer FILE`. Puts the parts together, listens, and stops on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated

import structlog
import typer
from typer.core import TyperGroup

from paychan.protocol.address import encode_address
from paychan.protocol.declared import SettingsError
from paychan.protocol.settlement import Reserve
from paychan.protocol.types import Network
from signer.config import SignerConfig, load_signer_config
from signer.connections import Connections, Limits
from signer.handlers import Handler
from signer.keys import DEBUG_KEY, Keys, StaticKey, hardened_keys, rbpcp_v2_keys
from signer.ledger import LedgerFailed, LevelDbLedger
from signer.seed import SeedError, create_seed, read_seed
from signer.socketfile import SocketError, listening_socket

_PR_SET_DUMPABLE = 4  # linux/prctl.h

log = structlog.get_logger()


class _RunByDefault(TyperGroup):
    """`paychan-signer FILE` is `paychan-signer run FILE`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="paychan-signer",
    cls=_RunByDefault,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Hold the keys of a payment channel server, and sign its settlements after checking them.

    Examples:

      paychan-signer config/debug/signer.toml

      paychan-signer init config/live/signer.toml
    """,
)

_File = Annotated[Path, typer.Argument(metavar="FILE", help="the signer's configuration, TOML", show_default=False)]


@app.command()
def run(file: _File) -> None:
    """Start the signer; `run` may be left out. It serves its Unix socket until SIGTERM or SIGINT."""
    _or_exit(lambda: start(file))


@app.command()
def init(file: _File) -> None:
    """Create the seed that a configuration names. An existing one is left alone."""
    _or_exit(lambda: create(file))


def main() -> None:
    """Run the command line."""
    protect_memory()
    os.umask(0o077)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    app()


def create(file: Path) -> None:
    """Create the seed file of a configuration.

    Raises:
        SettingsError: no usable configuration, one without a seed, or the seed can't be created.
    """
    config = load_signer_config(file)
    if config.key.mode == "debug":
        raise SettingsError(str(file), "key.mode", '"debug" has no seed')
    try:
        create_seed(config.seed_path)
    except SeedError as error:
        raise SettingsError(str(file), "key.seed_file", str(error)) from None
    typer.echo(f"Created {config.seed_path}. Keep a copy in a safe place: without it, open channels earn nothing.")


def start(file: Path) -> None:
    """Serve until a signal says stop.

    Raises:
        SettingsError: no usable configuration, seed, socket or ledger.
    """
    config = load_signer_config(file)
    try:
        keys = load_keys(config)
        asyncio.run(_serve(config, keys))
    except SeedError as error:
        raise SettingsError(str(file), "key.seed_file", str(error)) from None
    except SocketError as error:
        raise SettingsError(str(file), error.key, str(error)) from None
    except LedgerFailed as error:
        raise SettingsError(str(file), "state_dir", str(error)) from None


def load_keys(config: SignerConfig) -> Keys:
    """Open the key store that the configuration names.

    Raises:
        SeedError: the seed can't be used, or created.
    """
    destination = config.destination_script
    if config.key.mode == "debug" and destination is not None:
        log.warning("DEBUG KEY: publicly known, anybody can take what it earns")
        return StaticKey(DEBUG_KEY, destination)
    if config.key.create_if_missing and not os.path.lexists(config.seed_path):
        create_seed(config.seed_path)
        log.warning("new seed created, keep a copy in a safe place", file=str(config.seed_path))
    derive = hardened_keys if config.key.mode == "hardened" else rbpcp_v2_keys
    return derive(read_seed(config.seed_path), destination)


async def _serve(config: SignerConfig, keys: Keys) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    limits = Limits(
        config.allowed_uids, config.socket.request_seconds, config.socket.idle_seconds, config.socket.max_connections
    )
    with (
        listening_socket(config.socket_path, config.socket.group) as listener,
        closing(LevelDbLedger(config.ledger_path)) as ledger,
    ):
        handler = Handler(keys, ledger, config.network, config.key.mode, debug=config.debug)
        connections = Connections(handler, limits)
        server = await asyncio.start_unix_server(connections.serve, sock=listener)
        log.info("signer started", **_identity(config, keys))
        await stop.wait()
        server.close()
        connections.close()
    log.info("signer stopped")


def _identity(config: SignerConfig, keys: Keys) -> dict[str, str]:
    network, destination = Network(config.network), config.destination_script
    return {
        "network": config.network_name,
        "key_mode": config.key.mode,
        "socket": str(config.socket_path),
        "destination": encode_address(destination, network) if destination else "derived per channel",
        "reserve": Reserve(keys.reserve_key()).funding_address(network),
    }


def protect_memory() -> None:
    """Keep keys out of core dumps, and out of reach of a debugger of the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("process stays dumpable", errno=ctypes.get_errno())


def _or_exit(command: Callable[[], None]) -> None:
    """Say in one line what is wrong with file, key or seed; status 2 as for a wrong command line."""
    try:
        command()
    except SettingsError as error:
        typer.echo(f"paychan-signer: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    main()
