"""Settle a backup's channels without a server, for `paychan settle`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog
import typer
from msgspec import Struct
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from actors.settling.backup_units import Outcome, Result, sort_out, up_to_date
from actors.settling.offline import Settler
from paychan.chain.base import Chain, ChainFailed
from paychan.cli.operator.beside import running_server
from paychan.cli.terminal import err, fail, say, show_json, show_table
from paychan.config import Chain as ChainSettings
from paychan.config import ServerConfig, Signer, load_server_config
from paychan.protocol.address import encode_address
from paychan.protocol.channel import Channel, View
from paychan.protocol.fees import ChainFees
from paychan.protocol.moment import paying_time
from paychan.protocol.settings import SettingsError
from paychan.protocol.types import Network, UnixTime
from paychan.shared.called import quoted
from paychan.shared.layout import Column, Value
from paychan.shared.wording import clock, moment, sat
from paychan.signer_client.base import SignerAbsent, SignerRefused
from paychan.signer_client.unix import UnixSigner
from paychan.store.backup import create as backup
from paychan.store.backup.archive import BackupError, Manifest, decoded, read_manifest, read_records

_PATIENCE_SECONDS = 1.0
"""An operation that takes longer shows its progress."""

_OFFERED = (Outcome.SIGNED, Outcome.PUBLISHED, Outcome.REFUSED)
"""Outcomes with a settlement from this run."""

_NEW = (Outcome.PLANNED, Outcome.SIGNED, Outcome.PUBLISHED, Outcome.REFUSED)
"""Outcomes whose fee this run plans or offers."""

_SUMMED_UP = {
    Outcome.TOO_SMALL: "not worth settling: they received less than the cheapest settlement costs",
    Outcome.CLOSED: "settled before the backup was made",
    Outcome.LOST: "lost before the backup was made: another transaction spent the coins",
}
"""Outcomes that share one line, because their channels have no details."""

_NEXT = {
    Outcome.PLANNED: "Channels that are planned: nothing was signed or broadcast; the signer's limits may lower these fees. "
    "--publish signs and broadcasts; --sign signs, and the server that runs next closes the channels",
    Outcome.SIGNED: "Channels that are signed: nothing was broadcast, but the signer remembers its signatures, and the "
    "server that runs next closes the channels. Use --publish, or --sign --out FILE and any node: bitcoin-cli "
    "sendrawtransaction HEX",
    Outcome.WAITING: "Some already wait for a block: --fee-rate SAT_PER_VB raises their fees",
    Outcome.REFUSED: "Some were refused. If the fee is the reason, --fee-rate SAT_PER_VB raises it; then try again",
}


class SettleOptions(Struct, frozen=True):
    """The options of the command line."""

    file: Path
    config: ServerConfig
    source: str
    """Path of the configuration; "": no file, and no chain."""
    fee_rate: int | None
    publish: bool
    sign: bool


class Report(Struct, frozen=True):
    """The results of all channels of a backup, and the first fee rate of settlements."""

    manifest: Manifest
    rate: str
    results: list[Result]
    network: Network

    @property
    def transactions(self) -> list[str]:
        """The raw settlements of this run, without duplicates."""
        made = [result.settlement for result in self.results if result.settlement and result.outcome in _OFFERED]
        return list(dict.fromkeys(settlement.transaction.hex() for settlement in made))

    def destination(self, result: Result) -> str:
        """The address to which a planned settlement would pay; "": it is not only planned."""
        return encode_address(result.plan.destination_script, self.network) if result.plan else ""


def run(
    offline: Path,
    config_file: Path | None,
    signer: Path | None,
    network: str,
    fee_rate: int | None,
    out_file: Path | None,
    *,
    sign: bool,
    publish: bool,
    as_json: bool,
) -> None:
    """Settle the channels of the backup `offline`, and print the report; see `paychan.cli.operator.settle_command`."""
    with _sentences(config_file):
        if out_file is not None and out_file.exists():
            fail(f"{out_file} exists and is not overwritten: give another file")
        if out_file is not None and not (sign or publish):
            fail("--out writes signed transactions: add --sign. The signer remembers what it signs", status=2)
        config, source = _configured(config_file, signer, network)
        if publish and not source:
            fail("--publish needs --config FILE, which names the node", status=2)
        report = _settle(SettleOptions(offline, config, source, fee_rate, publish, sign or publish))
        if out_file is not None:
            out_file.write_text("".join(f"{line}\n" for line in report.transactions), encoding="ascii")
        _print_json(report) if as_json else _print(report)
    if any(result.outcome is Outcome.REFUSED for result in report.results):
        raise typer.Exit(1)


# --- options --------------------------------------------------------------------------------------------------------


def _configured(file: Path | None, signer: Path | None, network: str) -> tuple[ServerConfig, str]:
    """Return the configuration and its path; without a file, a server's defaults."""
    if file is not None:
        config = load_server_config(file)
        _refuse_beside(config)
        if signer is not None:
            config = msgspec.structs.replace(config, signer=msgspec.structs.replace(config.signer, socket=str(signer)))
        return config, str(file)
    names = [each.value for each in Network] + ["debug"]
    if signer is None or network not in names:
        fail(f"give --config FILE, or both --signer SOCKET and --network NAME ({', '.join(names)})", status=2)
    debug = network == "debug"
    nowhere, at = ChainSettings(backend="debug"), Signer(socket=str(signer))
    bitcoin: Any = "test" if debug else network
    return ServerConfig(network=bitcoin, debug=debug, chain=nowhere, signer=at), ""


