"""The server's settings, declared once: the comments of `config/*/server.toml` and the pages' table repeat them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from paychan.config_checks import contradictions
from paychan.protocol.channel import Depth, Rules
from paychan.protocol.settings import SettingsError, parse_settings, setting
from paychan.protocol.terms import OpeningTerms
from paychan.protocol.types import Network, Sat
from paychan.shared.mounts import store_place
from paychan.shared.places import Place, state_place
from paychan.shared.urls import port_trouble

MIN_DUST_SAT = 546
"""Smallest output that nodes relay for each type of script: a server names one limit, before it knows an address."""

TYPICAL_SETTLEMENT_BYTES = 331
"""Size that the original used for its opening price (RBPCP §7.3); the fee paid follows the real size."""


class Http(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: Annotated[str, setting("address on which the server accepts clients")] = "127.0.0.1"
    port: Annotated[int, setting("port; the environment variable PORT overrides it", "TCP port", ge=0, le=65535)] = 8000
    public_url: Annotated[str, setting('base of URLs, "https://pay.example"; "": from each request')] = ""
    trust_forwarded: Annotated[
        bool, setting("trust X-Forwarded-Proto, -Host, -For and Forwarded: only behind a proxy that sets them")
    ] = False
    fast_lane: Annotated[bool, setting("serve payments on the fast path; it is off while log.access is on")] = True
    max_body_bytes: Annotated[int, setting("largest request body", "bytes", ge=512)] = 4096
    max_header_bytes: Annotated[int, setting("largest request head", "bytes", ge=1024)] = 8192
    max_bad_signatures: Annotated[
        int,
        setting(
            "a bad signature or bad request delays its connection; at this number the connection is closed",
            "requests",
            ge=1,
        ),
    ] = 20
    asks_per_second: Annotated[
        int,
        setting(
            "requests for terms and openings per client address; a burst may be ten times that; 0: no limit",
            "1/s",
            ge=0,
        ),
    ] = 200
    idle_seconds: Annotated[int, setting("an idle keep-alive connection is closed after this", "seconds", ge=1)] = 75
    head_seconds: Annotated[
        int, setting("time for a connection's first request, and for each request head to arrive", "seconds", ge=1)
    ] = 10
    body_seconds: Annotated[int, setting("time for a request body to arrive", "seconds", ge=1)] = 10


class Stream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    coalesce: Annotated[
        bool, setting("when several payments of a channel wait, verify the newest first: it includes the others")
    ] = True
    max_streams: Annotated[int, setting("most streams at once", ge=0)] = 1000
    max_streams_per_channel: Annotated[
        int, setting("most streams of one channel; a further one closes that channel's longest idle stream", ge=1)
    ] = 8
    ping_seconds: Annotated[
        float, setting("time between two pings; a stream whose peer misses one is closed", "seconds", gt=0)
    ] = 20.0


class Open(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    base_price_sat: Annotated[int, setting("smallest first payment (v1), before the settlement fee", "sat", ge=0)] = (
        70_000
    )
    add_settlement_fee: Annotated[bool, setting("add the settlement's fee to v1's first payment")] = True
    v2_price_sat: Annotated[int, setting("smallest first payment (v2)", "sat", ge=0)] = 100_000
    min_confirmations: Annotated[int, setting("confirmations that a funding output needs", "blocks", ge=0)] = 6
    smaller: Annotated[
        tuple[Depth, ...],
        setting("fewer confirmations for small channels, such as [{up_to_sat = 100000, confirmations = 1}]"),
    ] = ()
    unconfirmed_limit_sat: Annotated[
        int, setting("largest total value of the channels whose funding has no confirmation", "sat", ge=0)
    ] = 0
    min_duration_hours: Annotated[int, setting("shortest time for payments before settling", "hours", ge=1)] = 12
    max_duration_hours: Annotated[int, setting("longest life of a new channel; 0: no limit", "hours", ge=0)] = 8784
    terms_hold_hours: Annotated[
        int, setting("after a change of terms, the earlier terms still open channels for this time", "hours", ge=0)
    ] = 24


class Channel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    dust_limit_sat: Annotated[int, setting("smallest change output, if a payment has one", "sat", ge=MIN_DUST_SAT)] = (
        700
    )
    settlement_period_hours: Annotated[int, setting("payments end at this time before expiry", "hours", ge=1)] = 6
    idle_seconds: Annotated[
        int, setting("a channel's actor stops after this time without messages", "seconds", ge=1)
    ] = 300


class Settlement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    fee_sat_per_vb: Annotated[int, setting("first fee rate if the chain backend has no estimate", "sat/vB", ge=1)] = 40
    max_fee_sat_per_vb: Annotated[int, setting("highest fee rate, paid at the deadline", "sat/vB", ge=1)] = 200
    max_fee_percent: Annotated[
        int, setting("largest part of a channel's received amount that may become fee", "%", ge=1, le=100)
    ] = 50
    margin_hours: Annotated[
        int, setting("target: settlements are confirmed this time before expiry", "hours", ge=0)
    ] = 2
    batch_seconds: Annotated[
        int, setting("longest wait of a closing channel for others, to settle together; 0: no wait", "seconds", ge=0)
    ] = 0
    batch_channels: Annotated[int, setting("most channels in one settlement", ge=2, le=200)] = 20
    withdraw_above_sat: Annotated[
        int, setting("withdraw a v2 channel's earnings at this amount and keep it open; 0: never", "sat", ge=0)
    ] = 0
    confirmations: Annotated[int, setting("depth at which a settlement is final", "blocks", ge=1)] = 6


class Signer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    socket: Annotated[str, setting('socket of the signer; "": signer.sock in the state directory', "path")] = ""
    deadline_seconds: Annotated[float, setting("longest wait for one answer of the signer", "seconds", gt=0)] = 5.0
    show_seconds: Annotated[
        float, setting("time between two reports of grown payments to the signer; 0: no reports", "seconds", ge=0)
    ] = 300.0


class Chain(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    backend: Annotated[Literal["debug", "bitcoind", "electrum"], setting("source of chain data")]
    url: Annotated[
        str, setting("http://host:port of bitcoind; tcp:// or ssl://host:port of an Electrum server", "URL")
    ] = ""
    credentials_file: Annotated[str, setting('bitcoind\'s .cookie, or a file "user:password"', "path")] = ""
    wallet: Annotated[str, setting("watch-only wallet that the server creates in bitcoind")] = "paychan"
    certificate_file: Annotated[
        str, setting("the Electrum server's certificate, if no certificate authority signed it", "path")
    ] = ""
    timeout_seconds: Annotated[float, setting("longest wait for one answer of the backend", "seconds", gt=0)] = 10.0
    stale_tip_minutes: Annotated[
        int, setting("no payments while the newest block is older than this; 0: no check", "min", ge=0)
    ] = 180


class Store(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: Annotated[str, setting('directory of the LevelDB; "": store in the state directory', "path")] = ""
    commit_delay_ms: Annotated[
        float, setting("time to collect payments before each write to disk", "ms", ge=0, le=1000)
    ] = 0.0
    max_waiting: Annotated[int, setting("most payments that wait for the disk", ge=1)] = 10_000
    reserve_mb: Annotated[
        int,
        setting(
            "no new channels below this free space, no payments below half of it; a quarter is reserved for settling",
            "MB",
            ge=0,
        ),
    ] = 256
    backup_dir: Annotated[str, setting('directory of the backups; "": backups in the state directory', "path")] = ""


class Callback(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: Annotated[str, setting('application that approves every payment; "": none', "URL")] = ""
    timeout_seconds: Annotated[float, setting("longest wait for the application's answer", "seconds", gt=0, le=10)] = (
        5.0
    )
    unanswered: Annotated[Literal["settle", "drop"], setting("what settling does with an unanswered payment")] = (
        "settle"
    )
    events: Annotated[bool, setting("tell about openings, closings, settlements and losses, too")] = True
    alarm_minutes: Annotated[int, setting("alarm after this time without an answer to messages", "min", ge=0)] = 10
    key_file: Annotated[
        str, setting('keys that sign the requests; "": callback.key in the state directory', "path")
    ] = ""


class Management(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: Annotated[str, setting("address of the operator's interface")] = "127.0.0.1"
    port: Annotated[int, setting("port of the operator's interface", "TCP port", ge=0, le=65535)] = 8100


class Gateway(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: Annotated[str, setting("address on which the gateway sells the answers of other services")] = "127.0.0.1"
    port: Annotated[int, setting("port of the gateway", "TCP port", ge=0, le=65535)] = 8080
    upstream: Annotated[
        str, setting('for a first try: service whose every answer has the price of price_sat; "": see prices', "URL")
    ] = ""
    price_sat: Annotated[int, setting("price of each request to upstream", "sat", ge=0)] = 0
    prices: Annotated[
        str, setting('price list, a TOML file (paychan/gateway/README.md); "": none; without both, no gateway', "path")
    ] = ""

    @property
    def is_on(self) -> bool:
        """Whether the server has a gateway: it sells something."""
        return bool(self.upstream or self.prices)


class Merchant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    on: Annotated[bool, setting("let sellers' programs charge payments (paychan/gateway/README.md)")] = False
    socket: Annotated[str, setting('socket for these programs; "": merchant.sock in the state directory', "path")] = ""
    socket_group: Annotated[
        str, setting('group whose members may connect to the socket, too; "": the server\'s user alone')
    ] = ""
    listen: Annotated[str, setting("address for programs that need a port; they send the token")] = "127.0.0.1"
    port: Annotated[int, setting("port for them; 0: none, the socket alone", "TCP port", ge=0, le=65535)] = 0
    token_file: Annotated[
        str, setting('token for the port, drawn at the first start; "": merchant.token in the state directory', "path")
    ] = ""
    lease_seconds: Annotated[
        float, setting("a program that has not answered a paid request by then is given up", "seconds", gt=0)
    ] = 120.0
    repeats: Annotated[int, setting("how often a paid and answered request is served again without a charge", ge=0)] = 2


class Watcher(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    interval_seconds: Annotated[
        float, setting("time between two scans of expiries and settlements", "seconds", gt=0)
    ] = 30.0
    unsigned_minutes: Annotated[
        int, setting("alarm, and /health answers 503, when signing a settlement has failed for this time", "min", ge=0)
    ] = 10
    alarm_hours: Annotated[
        int, setting("alarm when a channel is still unsettled at this time before expiry", "hours", ge=0)
    ] = 2


class Log(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Annotated[Literal["debug", "info", "warning", "error"], setting("lowest level that is written")] = "info"
    access: Annotated[bool, setting("one line per request")] = False


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of `paychan serve`."""

    network: Annotated[Literal["live", "test", "regtest"], setting("Bitcoin network of addresses and funding")]
    debug: Annotated[bool, setting("accept funding that is computed from key and expiry; broadcast nothing")] = False
    state_directory: Annotated[
        str,
        setting(
            'directory of all data; "": /var/lib/paychan/<network>, for debug and regtest ./.paychan/<network>', "path"
        ),
    ] = field(default="", name="state_dir")
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
    gateway: Gateway = field(default_factory=Gateway)
    merchant: Merchant = field(default_factory=Merchant)
    watcher: Watcher = field(default_factory=Watcher)
    log: Log = field(default_factory=Log)

    @property
    def bitcoin_network(self) -> Network:
        return Network(self.network)

    @property
    def network_name(self) -> str:
        """Name for messages and directories: debug funding counts as a network of its own."""
        return "debug" if self.debug else self.network

    @property
    def state_place(self) -> Place:
        """The state directory, and what is to be said about it."""
        return state_place(self.state_directory, self.network_name)

    @property
    def state_dir(self) -> Path:
        return self.state_place.directory

    @property
    def store_path(self) -> Path:
        """Directory of the store: `store.path`, or a directory below it if it is a mount point."""
        return store_place(Path(self.store.path or self.state_dir / "store").resolve())

    @property
    def backup_dir(self) -> Path:
        return Path(self.store.backup_dir or self.state_dir / "backups").resolve()

    @property
    def signer_socket(self) -> Path:
        return Path(self.signer.socket or self.state_dir / "signer.sock").resolve()

    @property
    def callback_keys(self) -> Path:
        """File with the keys that sign requests to the application; drawn at the first start with a callback."""
        return Path(self.callback.key_file or self.state_dir / "callback.key").resolve()

    @property
    def merchant_socket(self) -> Path:
        """Socket for sellers' programs, if `merchant.on`."""
        return Path(self.merchant.socket or self.state_dir / "merchant.sock").resolve()

    @property
    def merchant_token(self) -> Path:
        """File with the token for sellers' programs that come by the port; drawn at the first start with a port."""
        return Path(self.merchant.token_file or self.state_dir / "merchant.token").resolve()

    @property
    def management_token(self) -> Path:
        """File with the token of the management interface; written anew at every start."""
        return self.state_dir / "management.token"

    @property
    def port(self) -> int:
        """`http.port`, or the environment variable PORT if that is set; see `check_environment`."""
        override = os.environ.get("PORT", "")
        return int(override) if override and not port_trouble(override) else self.http.port

    @property
    def v1_price_sat(self) -> Sat:
        fee = self.settlement.fee_sat_per_vb * TYPICAL_SETTLEMENT_BYTES if self.open.add_settlement_fee else 0
        return Sat(self.open.base_price_sat + fee)

    @property
    def rules(self) -> Rules:
        """The settings that the channel state machine needs, in its units."""
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
        """The terms that new channels must meet."""
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
        """Zero (no limit) in debug mode: the original's test programs use any expiry there (RBPCP §6.1)."""
        return 0 if self.debug else self.open.max_duration_hours * 3600


def load_server_config(path: Path, gateway: Gateway | None = None) -> ServerConfig:
    """Read a server file. `gateway` replaces the file's `[gateway]`, for a first try from the command line.

    Raises:
        SettingsError: the file is not readable, has an unknown key or a wrong type, or its settings contradict each
        other.
    """
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(str(path), "", f"can't be read: {error}") from None
    config = parse_settings(text, ServerConfig, str(path))
    if gateway is not None:
        config = replace(config, gateway=gateway)
    for key, reason in contradictions(config):
        raise SettingsError(str(path), key, reason)
    return config


def check_environment() -> None:
    """Check the environment variable that a server reads; a command that only asks a server ignores it.

    Raises:
        SettingsError: PORT is set and is no port number.
    """
    override = os.environ.get("PORT", "")
    if override and port_trouble(override):
        source, reason = "the environment", f'"{override}": {port_trouble(override)}; or unset it'
        raise SettingsError(source, "PORT", reason)
