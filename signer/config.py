"""The signer's settings: declared once here; `config/*/signer.toml` and the table in signer/README.md follow it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from paychan.protocol.address import decode_address
from paychan.protocol.errors import Malformed
from paychan.protocol.settings import SettingsError, parse_settings, setting
from paychan.protocol.types import Network
from signer.judge.facts import TRIABLE

MAX_SOCKET_PATH_BYTES = 107
"""Linux's sun_path holds 108 bytes, the last one zero."""

_Uid = Annotated[int, Meta(ge=0)]


class Socket(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Annotated[str, setting('where the server connects; "": signer.sock in the state directory', "path")] = ""
    group: Annotated[
        str, setting('group whose members may open the socket; "": only its owner, the signer\'s user')
    ] = ""
    allowed_uids: Annotated[tuple[_Uid, ...], setting("users who get an answer beside the signer's own", "uid")] = ()
    request_seconds: Annotated[
        float, setting("a request has arrived, and is answered, within this", "seconds", gt=0)
    ] = 3.0
    idle_seconds: Annotated[float, setting("a connection without requests is closed", "seconds", gt=0)] = 600.0
    max_connections: Annotated[
        int, setting("for a further one, whoever has asked nothing for longest makes room", ge=1, le=1000)
    ] = 64


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mode: Annotated[
        Literal["hardened", "rbpcp-v2", "pkcs11", "debug"],
        setting("hardened key per channel, key as RBPCP v2 derives it, keys in a token, or the public debug key"),
    ]
    seed_file: Annotated[
        str, setting('the encrypted seed, mode 0600; "": signer.seed in the state directory', "path")
    ] = ""
    passphrase_file: Annotated[
        str,
        setting(
            'holds the seed\'s passphrase, mode 0600; "": systemd\'s credential "passphrase", or asked for', "path"
        ),
    ] = ""
    create_if_missing: Annotated[
        bool, setting("draw a seed, and a passphrase beside it, when there is none, instead of refusing to start")
    ] = False


class Pkcs11(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    module: Annotated[str, setting("the token's library, such as /usr/lib/softhsm/libsofthsm2.so", "path")] = ""
    token: Annotated[str, setting("label of the token")] = ""
    pin_file: Annotated[
        str, setting('holds the user PIN, mode 0600; "": systemd\'s credential "pin", or asked for', "path")
    ] = ""
    keys: Annotated[
        Literal["per-channel", "one"],
        setting("a key of its own for every channel, derived from one in the token, or one for all of them"),
    ] = "per-channel"
    max_keys: Annotated[int, setting("not used any more: a channel leaves no key in the token", ge=1)] = 10_000
    sessions: Annotated[int, setting("signatures that the token makes side by side", ge=1, le=64)] = 4


class Settlement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    destination_address: Annotated[
        str, setting('receives all settlements; "": an address per channel, from the seed', "address")
    ] = ""
    previous_addresses: Annotated[
        tuple[str, ...], setting("received settlements before: what was signed for them may be signed again", "address")
    ] = ()


class Policy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_fee_percent: Annotated[int, setting("most of what channels earned that may become fee", "%", ge=0, le=100)] = 50
    max_fee_sat: Annotated[int, setting("most that one settlement may pay as fee", "sat", ge=0)] = 5_000_000
    value_per_hour_sat: Annotated[int, setting("most that is settled in an hour; 0: no limit", "sat", ge=0)] = (
        10_000_000_000
    )
    value_per_day_sat: Annotated[int, setting("most that is settled in a day; 0: no limit", "sat", ge=0)] = 0
    max_fee_sat_per_vb: Annotated[
        int,
        setting(
            "most that a settlement may pay; not less than the server's settlement.max_fee_sat_per_vb", "sat/vB", ge=1
        ),
    ] = 200
    aged_minutes: Annotated[
        int,
        setting(
            "channels whose funding was shown after that have half of the values per hour and day for themselves; 0: off",
            "minutes",
            ge=0,
        ),
    ] = 360
    requests_per_second: Annotated[
        int, setting("requests about settlements that are judged, over ten seconds", "1/s", ge=1)
    ] = 1000
    keys_per_second: Annotated[
        int,
        setting("keys for channels that may be opened, over ten seconds; settling needs none of these", "1/s", ge=1),
    ] = 200
    max_fundings: Annotated[int, setting("funding outputs remembered; further ones are refused", ge=1)] = 1_000_000
    heartbeat_hours: Annotated[
        int,
        setting("after so long without `paychan-signer heartbeat` only small sums are settled; 0: off", "hours", ge=0),
    ] = 0
    value_without_heartbeat_sat: Annotated[
        int, setting("most that is settled without a fresh heartbeat", "sat", ge=0)
    ] = 0
    trial: Annotated[
        tuple[str, ...],
        setting("policies that only log what they would refuse, by tag; for trying them out, never for good"),
    ] = ()


class Isolation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    user: Annotated[str, setting('user to become when started as root; "": stay')] = ""
    require: Annotated[
        tuple[Literal["seccomp", "network", "memory", "dumpable"], ...],
        setting("protections without which the signer does not start; the others are had where the kernel allows"),
    ] = ("dumpable",)


class Disk(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reserve_mb: Annotated[
        int, setting("with less free where state_dir is, only what is needed to settle is answered", "MB", ge=0)
    ] = 64
    audit_file_mb: Annotated[
        int, setting("the audit log goes on in a new file when it has this size; 0: never", "MB", ge=0)
    ] = 64


class SignerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything `paychan-signer` is told."""

    network: Annotated[Literal["live", "test", "regtest"], setting("Bitcoin network of addresses")]
    debug: Annotated[bool, setting("allow the publicly known debug key; anybody can take what it earns")] = False
    state_directory: Annotated[str, setting('where data is kept; "": ./.paychan/<network>', "path")] = field(
        default="", name="state_dir"
    )
    socket: Socket = field(default_factory=Socket)
    key: Key
    pkcs11: Pkcs11 = field(default_factory=Pkcs11)
    settlement: Settlement = field(default_factory=Settlement)
    policy: Policy = field(default_factory=Policy)
    disk: Disk = field(default_factory=Disk)
    isolation: Isolation = field(default_factory=Isolation)

    @property
    def network_name(self) -> str:
        """Name for people and directories: debug is a network of its own."""
        return "debug" if self.debug else self.network

    @property
    def state_dir(self) -> Path:
        return Path(self.state_directory or Path(".paychan") / self.network_name).resolve()

    @property
    def socket_path(self) -> Path:
        """Its directory is resolved, its name is not: a link in the place of the socket is refused, not followed."""
        path = Path(self.socket.path or self.state_dir / "signer.sock")
        return path.parent.resolve() / path.name

    @property
    def seed_path(self) -> Path:
        """Not resolved: a link in the place of the seed is refused, not followed."""
        return Path(self.key.seed_file or self.state_dir / "signer.seed").absolute()

    @property
    def traces(self) -> tuple[Path, ...]:
        """Files that only a signer that was here before has left: with these, keys exist that must not be replaced."""
        state, ledger = self.state_dir, self.ledger_path
        archives = sorted(state.glob(f"{self.audit_path.name}*")) if state.is_dir() else []
        return tuple(path for path in (ledger, *archives) if os.path.lexists(path))

    @property
    def token_keys_path(self) -> Path:
        """File of the digests of the token's keys."""
        return self.state_dir / "signer.token"

    @property
    def ledger_path(self) -> Path:
        """Directory of what was signed."""
        return self.state_dir / "signer.ledger"

    @property
    def audit_path(self) -> Path:
        """File of every decision."""
        return self.state_dir / "signer.audit"

    @property
    def heartbeat_path(self) -> Path:
        """File whose time of change is the operator's last sign of life."""
        return self.state_dir / "signer.heartbeat"

    @property
    def allowed_uids(self) -> frozenset[int]:
        """Who gets an answer: our own user always, which is the operator who asks for the status."""
        return frozenset((*self.socket.allowed_uids, os.geteuid()))

    @property
    def destination_script(self) -> bytes | None:
        """ScriptPubKey of the configured destination; None when it is derived per channel."""
        address = self.settlement.destination_address
        return decode_address(address, Network(self.network)) if address else None

    @property
    def previous_scripts(self) -> tuple[bytes, ...]:
        """ScriptPubKeys of the destinations before."""
        return tuple(decode_address(address, Network(self.network)) for address in self.settlement.previous_addresses)


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
    socket_bytes = len(os.fsencode(config.socket_path))
    checks = (
        (
            config.debug and config.network != "test",
            "debug",
            f'debug exists on the "test" network only, not on "{config.network}"',
        ),
        (
            config.key.create_if_missing and config.network == "live",
            "key.create_if_missing",
            "a seed on the live network is drawn by `paychan-signer init FILE` alone, which shows its words: set it to false",
        ),
        (
            config.key.mode == "debug" and not config.debug,
            "key.mode",
            'the key of "debug" is publicly known; it needs debug = true',
        ),
        (
            config.key.mode in ("debug", "pkcs11") and not config.settlement.destination_address,
            "settlement.destination_address",
            f'required with key.mode = "{config.key.mode}", which derives no address',
        ),
        (
            config.key.mode == "pkcs11" and not (config.pkcs11.module and config.pkcs11.token),
            "pkcs11.module",
            'required with key.mode = "pkcs11", and so is pkcs11.token',
        ),
        (
            bool(set(config.policy.trial) - TRIABLE),
            "policy.trial",
            f"{sorted(set(config.policy.trial) - TRIABLE)} can't be tried out, only {sorted(TRIABLE)}",
        ),
        (
            bool(config.policy.heartbeat_hours) != bool(config.policy.value_without_heartbeat_sat),
            "policy.heartbeat_hours",
            "goes with policy.value_without_heartbeat_sat: set both or none",
        ),
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
    return _wrong_addresses(config) + [(key, reason) for wrong, key, reason in checks if wrong]


def _wrong_addresses(config: SignerConfig) -> list[tuple[str, str]]:
    found = []
    for name in ("destination_script", "previous_scripts"):
        try:
            getattr(config, name)
        except Malformed as error:
            key = "destination_address" if name == "destination_script" else "previous_addresses"
            found.append((f"settlement.{key}", str(error.fields["reason"])))
    return found
