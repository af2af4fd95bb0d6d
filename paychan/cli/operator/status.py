"""The operator's commands: state of the server, its channels, closing. They use the management interface."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paychan.cli.operator.withdrawals import show_withdrawals
from paychan.cli.options import ConfigFile, find
from paychan.cli.terminal import JsonOption, fail, next_command, say, show_facts, show_json, show_table, whole
from paychan.shared.encoding import ReaderGone
from paychan.shared.layout import Column, Value
from paychan.shared.tls import verification
from paychan.shared.wording import moment, relative, sat

if TYPE_CHECKING:
    from paychan.config import ServerConfig

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

_OUTPOINT = re.compile(r"[0-9a-f]{64}:[0-9]{1,10}")
_OUTPOINT_BEGINS = re.compile(r"[0-9a-f]{1,64}(:[0-9]{1,10})?")
_MOST_CANDIDATES = 20

_TIMES = {"expires", "opened_at", "time", "median_time"}
_AMOUNTS = {"value_left", "funding_value", "value_received", "settlement_fee"}
"""Fields of a channel or a block that are Unix times, and those in satoshi."""

_COLOURS = {"ok": "green", "warning": "yellow", "critical": "red"}
_SECONDS = 30.0
_LONG_SECONDS = 600.0
"""For commands that sign and broadcast each of many channels before the answer."""

_ALARM_LETTERS = 240
"""Longest text of an alarm on its line."""

_UNKNOWN = 3
_EXIT_STATUS = {"ok": 0, "warning": 1, "critical": 2}
"""Exit status of `paychan status`, as of monitoring plugins (Nagios, Icinga); `_UNKNOWN`: the server can't be asked."""

STATUS_EXAMPLES = """[bold]Examples[/bold]

  paychan status config/debug/server.toml

  paychan status config/live/server.toml --backup-hours 26 --json
"""

WITHDRAW_EXAMPLES = """[bold]Examples[/bold]

  paychan withdraw config/live/server.toml TXID:VOUT

  paychan withdraw config/live/server.toml --above 1000000
"""


def _find_or_unknown(given: Path) -> Path:
    try:
        return find(given)
    except typer.Exit:
        raise typer.Exit(_UNKNOWN) from None


