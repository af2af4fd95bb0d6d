"""`paychan settle`: settle a backup's channels without a server."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import structlog
import typer
from msgspec import Struct
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from paychan.chain.base import Chain, ChainFailed
from paychan.cli.operator.offline import Outcome, Result, Settler, sort_out, up_to_date
from paychan.cli.terminal import err, fail, out
from paychan.config import Chain as ChainSettings
from paychan.config import ServerConfig, Signer, load_server_config
from paychan.protocol.channel import Channel, View
from paychan.protocol.fees import ChainFees
from paychan.protocol.moment import paying_time
from paychan.protocol.settings import SettingsError
from paychan.protocol.types import Network, UnixTime
from paychan.running import read_running
from paychan.signer_client.base import SignerAbsent, SignerRefused
from paychan.signer_client.unix import UnixSigner
from paychan.store.backup import create as backup
from paychan.store.backup.archive import BackupError, Manifest, decoded, read_manifest, read_records

EXAMPLES = """[bold]Examples[/bold]

  paychan settle --offline NEWEST.backup --config config/live/server.toml

  paychan settle --offline NEWEST.backup --config config/live/server.toml --publish

  paychan settle --offline NEWEST.backup --signer signer.sock --network live --out transactions.txt
"""

_PATIENCE_SECONDS = 1.0
"""What takes longer shows how far it is."""

_CONNECT_SECONDS = 2.0

_OFFERED = (Outcome.SIGNED, Outcome.PUBLISHED, Outcome.REFUSED)
"""Outcomes whose settlement was made now."""

_SUMMED_UP = {
    Outcome.TOO_SMALL: "not worth settling, as less was received than the cheapest settlement costs",
    Outcome.CLOSED: "settled before the backup was made",
    Outcome.LOST: "lost before the backup was made, as something else spent the coins",
}
"""Outcomes that have one line together: nothing is to be seen of each."""

_NEXT = {
    Outcome.SIGNED: "Nothing was sent: --publish does it, or --out FILE and any node: bitcoin-cli sendrawtransaction HEX",
    Outcome.WAITING: "Some wait for a block already: --fee-rate SAT_PER_VB makes them dearer",
    Outcome.REFUSED: "Some were refused: --fee-rate SAT_PER_VB pays more, if that is the reason; then try again",
}


class Wish(Struct, frozen=True):
    """What was asked for on the command line."""

    file: Path
    config: ServerConfig
    source: str
    """Where the configuration is from; "": there is no file, and no chain."""
    fee_rate: int | None
    publish: bool


class Report(Struct, frozen=True):
    """What came of all channels of a backup, and the rate that settlements began with."""

    manifest: Manifest
    rate: str
    fates: list[Result]

    @property
    def transactions(self) -> list[str]:
        """The raw settlements made now, each once."""
        made = [fate.settlement for fate in self.fates if fate.settlement and fate.outcome in _OFFERED]
        return list(dict.fromkeys(settlement.transaction.hex() for settlement in made))


def settle(
    offline: Annotated[
        Path, typer.Option("--offline", help="The backup, best the newest: a file that ends in .backup")
    ],
    config_file: Annotated[
        Path | None, typer.Option("--config", help="The server's configuration: network, signer, chain, fee rules")
    ] = None,
    signer: Annotated[Path | None, typer.Option(help="The signer's socket, instead of the configured one")] = None,
    network: Annotated[str, typer.Option(help="Without --config: live, test, regtest or debug")] = "",
    fee_rate: Annotated[
        int | None, typer.Option(min=1, help="Satoshi per virtual byte. \\[default: what the server would pay now]")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Hand them to the network, by the configured chain")
    ] = False,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Write the raw transactions to a new file, one in hex per line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all, with the raw transactions, for programs")] = False,
) -> None:
    """Settle every channel of a backup without a server: for a machine whose disk died. The signer must be running.

    Nothing is sent without --publish. The same command may be given again: what is settled stays as it is.
    """
    with _sentences():
        if out_file is not None and out_file.exists():
            fail(f"{out_file} exists and is not overwritten: name another file")
        config, source = _configured(config_file, signer, network)
        if publish and not source:
            fail("--publish needs --config FILE, which says by which node", status=2)
        report = _settle(Wish(offline, config, source, fee_rate, publish))
        if out_file is not None:
            out_file.write_text("".join(f"{line}\n" for line in report.transactions), encoding="ascii")
        _print_json(report) if as_json else _print(report)
    if any(fate.outcome is Outcome.REFUSED for fate in report.fates):
        raise typer.Exit(1)


# --- what is given --------------------------------------------------------------------------------------------------


def _configured(file: Path | None, signer: Path | None, network: str) -> tuple[ServerConfig, str]:
    """Return the configuration and where it is from; without a file, what a server's defaults are."""
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
    """A server that runs takes payments that the backup has not."""
    running = read_running(config.state_dir)
    if running is None:
        return
    with contextlib.suppress(httpx.HTTPError, ValueError, TypeError, KeyError):
        answer = httpx.get(f"{running.management_url}/health", timeout=_CONNECT_SECONDS, trust_env=False)
        if answer.json()["network"] == config.network_name:
            fail(
                f"the server is running (process {running.pid}) and settles by itself: paychan status shows how, "
                "paychan channels close settles one. Or stop it first"
            )


