"""The signer's settings, declared once: the comments of `config/*/signer.toml` and the pages' table repeat them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from paychan.protocol.errors import Malformed
from paychan.protocol.settings import SettingsError, parse_settings, setting
from paychan.protocol.types import Network
from paychan.shared.places import Place, state_place, trouble_with_path
from signer.judge.facts import TRIABLE
from signer.keys.payout import Payout, parse_payout

MAX_SOCKET_PATH_BYTES = 107
"""Linux's sun_path holds 108 bytes, the last one is zero."""

_Uid = Annotated[int, Meta(ge=0)]


class Socket(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Annotated[str, setting('socket for the server; "": signer.sock in the state directory', "path")] = ""
    group: Annotated[str, setting('group whose members may open the socket; "": only the signer\'s user may')] = ""
    allowed_uids: Annotated[
        tuple[_Uid, ...], setting("users whose requests are answered, besides the signer's own user", "uid")
    ] = ()
    request_seconds: Annotated[float, setting("time for a request to arrive and be answered", "seconds", gt=0)] = 3.0
    idle_seconds: Annotated[float, setting("a connection without requests is closed after this", "seconds", gt=0)] = (
        600.0
    )
    max_connections: Annotated[
        int, setting("most connections; a further one closes the connection that has been idle longest", ge=1, le=1000)
    ] = 64


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mode: Annotated[
        Literal["hardened", "rbpcp-v2", "pkcs11", "debug"],
        setting("a hardened key per channel, keys as RBPCP v2 derives them, keys in a token, or the public debug key"),
    ]
    seed_file: Annotated[
        str, setting('the encrypted seed, mode 0600; "": signer.seed in the state directory', "path")
    ] = ""
    passphrase_file: Annotated[
        str,
        setting('holds the seed\'s passphrase, mode 0600; "": systemd\'s credential "passphrase", or a prompt', "path"),
    ] = ""
    create_if_missing: Annotated[
        bool, setting("if there is no seed, create one and a passphrase beside it, instead of refusing to start")
    ] = False


class Pkcs11(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    module: Annotated[str, setting("the token's PKCS#11 library, such as /usr/lib/softhsm/libsofthsm2.so", "path")] = ""
    token: Annotated[str, setting("label of the token")] = ""
    pin_file: Annotated[
        str, setting('holds the user PIN, mode 0600; "": systemd\'s credential "pin", or a prompt', "path")
    ] = ""
    keys: Annotated[
        Literal["per-channel", "one"],
        setting("one key per channel, derived from a key in the token, or one key for all channels"),
    ] = "per-channel"
    max_keys: Annotated[int, setting("no longer used: a channel leaves no key in the token", ge=1)] = 10_000
    sessions: Annotated[int, setting("signatures that the token makes in parallel", ge=1, le=64)] = 4


class Settlement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    destination_address: Annotated[
        str,
        setting(
            'receives all settlements: an address, or a descriptor of your own wallet; "": addresses derived from the seed',
            "address",
        ),
    ] = ""
    previous_addresses: Annotated[
        tuple[str, ...], setting("earlier destinations: a settlement signed for one may be signed again", "address")
    ] = ()


class Policy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_fee_percent: Annotated[
        int, setting("largest part of the channels' earnings that may become fee", "%", ge=0, le=100)
    ] = 50
    max_fee_sat: Annotated[int, setting("largest fee of one settlement", "sat", ge=0)] = 5_000_000
    value_per_hour_sat: Annotated[int, setting("largest value settled in an hour; 0: no limit", "sat", ge=0)] = (
        10_000_000_000
    )
    value_per_day_sat: Annotated[int, setting("largest value settled in a day; 0: no limit", "sat", ge=0)] = 0
    max_fee_sat_per_vb: Annotated[
        int,
        setting(
            "highest fee rate of a settlement; not less than the server's settlement.max_fee_sat_per_vb", "sat/vB", ge=1
        ),
    ] = 200
    aged_minutes: Annotated[
        int,
        setting(
            "half of each value limit is reserved for channels whose funding is known for this time; 0: off",
            "minutes",
            ge=0,
        ),
    ] = 360
    requests_per_second: Annotated[
        int, setting("most requests about settlements, on average over ten seconds", "1/s", ge=1)
    ] = 1000
    keys_per_second: Annotated[
        int,
        setting("most keys for new channels, on average over ten seconds; settling needs no new key", "1/s", ge=1),
    ] = 200
    max_fundings: Annotated[int, setting("most funding outputs remembered; further ones are refused", ge=1)] = 1_000_000
    heartbeat_hours: Annotated[
        int,
        setting(
            "only small sums are settled after this time without `paychan-signer heartbeat`; 0: off", "hours", ge=0
        ),
    ] = 0
    value_without_heartbeat_sat: Annotated[
        int, setting("largest value settled without a fresh heartbeat", "sat", ge=0)
    ] = 0
    trial: Annotated[
        tuple[str, ...],
        setting("tags of policies that log a refusal instead of refusing; for trials only, never in normal operation"),
    ] = ()


class Isolation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    user: Annotated[str, setting('user to switch to when started as root; "": do not switch')] = ""
    require: Annotated[
        tuple[Literal["seccomp", "network", "memory", "dumpable"], ...],
        setting("protections without which the signer refuses to start; others are used where the kernel offers them"),
    ] = ("dumpable",)


class Disk(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reserve_mb: Annotated[
        int, setting("below this free space in state_dir, only requests needed for settling are answered", "MB", ge=0)
    ] = 64
    audit_file_mb: Annotated[
        int, setting("the audit log continues in a new file at this size; 0: never", "MB", ge=0)
    ] = 64


class SignerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of `paychan-signer`."""

    network: Annotated[Literal["live", "test", "regtest"], setting("Bitcoin network of addresses")]
    debug: Annotated[bool, setting("allow the public debug key; any person can take its earnings")] = False
    state_directory: Annotated[
        str,
        setting(
            'directory of all data; "": /var/lib/paychan/<network>, for debug and regtest ./.paychan/<network>', "path"
        ),
    ] = field(default="", name="state_dir")
    socket: Socket = field(default_factory=Socket)
    key: Key
    pkcs11: Pkcs11 = field(default_factory=Pkcs11)
    settlement: Settlement = field(default_factory=Settlement)
    policy: Policy = field(default_factory=Policy)
    disk: Disk = field(default_factory=Disk)
    isolation: Isolation = field(default_factory=Isolation)

    @property
    def network_name(self) -> str:
        """Name for messages and directories: debug counts as a network of its own."""
        return "debug" if self.debug else self.network

    @property
    def state_place(self) -> Place:
        """The state directory, and what is to be said about it."""
        return state_place(self.state_directory, self.network_name)

    @property
    def state_dir(self) -> Path:
        return self.state_place.directory

    @property
    def socket_path(self) -> Path:
        """Path of the socket. Its directory is resolved, its last part is not: a symbolic link there is refused."""
        path = Path(self.socket.path or self.state_dir / "signer.sock")
        return path.parent.resolve() / path.name

    @property
    def seed_path(self) -> Path:
        """Path of the seed. It is not resolved: a symbolic link there is refused."""
        return Path(self.key.seed_file or self.state_dir / "signer.seed").absolute()

    @property
    def traces(self) -> tuple[Path, ...]:
        """Files that only an earlier signer can have left: if one exists, keys exist that must not be replaced."""
        state, ledger = self.state_dir, self.ledger_path
        archives = sorted(state.glob(f"{self.audit_path.name}*")) if state.is_dir() else []
        return tuple(path for path in (ledger, *archives) if os.path.lexists(path))

    @property
    def token_keys_path(self) -> Path:
        """File with the digests of the token's keys."""
        return self.state_dir / "signer.token"

    @property
    def ledger_path(self) -> Path:
        """Directory of the ledger: all signatures given."""
        return self.state_dir / "signer.ledger"

    @property
    def audit_path(self) -> Path:
        """The audit log: a file with every decision."""
        return self.state_dir / "signer.audit"

    @property
    def sweeps_path(self) -> Path:
        """File with one line of JSON for each sweep that was signed."""
        return self.state_dir / "signer.sweeps"

    @property
    def heartbeat_path(self) -> Path:
        """File whose modification time is that of the operator's last heartbeat."""
        return self.state_dir / "signer.heartbeat"

    @property
    def allowed_uids(self) -> frozenset[int]:
        """Users whose requests are answered; the signer's own user, with which the operator reads the status, is one."""
        return frozenset((*self.socket.allowed_uids, os.geteuid()))

    @property
    def payout(self) -> Payout | None:
        """The configured destination; None when it is derived per channel."""
        address = self.settlement.destination_address
        return parse_payout(address, Network(self.network)) if address else None

    @property
    def previous_payouts(self) -> tuple[Payout, ...]:
        """The earlier destinations."""
        return tuple(parse_payout(address, Network(self.network)) for address in self.settlement.previous_addresses)


def load_signer_config(path: Path) -> SignerConfig:
    """Read a signer file.

    Raises:
        SettingsError: the file is not readable, has an unknown key or a wrong type, or its settings contradict each
        other.
    """
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(str(path), "", f"can't read the file: {error}") from None
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
            "on the live network only `paychan-signer init FILE` creates a seed, and shows its words: set this to false",
        ),
        (
            config.key.mode == "debug" and not config.debug,
            "key.mode",
            'the "debug" key is publicly known; it needs debug = true',
        ),
        (
            config.key.mode in ("debug", "pkcs11") and not config.settlement.destination_address,
            "settlement.destination_address",
            f'required with key.mode = "{config.key.mode}", which derives no address',
        ),
        (
            config.key.mode == "pkcs11" and not (config.pkcs11.module and config.pkcs11.token),
            "pkcs11.module",
            'required with key.mode = "pkcs11", as is pkcs11.token',
        ),
        (
            bool(set(config.policy.trial) - TRIABLE),
            "policy.trial",
            f"{sorted(set(config.policy.trial) - TRIABLE)} can't be tried, only {sorted(TRIABLE)}",
        ),
        (
            bool(config.policy.heartbeat_hours) != bool(config.policy.value_without_heartbeat_sat),
            "policy.heartbeat_hours",
            "works only together with policy.value_without_heartbeat_sat: set both or none",
        ),
        (
            bool(strangers) and not config.socket.group,
            "socket.allowed_uids",
            f"{sorted(strangers)} can't open a socket of uid {os.geteuid()} with mode 0600: set socket.group",
        ),
        (
            socket_bytes > MAX_SOCKET_PATH_BYTES,
            "socket.path",
            f"{config.socket_path} has {socket_bytes} bytes, a socket path can have {MAX_SOCKET_PATH_BYTES}",
        ),
    )
    return _wrong_places(config) + _wrong_addresses(config) + [(key, reason) for wrong, key, reason in checks if wrong]


def _wrong_places(config: SignerConfig) -> list[tuple[str, str]]:
    place = config.state_place
    paths = ("state_dir", config.state_directory), ("key.seed_file", config.key.seed_file)
    troubles = [(key, trouble_with_path(path, config.network_name)) for key, path in paths]
    troubles += [("state_dir", place.note)] if place.is_doubtful else []
    return [(key, reason) for key, reason in troubles if reason]


def _wrong_addresses(config: SignerConfig) -> list[tuple[str, str]]:
    found = []
    for name in ("payout", "previous_payouts"):
        try:
            getattr(config, name)
        except Malformed as error:
            if name == "payout" and config.settlement.destination_address.strip().lower() == "seed":
                found.append(("settlement.destination_address", 'write "" for addresses derived from the seed'))
                continue
            key = "destination_address" if name == "payout" else "previous_addresses"
            found.append((f"settlement.{key}", str(error.fields["reason"])))
    return found