def status(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="server.toml or its directory, such as live", callback=_find_or_unknown),
    ],
    backup_hours: Annotated[
        int, typer.Option(min=0, help="Warn if the newest backup is older than this or missing; 0: never")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show channels by state, the amount at risk and the cost of settling it, and the health of all parts.

    Exit status for monitors: 0 without an alarm, 1 with a warning, 2 while payments are refused or coins are in danger, 3
    if the server can't be asked.
    """
    config = _config(file, _UNKNOWN)
    health = _ask(config, "GET", "/health", failed=_UNKNOWN)
    totals = _ask(config, "GET", "/totals", failed=_UNKNOWN)
    _judge_backup(health["backup"], backup_hours, health)
    with suppress(ReaderGone):  # a monitor that reads only the first line still gets the exit status
        if as_json:
            show_json({"status": health["status"], "health": health, "totals": totals})
        else:
            _show_status(health, totals)
    raise typer.Exit(_EXIT_STATUS[health["status"]])


def _judge_backup(newest: dict[str, Any], limit_hours: int, health: dict[str, Any]) -> None:
    """Add the age of the newest backup, and an alarm if it is older than the limit."""
    made = newest["created_at"]
    age = newest["age_seconds"] = None if made is None else max(0, int(time.time()) - made)
    if limit_hours and (age is None or age > 3600 * limit_hours):
        text = f"no backup within {limit_hours} h: {_backup_text(newest)}"
        health["alarms"].append({"kind": "backup", "text": text, "channel": "", "critical": False})
        health["status"] = "warning" if health["status"] == "ok" else health["status"]


def _show_status(health: Mapping[str, Any], totals: Mapping[str, Any]) -> None:
    _show_health(health)
    say("")
    _show_totals(totals)
    say("")
    _show_economy(totals, health["network"])
    for alarm in health["alarms"]:
        say(f"alarm  {_alarm_line(alarm)}", "red" if alarm["critical"] else "yellow")


def _alarm_line(alarm: Mapping[str, Any]) -> str:
    """Say an alarm in one short line: a channel once, and a long text without its end, which --json has."""
    channel, text = alarm["channel"], alarm["text"]
    concerned = f" {channel}" if channel and channel.partition(":")[0] not in text else ""
    short = text if len(text) <= _ALARM_LETTERS else f"{text[:_ALARM_LETTERS]}…; --json shows all of it"
    return f"{alarm['kind']}{concerned}: {short}"


@app.command(
    name="list", epilog="[bold]Example[/bold]\n\n  paychan channels list config/live/server.toml --state closing"
)
def list_channels(
    file: ConfigFile,
    state: Annotated[str, typer.Option(help="open, closing, published, closed, lost or unfunded")] = "open",
    limit: Annotated[int, typer.Option(help="Most channels to list, the earliest expiry first")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List the channels of a state."""
    channels = _ask(_config(file), "GET", f"/channels?state={state}&limit={limit}")["channels"]
    if as_json:
        show_json(channels)
        return
    if not channels:
        say(f"No {state} channels.")
        if state == "open":
            next_command("channels", "list", "FILE", "--state", "closed")
        return
    numbers = [Column(name, is_number=True) for name in ("expires", "received sat", "left sat", "later payments")]
    rows = [
        (
            channel["funding_source"],
            relative(channel["expires"] - time.time()),
            f"{channel['value_received']:,}",
            f"{channel['value_left']:,}",
            f"{channel['payments']:,}",
        )
        for channel in channels
    ]
    show_table([Column("channel (txid:vout)"), *numbers], rows)
    if len(channels) == limit:
        say(f"The first {limit:,} channels; --limit shows more.")
    say("Later payments: without the payment that opened the channel, which counts as received.")


@app.command(epilog="[bold]Example[/bold]\n\n  paychan channels deposits config/live/server.toml")
def deposits(file: ConfigFile, as_json: JsonOption = False) -> None:
    """List outputs at channels' addresses that the channels do not use: second, late and short deposits.

    They belong to the payers, who get them back with `paychan channel refund` after the expiry.
    """
    found = _ask(_config(file), "GET", "/deposits", seconds=_LONG_SECONDS)["deposits"]
    if as_json:
        show_json(found)
        return
    if not found:
        say("No deposits.")
        return
    numbers = [Column(name, is_number=True) for name in ("sat", "confirmations", "refundable")]
    rows = [
        (
            each["outpoint"],
            f"{each['value_sat']:,}",
            f"{each['confirmations']:,}",
            relative(each["refundable_at"] - time.time()),
            each["channel"],
        )
        for each in found
    ]
    show_table([Column("output (txid:vout)"), *numbers, Column("channel")], rows)


@app.command(epilog="[bold]Example[/bold]\n\n  paychan channels show config/live/server.toml TXID:VOUT")
def show(
    file: ConfigFile,
    outpoint: Annotated[str, typer.Argument(metavar="OUTPOINT", help="Funding outpoint, txid:vout, or its beginning")],
    as_json: JsonOption = False,
) -> None:
    """Show all details of one channel."""
    config = _config(file)
    _print_channel(_ask(config, "GET", f"/channels/{_path(config, outpoint)}"), as_json=as_json)


@app.command(epilog="[bold]Example[/bold]\n\n  paychan channels close config/live/server.toml TXID:VOUT")
def close(
    file: ConfigFile,
    outpoint: Annotated[str, typer.Argument(metavar="OUTPOINT", help="Funding outpoint, txid:vout, or its beginning")],
    as_json: JsonOption = False,
) -> None:
    """Close a channel: settle the newest payment now."""
    config = _config(file)
    _print_channel(_ask(config, "POST", f"/channels/{_path(config, outpoint)}/close"), as_json=as_json)
    if not as_json:
        next_command("channels", "show", "FILE", outpoint)


def withdraw(
    file: ConfigFile,
    outpoint: Annotated[
        str,
        typer.Argument(metavar="OUTPOINT", help="Funding outpoint, txid:vout, or its beginning", show_default=False),
    ] = "",
    above: Annotated[
        int, typer.Option(min=0, show_default=False, help="All channels that have received at least this many satoshi")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Settle the earnings of open channels and keep these open; payments wait until the withdrawal is deep in the chain.

    This works only for version 2 channels whose change goes back to their own funding address.
    """
    if bool(outpoint) == bool(above):
        fail("give a channel, txid:vout, or choose channels with --above SAT")
    config = _config(file)
    if outpoint:
        _print_channel(_ask(config, "POST", f"/channels/{_path(config, outpoint)}/withdraw"), as_json=as_json)
        if not as_json:
            next_command("channels", "show", "FILE", outpoint)
        return
    answer = _ask(config, "POST", f"/withdraw?above={above}", _LONG_SECONDS)
    if as_json:
        show_json(answer)
    else:
        show_withdrawals(answer)


def _config(file: Path, failed: int = 2) -> ServerConfig:
    from paychan.config import load_server_config
    from paychan.protocol.settings import SettingsError

    try:
        return load_server_config(file)
    except SettingsError as error:
        fail(str(error), status=failed, code="configuration")


def _ask(config: ServerConfig, method: str, path: str, seconds: float = _SECONDS, *, failed: int = 1) -> Any:
    """Send a request to the running server; a failure ends the command with a sentence and the exit status `failed`."""
    import httpx
    import msgspec

    from paychan.running import read_running

    running = read_running(config.state_dir)
    if running is None:
        reason = f"no server uses the state directory {config.state_dir}. Start it: `paychan serve FILE`"
        fail(reason, failed, code="no_server")
    try:
        token = config.management_token.read_text()
        headers = {"Authorization": f"Bearer {token}"}
        answer = httpx.request(
            method,
            running.management_url + path,
            headers=headers,
            timeout=seconds,
            trust_env=False,
            verify=verification(running.management_url),
        )
        body = msgspec.json.decode(answer.content)
    except (OSError, httpx.HTTPError, msgspec.MsgspecError) as error:
        reason = f"the server at {running.management_url} does not answer: {_why(error)}"
        fail(reason, failed, code="no_answer")
    if answer.is_error and "error" in body:
        status = _EXIT_STATUS.get(body.get("status", ""), failed)  # a server without its store or memory has one
        fail(str(body["error"]), status, code=str(body.get("code", "refused")))
    return body


def _why(error: Exception) -> str:
    """Say in words why a request to the management listener failed."""
    import httpx

    if isinstance(error, httpx.ConnectError):
        return "nothing listens there. It has stopped, or does not listen yet; `paychan serve FILE` starts it"
    if isinstance(error, httpx.TimeoutException):
        return "it was silent for too long; its log says what it does"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, httpx.HTTPError):
        return f"{str(error) or 'the connection ended'}; its log says more"
    return "what answers there is not the server"


def _show_health(health: Mapping[str, Any]) -> None:
    frozen, disk = "; ".join(health["frozen"]), health["disk"]
    problems = [task["problem"] for task in health["tasks"] if task["problem"]]
    waits = any(alarm["kind"] == "application" and not alarm["channel"] for alarm in health["alarms"])
    accepted = Value("accepted; see the alarm about the application", "yellow") if waits else Value("accepted", "green")
    show_facts(
        "",
        ("status", Value(health["status"], _COLOURS[health["status"]])),
        ("network", health["network"]),
        ("payments", Value(f"frozen: {frozen}", "red") if frozen else accepted),
        ("signer", health["signer"]),
        ("identity", whole(health["identity"])),
        *((name.replace("_", " "), _channel_fact(name, value)) for name, value in health.get("chain", {}).items()),
        ("disk", f"{disk['free_bytes']:,} bytes free; {disk['reserve_bytes']:,} are reserved for settling"),
        ("backup", whole(_backup_text(health["backup"]))),
        ("tasks", Value("; ".join(problems), "red") if problems else f"{len(health['tasks'])} work"),
    )


def _backup_text(newest: Mapping[str, Any]) -> str:
    """Describe the newest backup in the server's backup directory."""
    if newest["created_at"] is None:
        return f"none in {newest['directory']}"
    return f"{moment(newest['created_at'])}, {newest['channels']:,} channels, {newest['path']}"


def _show_totals(totals: Mapping[str, Any]) -> None:
    columns = Column("state"), Column("channels", is_number=True), Column("received sat", is_number=True)
    rows = [(state, f"{count:,}", f"{totals['received_sat'][state]:,}") for state, count in totals["channels"].items()]
    show_table(columns, rows)


def _show_economy(totals: Mapping[str, Any], network: str) -> None:
    """The amount at risk, the cost of settling it, and the reserve that could help to pay."""
    cost, estimate, reserve = totals["settling_sat"], totals["fee_estimate_sat_per_vb"], totals["reserve"]
    small = f"{totals['too_small_channels']:,} open channels of {sat(totals['too_small_sat'])}"
    rate = "no estimate" if estimate is None else f"{estimate:,} sat/vB"
    held = (
        Value(f"not known: {reserve['problem']}", "red")
        if reserve["problem"]
        else f"{sat(reserve['sat'])}, confirmed coins: {reserve['confirmed_coins']:,}"
    )
    show_facts(
        "",
        ("next expiry", moment(totals["next_expiry"]) if totals["next_expiry"] is not None else ""),
        ("unsettled", f"{sat(totals['unsettled_sat'])}; settling all of it now costs {sat(cost)}"),
        (
            "too small",
            f"{small}: they stay open until they have received more, or expire" if totals["too_small_channels"] else "",
        ),
        ("fee rate", f"{rate}, nothing is relayed below {totals['fee_floor_sat_per_vb']:,} sat/vB"),
        ("reserve", held),
        ("", "send no coins there, the debug key is public" if network == "debug" else ""),
        ("to fill it", f"pay to {reserve['address']}" if network != "debug" and reserve["address"] else ""),
    )


def _print_channel(channel: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(dict(channel))
        return
    show_facts("", *((name.replace("_", " "), _channel_fact(name, value)) for name, value in channel.items()))


def _channel_fact(name: str, value: Any) -> str:
    """A field of the management interface in words: times, amounts and counts in the style of all commands."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in _TIMES:
        return moment(value)
    return sat(value) if name in _AMOUNTS else f"{value:,}" if isinstance(value, int) else str(value)


def _path(config: ServerConfig, text: str) -> str:
    """Return the path of the channel whose txid:vout begins with a text.

    Ends the command if there is none, or if there are several, whose names are listed.
    """
    if not _OUTPOINT_BEGINS.fullmatch(text.lower()):
        fail(f"{text!r} is neither a channel, txid:vout, nor its beginning: hex digits", status=2)
    if not _OUTPOINT.fullmatch(text.lower()):
        text = _only(text, _ask(config, "GET", f"/channels?begins={text}&limit={_MOST_CANDIDATES + 1}", _LONG_SECONDS))
    return text.lower().replace(":", "/")


def _only(text: str, answer: Mapping[str, Any]) -> str:
    found = [channel["funding_source"] for channel in answer["channels"]]
    if not found:
        fail(f"no channel's txid:vout begins with {text}; `paychan channels list FILE` shows the open channels")
    if len(found) > 1:
        more = "\nand more" if len(found) > _MOST_CANDIDATES else ""
        fail(
            f"several channels begin with {text}: give more of one of these\n"
            + "\n".join(found[:_MOST_CANDIDATES])
            + more
        )
    return str(found[0])