def _read(file: Path, network: str) -> tuple[Manifest, list[Channel]]:
    with _progress("verifying", read_manifest(file).records) as progress:
        manifest = backup.verify(file, progress)
    if manifest.network != network:
        fail(f"{file} holds channels of the {manifest.network} network, not of {network}: give the matching one")
    return manifest, [decoded(file, raw) for raw in read_records(file)]


# --- doing it -------------------------------------------------------------------------------------------------------


def _settle(wish: Wish) -> Report:
    manifest, channels = _read(wish.file, wish.config.network_name)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    return asyncio.run(_settle_channels(wish, manifest, channels))


async def _settle_channels(wish: Wish, manifest: Manifest, channels: Sequence[Channel]) -> Report:
    async with contextlib.AsyncExitStack() as stack:
        signer = UnixSigner(wish.config.signer_socket, wish.config.signer.deadline_seconds)
        stack.push_async_callback(signer.close)
        await _check_signer(signer, wish.config.network_name)
        chain = await _chain(wish)
        if chain is not None:
            stack.push_async_callback(chain.close)
        now, fees = await _moment(chain)
        view = View(now, wish.config.rules)
        units, fates = sort_out(await up_to_date(channels, signer, view), view)
        settler = Settler(signer, chain if wish.publish else None, view, fees, wish.fee_rate)
        with _progress("settling", sum(len(unit.members) for unit in units)) as progress:
            fates += await settler.settle_all(units, progress)
    fates.sort(key=lambda fate: (fate.channel.terms.expiry, fate.channel.outpoint.serialize()))
    return Report(manifest, _rate(wish, fees), fates)


async def _check_signer(signer: UnixSigner, network: str) -> None:
    health = await signer.health()
    serves = "debug" if health.debug else health.network
    if serves != network:
        fail(f"the signer serves the {serves} network, not {network}: start the one of {network}")


async def _chain(wish: Wish) -> Chain | None:
    """Open the configured chain, where it is needed: to publish, or for its estimate."""
    if not wish.source or (wish.fee_rate and not wish.publish):
        return None
    from paychan.parts import StartError, open_chain  # noqa: PLC0415 - no other command needs the server

    try:
        return await open_chain(wish.config, wish.source)
    except StartError as error:
        if wish.publish:
            fail(f"{error}. Without --publish, --out FILE writes the transactions for any other node to send")
        err.print(f"[yellow]no estimate of fees:[/yellow] {escape(str(error))}", soft_wrap=True)
        return None


async def _moment(chain: Chain | None) -> tuple[UnixTime, ChainFees]:
    """The time by which fee rates rise (see `protocol.moment`), and what the chain says of fees."""
    now = UnixTime(int(time.time()))
    if chain is None:
        return now, ChainFees()
    median_time = (await chain.tip()).median_time
    return paying_time(max(now, median_time), median_time), await chain.fees()


