"""The server's settings: declared once here; `config/*/server.toml` and the table in config/README.md follow it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Struct, field

from paychan.protocol.channel import Depth, Rules
from paychan.protocol.settings import SettingsError, parse_settings, setting
from paychan.protocol.terms import OpeningTerms
from paychan.protocol.types import Network, Sat

MIN_DUST_SAT = 546
"""P2PKH dust limit of Bitcoin Core's default relay policy: a settlement with a smaller output does not propagate."""

TYPICAL_SETTLEMENT_BYTES = 331
"""Size that the original used for its opening price (RBPCP §7.3); the fee paid follows the real size."""


class Http(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: Annotated[str, setting("address that clients connect to")] = "127.0.0.1"
    port: Annotated[int, setting("port; the environment variable PORT overrides it", "TCP port", ge=0, le=65535)] = 8000
    public_url: Annotated[str, setting('base of the URLs in answers, such as "https://pay.example"; "": as asked')] = ""
    trust_forwarded: Annotated[bool, setting("believe X-Forwarded-Proto, -Host and -For of a proxy in front")] = False
    fast_lane: Annotated[bool, setting("payments take a shorter way; off while log.access is on")] = True
    max_body_bytes: Annotated[int, setting("larger request bodies are refused", "bytes", ge=512)] = 4096
    max_header_bytes: Annotated[int, setting("larger request heads are refused", "bytes", ge=1024)] = 8192
    max_bad_signatures: Annotated[
        int, setting("bad signatures and requests after which a connection is closed; each delays it", "requests", ge=1)
    ] = 20
    asks_per_second: Annotated[
        int,
        setting(
            "questions about new channels and openings from one client address; ten times that at once; 0: any", ge=0
        ),
    ] = 200
    idle_seconds: Annotated[int, setting("an idle keep-alive connection is closed", "seconds", ge=1)] = 75
    head_seconds: Annotated[
        int, setting("a first request, and every head that has begun, must have arrived", "seconds", ge=1)
    ] = 10
    body_seconds: Annotated[int, setting("a body must have arrived", "seconds", ge=1)] = 10


class Stream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    coalesce: Annotated[
        bool, setting("of several payments of a channel that wait, verify the newest first: it includes the others")
    ] = True
    max_streams: Annotated[int, setting("further streams are refused", ge=0)] = 1000
    max_streams_per_channel: Annotated[
        int, setting("a further stream of a channel closes the one of its own that has been idle longest", ge=1)
    ] = 8
    ping_seconds: Annotated[
        float, setting("time between two pings; who has not answered one by the next is gone", "seconds", gt=0)
    ] = 20.0


class Open(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    base_price_sat: Annotated[int, setting("least first payment (v1), before the settlement fee", "sat", ge=0)] = 70_000
    add_settlement_fee: Annotated[bool, setting("v1's first payment also pays the settlement's fee")] = True
    v2_price_sat: Annotated[int, setting("least first payment (v2)", "sat", ge=0)] = 100_000
    min_confirmations: Annotated[int, setting("depth of the funding output", "blocks", ge=0)] = 6
    smaller: Annotated[
        tuple[Depth, ...], setting("less depth for less money: [{up_to_sat = 100000, confirmations = 1}, …]")
    ] = ()
    unconfirmed_limit_sat: Annotated[
        int, setting("most value of channels open without a confirmation", "sat", ge=0)
    ] = 0
    min_duration_hours: Annotated[int, setting("least time for payments before settling", "hours", ge=1)] = 12
    max_duration_hours: Annotated[int, setting("a new channel expires within this; 0: no limit", "hours", ge=0)] = 8784
    terms_hold_hours: Annotated[
        int, setting("what was asked for before a change still opens channels this long", "hours", ge=0)
    ] = 24


class Channel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    dust_limit_sat: Annotated[int, setting("least change a payment may leave, unless none", "sat", ge=MIN_DUST_SAT)] = (
        700
    )
    settlement_period_hours: Annotated[int, setting("payments end this long before expiry", "hours", ge=1)] = 6
    idle_seconds: Annotated[int, setting("a channel's actor sleeps after this without messages", "seconds", ge=1)] = 300


class Settlement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    fee_sat_per_vb: Annotated[int, setting("fee rate to begin with when the chain has no estimate", "sat/vB", ge=1)] = (
        40
    )
    max_fee_sat_per_vb: Annotated[int, setting("fee rate that is paid at the deadline at most", "sat/vB", ge=1)] = 200
    max_fee_percent: Annotated[
        int, setting("most of what a channel received that may become fee", "%", ge=1, le=100)
    ] = 50
    margin_hours: Annotated[int, setting("settlements should be confirmed this long before expiry", "hours", ge=0)] = 2
    batch_seconds: Annotated[
        int, setting("drained channels wait so long for others, to be settled together; 0: none waits", "seconds", ge=0)
    ] = 0
    batch_channels: Annotated[int, setting("most channels in one settlement", ge=2, le=200)] = 20
    withdraw_above_sat: Annotated[
        int, setting("take what v2 channels earned when it is so much, and let them go on; 0: never", "sat", ge=0)
    ] = 0
    confirmations: Annotated[int, setting("depth at which a settlement is final", "blocks", ge=1)] = 6


class Signer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    socket: Annotated[str, setting('socket of the signer; "": signer.sock in the state directory', "path")] = ""
    deadline_seconds: Annotated[float, setting("longest wait for one answer", "seconds", gt=0)] = 5.0
    show_seconds: Annotated[
        float, setting("so often the signer is shown payments that have grown; 0: never", "seconds", ge=0)
    ] = 300.0


class Chain(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    backend: Annotated[Literal["debug", "bitcoind", "electrum"], setting("who is asked about the chain")]
    url: Annotated[
        str, setting("http://host:port of bitcoind; tcp:// or ssl://host:port of an Electrum server", "URL")
    ] = ""
    credentials_file: Annotated[str, setting('bitcoind\'s .cookie, or a file "user:password"', "path")] = ""
    wallet: Annotated[str, setting("watch-only wallet that the server makes in bitcoind")] = "paychan"
    certificate_file: Annotated[
        str, setting("the Electrum server's certificate, if no authority signed it", "path")
    ] = ""
    timeout_seconds: Annotated[float, setting("longest wait for one answer", "seconds", gt=0)] = 10.0
    stale_tip_minutes: Annotated[
        int, setting("no payments while the newest block is older; 0: never mind", "min", ge=0)
    ] = 180


class Store(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Annotated[str, setting('directory of the LevelDB; "": store in the state directory', "path")] = ""
    commit_delay_ms: Annotated[float, setting("gather payments this long before each sync", "ms", ge=0, le=1000)] = 0.0
    max_waiting: Annotated[int, setting("payments beyond so many that wait for the disk are refused", ge=1)] = 10_000
    reserve_mb: Annotated[
        int,
        setting(
            "no new channels with less free disk, no payments with half of it; a quarter is kept for settling",
            "MB",
            ge=0,
        ),
    ] = 64
    backup_dir: Annotated[str, setting('where backups go; "": backups in the state directory', "path")] = ""


class Callback(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: Annotated[str, setting('application to ask about every payment; "": none', "URL")] = ""
    timeout_seconds: Annotated[float, setting("longest wait for its answer", "seconds", gt=0)] = 5.0
    unanswered: Annotated[
        Literal["settle", "drop"],
        setting("what becomes of a payment that it has not answered for when the server must settle"),
    ] = "settle"


class Management(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: Annotated[str, setting("address of the operator's interface")] = "127.0.0.1"
    port: Annotated[int, setting("port of the operator's interface", "TCP port", ge=0, le=65535)] = 8100


class Watcher(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    interval_seconds: Annotated[
        float, setting("time between two looks at expiries and settlements", "seconds", gt=0)
    ] = 30.0
    unsigned_minutes: Annotated[
        int, setting("alarm, and 503 of /health, when a settlement could not be signed for this long", "min", ge=0)
    ] = 10
    alarm_hours: Annotated[int, setting("alarm when a channel is unsettled this long before expiry", "hours", ge=0)] = 2


class Log(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Annotated[Literal["debug", "info", "warning", "error"], setting("least level that is written")] = "info"
    access: Annotated[bool, setting("one line per request")] = False


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything `paychan serve` is told."""

    network: Annotated[Literal["live", "test", "regtest"], setting("Bitcoin network of addresses and funding")]
    debug: Annotated[bool, setting("believe funding that follows from key and expiry; publish nothing")] = False
    state_directory: Annotated[str, setting('where data is kept; "": ./.paychan/<network>', "path")] = field(
        default="", name="state_dir"
    )
    http: Http = field(default_factory=Http)
    stream: Stream = field(default_factory=Stream)
    open: Open = field(default_factory=Open)
    channel: Channel = field(default_factory=Channel)
    settlement: Settlement = field(default_factory=Settlement)
    signer: Signer = field(default_factory=Signer)
    chain: Chain
    store: Store = field(default_factory=Store)
    callback: Callback = field(default_factory=Callback)
    management: Management = field(default_factory=Management)
    watcher: Watcher = field(default_factory=Watcher)
    log: Log = field(default_factory=Log)

    @property
    def bitcoin_network(self) -> Network:
        return Network(self.network)

    @property
    def network_name(self) -> str:
        """Name for people and directories: debug funding is a network of its own."""
        return "debug" if self.debug else self.network

    @property
    def state_dir(self) -> Path:
        return Path(self.state_directory or Path(".paychan") / self.network_name).resolve()

    @property
    def store_path(self) -> Path:
        return Path(self.store.path or self.state_dir / "store").resolve()

    @property
    def backup_dir(self) -> Path:
        return Path(self.store.backup_dir or self.state_dir / "backups").resolve()

    @property
    def signer_socket(self) -> Path:
        return Path(self.signer.socket or self.state_dir / "signer.sock").resolve()

    @property
    def management_token(self) -> Path:
        """File whose content allows changes through the management interface; made anew at every start."""
        return self.state_dir / "management.token"

    @property
    def port(self) -> int:
        """`http.port`, or PORT of the environment if that is a port."""
        override = os.environ.get("PORT", "")
        return int(override) if override.isascii() and override.isdigit() and int(override) < 65536 else self.http.port

    @property
    def v1_price_sat(self) -> Sat:
        fee = self.settlement.fee_sat_per_vb * TYPICAL_SETTLEMENT_BYTES if self.open.add_settlement_fee else 0
        return Sat(self.open.base_price_sat + fee)

    @property
    def rules(self) -> Rules:
        """What the channel machine needs to know, in its units."""
        return Rules(
            dust_sat=Sat(self.channel.dust_limit_sat),
            min_confirmations=self.open.min_confirmations,
            settlement_period_seconds=self.channel.settlement_period_hours * 3600,
            min_duration_seconds=self.open.min_duration_hours * 3600,
            fee_sat_per_vb=self.settlement.fee_sat_per_vb,
            asks_application=bool(self.callback.url),
            unanswered_counts=self.callback.unanswered == "settle",
            smaller=self.open.smaller,
            max_fee_sat_per_vb=self.settlement.max_fee_sat_per_vb,
            fee_share_percent=self.settlement.max_fee_percent,
            deadline_margin_seconds=self.settlement.margin_hours * 3600,
            longest_life_seconds=self._longest_life_seconds,
        )

    @property
    def opening_terms(self) -> OpeningTerms:
        """What new channels are asked for."""
        return OpeningTerms(
            v1_price_sat=self.v1_price_sat,
            v2_price_sat=Sat(self.open.v2_price_sat),
            min_confirmations=self.open.min_confirmations,
            smaller=self.open.smaller,
            least_life_seconds=3600 * (self.channel.settlement_period_hours + self.open.min_duration_hours),
            longest_life_seconds=self._longest_life_seconds,
        )

    @property
    def _longest_life_seconds(self) -> int:
        """The original's test programs ask a server in debug mode for any expiry (RBPCP §6.1)."""
        return 0 if self.debug else self.open.max_duration_hours * 3600


def load_server_config(path: Path) -> ServerConfig:
    """Read a server file.

    Raises:
        SettingsError: not readable, unknown key, wrong type, or settings that contradict each other.
    """
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(str(path), "", f"can't be read: {error}") from None
    config = parse_settings(text, ServerConfig, str(path))
    for key, reason in _contradictions(config):
        raise SettingsError(str(path), key, reason)
    return config


def _contradictions(config: ServerConfig) -> list[tuple[str, str]]:
    """List the combinations that would lose coins or can't work, as (key, reason)."""
    duration, period = config.open.min_duration_hours, config.channel.settlement_period_hours
    rows = [(row.up_to_sat, row.confirmations) for row in config.open.smaller]
    steps = [confirmations for _, confirmations in sorted(rows)] if rows == sorted(rows) else [1, 0]
    steps = [*steps, config.open.min_confirmations]
    needs_none, margin = 0 in steps, config.settlement.margin_hours
    checks = (
        (
            config.debug and config.network != "test",
            "debug",
            f'debug funding exists on the "test" network only, not on "{config.network}"',
        ),
        (
            config.debug != (config.chain.backend == "debug"),
            "chain.backend",
            f'"{config.chain.backend}" does not go with debug = {str(config.debug).lower()}',
        ),
        (
            list(steps) != sorted(steps) or any(row.confirmations < 0 for row in config.open.smaller),
            "open.smaller",
            "want rows with growing up_to_sat, none with less confirmations than the row before",
        ),
        (
            needs_none and not config.debug and not config.open.unconfirmed_limit_sat,
            "open.unconfirmed_limit_sat",
            "required where a funding output needs no confirmation: the most that may be at risk",
        ),
        (
            config.chain.backend != "debug" and not config.chain.url,
            "chain.url",
            f'required with backend = "{config.chain.backend}"',
        ),
        (
            config.chain.backend == "bitcoind" and not config.chain.credentials_file,
            "chain.credentials_file",
            'required with backend = "bitcoind": the path of its .cookie, or of a file with "user:password"',
        ),
        (
            config.settlement.fee_sat_per_vb > config.settlement.max_fee_sat_per_vb,
            "settlement.fee_sat_per_vb",
            f"{config.settlement.fee_sat_per_vb} sat/vB, more than settlement.max_fee_sat_per_vb",
        ),
        (
            margin >= period,
            "settlement.margin_hours",
            f"{margin} hours, not less than channel.settlement_period_hours = {period}: no time to settle in",
        ),
        (
            duration < period,
            "open.min_duration_hours",
            f"{duration} hours, less than channel.settlement_period_hours = {period}: no time to pay in",
        ),
        (
            0 < config.open.max_duration_hours < 2 * duration + period,
            "open.max_duration_hours",
            f"{config.open.max_duration_hours} hours, less than twice open.min_duration_hours and the settlement period",
        ),
    )
    return [(key, reason) for wrong, key, reason in checks if wrong]
