"""The signer's settings: declared once here; `config/*/signer.toml` and the README's table follow this module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from paychan.protocol.address import decode_address
from paychan.protocol.declared import SettingsError, parse_settings, setting
from paychan.protocol.errors import Malformed
from paychan.protocol.types import Network

MAX_SOCKET_PATH_BYTES = 107
"""Linux's sun_path holds 108 bytes, the last one zero."""

_Uid = Annotated[int, Meta(ge=0)]


class Socket(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Annotated[str, setting('where the server connects; "": signer.sock in the state directory', "path")] = ""
    group: Annotated[
        str, setting('group whose members may open the socket; "": only its owner, the signer\'s user')
    ] = ""
    allowed_uids: Annotated[tuple[_Uid, ...], setting("users who get an answer; []: only the signer's own", "uid")] = ()
    request_seconds: Annotated[
        float, setting("a request has arrived, and is answered, within this", "seconds", gt=0)
    ] = 3.0
    idle_seconds: Annotated[float, setting("a connection without requests is closed", "seconds", gt=0)] = 600.0
    max_connections: Annotated[int, setting("further connections are turned away", ge=1, le=1000)] = 64


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mode: Annotated[
        Literal["hardened", "rbpcp-v2", "debug"],
        setting("hardened key per channel, key as RBPCP v2 derives it, or the public debug key"),
    ]
    seed_file: Annotated[str, setting('64 hex digits, mode 0600; "": signer.seed in the state directory', "path")] = ""
    create_if_missing: Annotated[bool, setting("draw a seed when there is none, instead of refusing to start")] = False


class Settlement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    destination_address: Annotated[
        str, setting('receives all settlements; "": an address per channel, from the seed', "address")
    ] = ""


class SignerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything `paychan-signer` is told."""

    network: Annotated[Literal["live", "test", "regtest"], setting("Bitcoin network of addresses")]
    debug: Annotated[bool, setting("allow the publicly known debug key; anybody can take what it earns")] = False
    state_directory: Annotated[str, setting('where data is kept; "": ./.paychan/<network>', "path")] = field(
        default="", name="state_dir"
    )
    socket: Socket = field(default_factory=Socket)
    key: Key
    settlement: Settlement = field(default_factory=Settlement)

    @property
    def network_name(self) -> str:
        """Name for people and directories: debug is a network of its own."""
        return "debug" if self.debug else self.network

    @property
    def state_dir(self) -> Path:
        return Path(self.state_directory or Path(".paychan") / self.network_name).resolve()

    @property
    def socket_path(self) -> Path:
        return Path(self.socket.path or self.state_dir / "signer.sock").resolve()

    @property
    def seed_path(self) -> Path:
        """Not resolved: a link in the place of the seed is refused, not followed."""
        return Path(self.key.seed_file or self.state_dir / "signer.seed").absolute()

    @property
    def ledger_path(self) -> Path:
        """Directory of what was signed."""
        return self.state_dir / "signer.ledger"

    @property
    def allowed_uids(self) -> frozenset[int]:
        return frozenset(self.socket.allowed_uids or (os.geteuid(),))

    @property
    def destination_script(self) -> bytes | None:
        """ScriptPubKey of the configured destination; None when it is derived per channel."""
        address = self.settlement.destination_address
        return decode_address(address, Network(self.network)) if address else None


def load_signer_config(path: Path) -> SignerConfig:
    """Read a signer file.

    Raises:
        SettingsError: not readable, unknown key, wrong type, or settings that contradict each other.
    """
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(str(path), "", f"can't be read: {error}") from None
    config = parse_settings(text, SignerConfig, str(path))
    for key, reason in _contradictions(config):
        raise SettingsError(str(path), key, reason)
    return config


def _contradictions(config: SignerConfig) -> list[tuple[str, str]]:
    """List the combinations that would lose coins or can't work, as (key, reason)."""
    strangers = config.allowed_uids - {0, os.geteuid()}
    wrong_address = _address_problem(config)
    socket_bytes = len(os.fsencode(config.socket_path))
    checks = (
        (
            config.debug and config.network != "test",
            "debug",
            f'debug exists on the "test" network only, not on "{config.network}"',
        ),
        (
            config.key.mode == "debug" and not config.debug,
            "key.mode",
            'the key of "debug" is publicly known; it needs debug = true',
        ),
        (
            config.key.mode == "debug" and not config.settlement.destination_address,
            "settlement.destination_address",
            'required with key.mode = "debug", which derives no address',
        ),
        (bool(wrong_address), "settlement.destination_address", wrong_address),
        (
            bool(strangers) and not config.socket.group,
            "socket.allowed_uids",
            f"{sorted(strangers)} can't open a socket of uid {os.geteuid()} with mode 0600: name socket.group",
        ),
        (
            socket_bytes > MAX_SOCKET_PATH_BYTES,
            "socket.path",
            f"{config.socket_path} has {socket_bytes} bytes, a socket can have {MAX_SOCKET_PATH_BYTES}",
        ),
    )
    return [(key, reason) for wrong, key, reason in checks if wrong]


def _address_problem(config: SignerConfig) -> str:
    try:
        config.destination_script  # noqa: B018 - a property that raises
    except Malformed as error:
        return str(error.fields["reason"])
    return ""