def _rate(wish: Wish, fees: ChainFees) -> str:
    rules = wish.config.rules
    if wish.fee_rate:
        return f"{wish.fee_rate} sat/vB, as asked for"
    if fees.estimate_sat_per_vb is None:
        return f"{rules.fee_sat_per_vb} sat/vB as configured, more near the expiry; the chain has no estimate"
    return f"{fees.estimate_sat_per_vb} sat/vB, the chain's estimate, more near the expiry"


# --- what is shown --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """End the command with one sentence instead of a traceback."""
    try:
        yield
    except SignerAbsent as error:
        fail(f"no signer at {error}. Start it: paychan-signer SIGNER.toml")
    except SignerRefused as error:
        fail(f"the signer turns us away: {error}")
    except ChainFailed as error:
        fail(f"the chain can't be asked: {error}. What was published stays; then give the same command again")
    except (BackupError, SettingsError, msgspec.MsgspecError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; check the path and its permissions")


@contextlib.contextmanager
def _progress(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show channels done of all, once it has taken a while, and there is somebody to look."""
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
    shown = [fate for fate in report.fates if fate.outcome not in _SUMMED_UP]
    if shown:
        out.print(_table(shown))
    for outcome, text in _SUMMED_UP.items():
        found = [fate for fate in report.fates if fate.outcome is outcome]
        if found:
            out.print(f"{_sum(found)}: {text}")
    fees = {fate.settlement.txid: fate.settlement.fee_sat for fate in shown if fate.settlement}
    out.print(f"{_sum(shown)} above, for fees of {sum(fees.values()):,} sat; fee rate: {report.rate}")
    out.print(f"What was received after {_date(report.manifest.created_at)} is not in the backup.")
    for outcome, text in _NEXT.items():
        if any(fate.outcome is outcome for fate in shown):
            out.print(text, soft_wrap=True)


def _table(fates: Sequence[Result]) -> Table:
    table = Table()
    for name in ("channel (txid:vout)", "expires", "received sat", "fee sat", "what came of it", "by txid"):
        table.add_column(name, overflow="fold", justify="right" if name.endswith("sat") else "left")
    told = set[bytes]()
    for fate in fates:
        fee = "" if fate.settlement is None else f"{fate.settlement.fee_sat:,}" if fate.txid not in told else "together"
        told.add(fate.txid)
        table.add_row(
            str(fate.channel.outpoint),
            _date(fate.channel.terms.expiry),
            f"{fate.channel.received_sat:,}",
            fee,
            _story(fate),
            fate.txid[::-1].hex(),
        )
    return table


def _story(fate: Result) -> str:
    colour = {Outcome.REFUSED: "red", Outcome.REFUNDED: "red", Outcome.WAITING: "yellow"}.get(fate.outcome, "green")
    reason = f": {escape(fate.reason)}" if fate.reason else ""
    return f"[{colour}]{fate.outcome.value}[/{colour}]{reason}"


def _print_json(report: Report) -> None:
    channels = [
        {
            "channel": str(fate.channel.outpoint),
            "expires": fate.channel.terms.expiry,
            "received_sat": fate.channel.received_sat,
            "outcome": fate.outcome.value,
            "fee_sat": fate.settlement.fee_sat if fate.settlement else None,
            "txid": fate.txid[::-1].hex() or None,
            "reason": fate.reason or None,
        }
        for fate in report.fates
    ]
    facts = {"network": report.manifest.network, "made_at": report.manifest.created_at, "fee_rate": report.rate}
    out.print_json(data={**facts, "channels": channels, "transactions": report.transactions})


def _sum(fates: Sequence[Result]) -> str:
    received = sum(fate.channel.received_sat for fate in fates)
    return f"{len(fates):,} channel{'' if len(fates) == 1 else 's'} of {received:,} sat"


def _date(time: UnixTime) -> str:
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"