def _refuse_beside(config: ServerConfig) -> None:
    """Refuse to run beside a running server: it accepts payments that the backup lacks."""
    running = running_server(config)
    if running is not None:
        fail(
            f"the server is running (process {running.pid}) and settles by itself: `paychan status FILE` shows the "
            "progress, `paychan channels close FILE TXID:VOUT` settles one channel. Or stop the server first"
        )


def _read(file: Path, network: str) -> tuple[Manifest, list[Channel]]:
    with _progress("verifying", read_manifest(file).records) as progress:
        manifest = backup.verify(file, progress)
    if manifest.network != network:
        fail(f"{file} holds channels of the {manifest.network} network, not of {network}: give the matching backup")
    return manifest, [decoded(file, raw) for raw in read_records(file)]


# --- settling -------------------------------------------------------------------------------------------------------


def _settle(options: SettleOptions) -> Report:
    manifest, channels = _read(options.file, options.config.network_name)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    return asyncio.run(_settle_channels(options, manifest, channels))


async def _settle_channels(options: SettleOptions, manifest: Manifest, channels: Sequence[Channel]) -> Report:
    async with contextlib.AsyncExitStack() as stack:
        signer = UnixSigner(options.config.signer_socket, options.config.signer.deadline_seconds)
        stack.push_async_callback(signer.close)
        await _check_signer(signer, options.config.network_name)
        chain = await _chain(options)
        if chain is not None:
            stack.push_async_callback(chain.close)
        now, fees = await _moment(chain)
        view = View(now, options.config.rules)
        units, results = sort_out(await up_to_date(channels, signer, view), view)
        settler = Settler(signer, chain, view, fees, options.fee_rate, signs=options.sign, publishes=options.publish)
        doing = "settling" if options.sign else "planning"
        with _progress(doing, sum(len(unit.members) for unit in units)) as progress:
            results += await settler.settle_all(units, progress)
    results.sort(key=lambda result: (result.channel.terms.expiry.lock_time, result.channel.outpoint.serialize()))
    return Report(manifest, _rate(options, fees), results, Network(options.config.network))


async def _check_signer(signer: UnixSigner, network: str) -> None:
    health = await signer.health()
    serves = "debug" if health.debug else health.network
    if serves != network:
        fail(f"the signer serves the {serves} network, not {network}: start the signer of {network}")


async def _chain(options: SettleOptions) -> Chain | None:
    """Open the configured chain: for what was settled since the backup, its fee estimate, and to broadcast."""
    if not options.source:
        return None
    from paychan.parts import StartError, open_chain

    try:
        return await open_chain(options.config, options.source)
    except StartError as error:
        if options.publish:
            fail(
                f"{error}. Instead of --publish, --sign --out FILE writes the transactions for broadcast by any other node"
            )
        unknown = "what was settled since the backup is not known, and there is no fee estimate"
        err.print(f"[yellow]{unknown}:[/yellow] {escape(str(error))}", soft_wrap=True)
        return None


async def _moment(chain: Chain | None) -> tuple[UnixTime, ChainFees]:
    """Return the time that determines how far fee rates rise (see `protocol.moment`), and the chain's fees."""
    now = UnixTime(int(time.time()))
    if chain is None:
        return now, ChainFees()
    median_time = (await chain.tip()).median_time
    return paying_time(max(now, median_time), median_time), await chain.fees()


def _rate(options: SettleOptions, fees: ChainFees) -> str:
    rules = options.config.rules
    if options.fee_rate:
        return f"{options.fee_rate} sat/vB, as requested"
    if fees.estimate_sat_per_vb is None:
        return f"{rules.fee_sat_per_vb} sat/vB as configured, more near the expiry; the chain has no estimate"
    return f"{fees.estimate_sat_per_vb} sat/vB, the chain's estimate, more near the expiry"


# --- output ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _sentences(config_file: Path | None) -> Iterator[None]:
    """End the command with one sentence instead of a traceback."""
    signer_settings = quoted(config_file.parent) if config_file else "signer.toml"
    try:
        yield
    except SignerAbsent as error:
        fail(f"no signer at {error}. Start it: `paychan-signer {signer_settings}`")
    except SignerRefused as error:
        fail(f"the signer refuses: {error}")
    except ChainFailed as error:
        fail(f"the chain can't be read: {error}. Broadcasts so far remain valid; repeat the same command later")
    except (BackupError, SettingsError, msgspec.MsgspecError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; check the path and its permissions")


@contextlib.contextmanager
def _progress(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the number of finished channels after the first second, if the output is a terminal."""
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("channels"), TimeElapsedColumn())
    bar = Progress(*columns, console=err, transient=True)
    task, begun = bar.add_task(doing, total=total), time.monotonic()

    def show(done: int) -> None:
        bar.update(task, completed=done)
        if err.is_terminal and time.monotonic() - begun > _PATIENCE_SECONDS:
            bar.start()

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


def _print(report: Report) -> None:
    shown = [result for result in report.results if result.outcome not in _SUMMED_UP]
    if shown:
        _show_results(shown)
    for outcome, text in _SUMMED_UP.items():
        found = [result for result in report.results if result.outcome is outcome]
        if found:
            say(f"{_sum(found)}: {text}")
    new = [result for result in shown if result.outcome in _NEW]
    fees = {_transaction(result): _fee_sat(result) for result in new}
    if new:
        say(f"{_sum(new)} to settle, for fees of {sat(sum(fees.values()))}; fee rate: {report.rate}")
    if len(new) < len(shown):
        say(f"{_sum([result for result in shown if result not in new])} above need no new settlement, and no fee")
    destinations = dict.fromkeys(filter(None, map(report.destination, shown)))
    if destinations:
        say(f"Planned settlements would pay to {', '.join(destinations)}")
    say(f"Payments received after {moment(report.manifest.created_at)} are not in the backup.")
    for outcome, text in _NEXT.items():
        if any(result.outcome is outcome for result in shown):
            say(text)


def _show_results(results: Sequence[Result]) -> None:
    columns = (
        Column("channel (txid:vout)"),
        Column("expires"),
        Column("received sat", is_number=True),
        Column("fee sat", is_number=True),
        Column("outcome"),
        Column("by txid"),
    )
    rows, shown = [], set[object]()
    for result in results:
        fee = ""
        if _fee_sat(result):
            fee = f"{_fee_sat(result):,}" if _transaction(result) not in shown else "together"
        shown.add(_transaction(result))
        rows.append(
            (
                str(result.channel.outpoint),
                clock(result.channel.terms.expiry.unix_time),
                f"{result.channel.received_sat:,}",
                fee,
                _described(result),
                result.txid[::-1].hex(),
            )
        )
    show_table(columns, rows)


def _transaction(result: Result) -> object:
    """Return the key of a result's transaction: its txid, or the first channel of a planned one."""
    return result.plan.first if result.plan is not None else result.txid


def _fee_sat(result: Result) -> int:
    """Return the fee that this run plans or offers; 0 for a channel that needs no new settlement."""
    paid = result.settlement or result.plan
    return paid.fee_sat if paid is not None and result.outcome in _NEW else 0


def _described(result: Result) -> Value:
    colour = {
        Outcome.REFUSED: "red",
        Outcome.REFUNDED: "red",
        Outcome.WAITING: "yellow",
        Outcome.PLANNED: "yellow",
    }.get(result.outcome, "green")
    number = result.confirmations
    depth = f"{number:,} confirmation{'' if number == 1 else 's'}" if number else ""
    return Value(": ".join(filter(None, (result.outcome.value, result.reason or depth))), colour)


def _print_json(report: Report) -> None:
    channels = [
        {
            "channel": str(result.channel.outpoint),
            "expires": result.channel.terms.expiry.lock_time,
            "received_sat": result.channel.received_sat,
            "outcome": result.outcome.value,
            "fee_sat": _fee_sat(result) or None,
            "destination": report.destination(result) or None,
            "txid": result.txid[::-1].hex() or None,
            "confirmations": result.confirmations or None,
            "reason": result.reason or None,
        }
        for result in report.results
    ]
    facts = {"network": report.manifest.network, "made_at": report.manifest.created_at, "fee_rate": report.rate}
    show_json({**facts, "channels": channels, "transactions": report.transactions})


def _sum(results: Sequence[Result]) -> str:
    received = sum(result.channel.received_sat for result in results)
    return f"{len(results):,} channel{'' if len(results) == 1 else 's'} of {received:,} sat"
