"""The operator's commands: state of the server, its channels, closing. They use the management interface."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from paychan.cli.terminal import fail, out

if TYPE_CHECKING:
    from paychan.config import ServerConfig

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

_SECONDS = 30.0
_LONG_SECONDS = 600.0
"""For commands that sign and broadcast each of many channels before the answer."""

STATUS_EXAMPLES = "[bold]Example[/bold]\n\n  paychan status config/debug/server.toml"

WITHDRAW_EXAMPLES = """[bold]Examples[/bold]

  paychan withdraw config/live/server.toml TXID:VOUT

  paychan withdraw config/live/server.toml --above 1000000
"""

ConfigFile = Annotated[Path, typer.Argument(help="The server's configuration, such as config/live/server.toml")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON")]


def status(file: ConfigFile, as_json: AsJson = False) -> None:
    """Show channels by state, the amount at risk and the cost of settling it, and the health of chain and signer."""
    config = _config(file)
    health, totals = _ask(config, "GET", "/health"), _ask(config, "GET", "/totals")
    if as_json:
        out.print_json(data={"health": health, "totals": totals})
        return
    out.print(_health_table(health), _totals_table(totals))
    if totals["next_expiry"] is not None:
        out.print(f"next expiry  {_moment(totals['next_expiry'])}")
    out.print(_economy_table(totals, health["network"]))
    for alarm in health["alarms"]:
        concerned = f" {alarm['channel']}" if alarm["channel"] else ""
        out.print(f"[red]alarm[/red]        {alarm['kind']}{concerned}: {escape(alarm['text'])}", soft_wrap=True)


@app.command(
    name="list", epilog="[bold]Example[/bold]\n\n  paychan channels list config/live/server.toml --state closing"
)
def list_channels(
    file: ConfigFile,
    state: Annotated[str, typer.Option(help="open, closing, published, closed, lost or unfunded")] = "open",
    limit: Annotated[int, typer.Option(help="Most channels to list, the earliest expiry first")] = 100,
    as_json: AsJson = False,
) -> None:
    """List the channels of a state."""
    channels = _ask(_config(file), "GET", f"/channels?state={state}&limit={limit}")["channels"]
    if as_json:
        out.print_json(data=channels)
        return
    table = Table(title=f"{state} channels")
    table.add_column("channel (txid:vout)", overflow="fold")
    for name in ("expires", "received sat", "left sat", "payments"):
        table.add_column(name, justify="right")
    for channel in channels:
        table.add_row(
            channel["funding_source"],
            _distance(channel["expires"]),
            f"{channel['value_received']:,}",
            f"{channel['value_left']:,}",
            f"{channel['payments']:,}",
        )
    out.print(table)


@app.command(epilog="[bold]Example[/bold]\n\n  paychan channels deposits config/live/server.toml")
def deposits(file: ConfigFile, as_json: AsJson = False) -> None:
    """List outputs at channels' addresses that the channels do not use: second, late and short deposits.

    They belong to the payers, who get them back with `paychan channel refund` after the expiry.
    """
    found = _ask(_config(file), "GET", "/deposits", seconds=_LONG_SECONDS)["deposits"]
    if as_json:
        out.print_json(data=found)
        return
    table = Table(title="deposits")
    table.add_column("output (txid:vout)", overflow="fold")
    for name in ("sat", "confirmations", "refundable"):
        table.add_column(name, justify="right")
    table.add_column("channel", overflow="fold")
    for each in found:
        value, depth = f"{each['value_sat']:,}", f"{each['confirmations']:,}"
        table.add_row(each["outpoint"], value, depth, _distance(each["refundable_at"]), each["channel"])
    out.print(table)


@app.command(epilog="[bold]Example[/bold]\n\n  paychan channels show config/live/server.toml TXID:VOUT")
def show(
    file: ConfigFile,
    outpoint: Annotated[str, typer.Argument(help="Funding outpoint, txid:vout")],
    as_json: AsJson = False,
) -> None:
    """Show all details of one channel."""
    _print_channel(_ask(_config(file), "GET", f"/channels/{_path(outpoint)}"), as_json=as_json)


@app.command(epilog="[bold]Example[/bold]\n\n  paychan channels close config/live/server.toml TXID:VOUT")
def close(
    file: ConfigFile,
    outpoint: Annotated[str, typer.Argument(help="Funding outpoint, txid:vout")],
    as_json: AsJson = False,
) -> None:
    """Close a channel: settle the newest payment now."""
    _print_channel(_ask(_config(file), "POST", f"/channels/{_path(outpoint)}/close"), as_json=as_json)


def withdraw(
    file: ConfigFile,
    outpoint: Annotated[str, typer.Argument(help="Funding outpoint, txid:vout", show_default=False)] = "",
    above: Annotated[
        int, typer.Option(min=0, show_default=False, help="All channels that have received at least this many satoshi")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Settle the earnings of open channels and keep these open; payments wait until the withdrawal is deep in the chain.

    This works only for version 2 channels whose change goes back to their own funding address.
    """
    if bool(outpoint) == bool(above):
        fail("give a channel, txid:vout, or choose channels with --above SAT")
    config = _config(file)
    if outpoint:
        _print_channel(_ask(config, "POST", f"/channels/{_path(outpoint)}/withdraw"), as_json=as_json)
        return
    answer = _ask(config, "POST", f"/withdraw?above={above}", _LONG_SECONDS)
    if as_json:
        out.print_json(data=answer)
    else:
        _print_withdrawals(answer)


def _print_withdrawals(answer: Mapping[str, Any]) -> None:
    table = Table("channel (txid:vout)", "withdrawn sat", "outcome")
    table.columns[0].overflow = "fold"
    table.columns[1].justify = "right"
    for channel in answer["channels"]:
        went = (
            f"continues at {channel['moved_to']}" if channel["moved_to"] else f"moves by {channel['settlement_txid']}"
        )
        table.add_row(channel["funding_source"], f"{channel['value_received']:,}", went)
    for refusal in answer["refused"]:
        table.add_row(refusal["channel"], "", f"[red]{escape(refusal['error'])}[/red]")
    out.print(table if table.rows else "No channel to withdraw from.")
    if answer["not_withdrawable"]:
        out.print(
            f"{answer['not_withdrawable']:,} more can't continue: their change goes elsewhere, or only the opening payment was made."
        )


def _config(file: Path) -> ServerConfig:
    from paychan.config import load_server_config
    from paychan.protocol.settings import SettingsError

    try:
        return load_server_config(file)
    except SettingsError as error:
        fail(str(error), status=2)


def _ask(config: ServerConfig, method: str, path: str, seconds: float = _SECONDS) -> Any:
    """Send a request to the running server; any failure ends the command with a sentence."""
    import httpx
    import msgspec

    from paychan.running import read_running

    running = read_running(config.state_dir)
    if running is None:
        fail(f"no server uses the state directory {config.state_dir}. Start it: paychan serve FILE")
    try:
        token = config.management_token.read_text()
        headers = {"Authorization": f"Bearer {token}"}
        answer = httpx.request(method, running.management_url + path, headers=headers, timeout=seconds, trust_env=False)
        body = msgspec.json.decode(answer.content)
    except (OSError, httpx.HTTPError, msgspec.MsgspecError) as error:
        fail(f"the server at {running.management_url} does not answer ({type(error).__name__}). Is it running?")
    if answer.is_error and "error" in body:
        fail(str(body["error"]))
    return body


def _health_table(health: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    frozen = "; ".join(health["frozen"])
    table.add_row("[dim]network[/dim]", health["network"])
    table.add_row("[dim]payments[/dim]", f"[red]frozen: {frozen}[/red]" if frozen else "[green]accepted[/green]")
    table.add_row("[dim]signer[/dim]", health["signer"])
    for name, value in health.get("chain", {}).items():
        table.add_row(f"[dim]{name}[/dim]", str(value))
    return table


def _totals_table(totals: Mapping[str, Any]) -> Table:
    table = Table("state", "channels", "received sat")
    for state, count in totals["channels"].items():
        table.add_row(state, f"{count:,}", f"{totals['received_sat'][state]:,}")
    return table


def _economy_table(totals: Mapping[str, Any], network: str) -> Table:
    """The amount at risk, the cost of settling it, and the reserve that could help to pay."""
    table = Table.grid(padding=(0, 2))
    cost, estimate, reserve = totals["settling_sat"], totals["fee_estimate_sat_per_vb"], totals["reserve"]
    table.add_row("[dim]unsettled[/dim]", f"{totals['unsettled_sat']:,} sat; settling all of it now costs {cost:,} sat")
    if totals["too_small_channels"]:
        small = f"{totals['too_small_channels']:,} open channels of {totals['too_small_sat']:,} sat"
        table.add_row("[dim]too small[/dim]", f"{small}: they stay open until they have received more, or expire")
    rate = "no estimate" if estimate is None else f"{estimate:,} sat/vB"
    table.add_row("[dim]fee rate[/dim]", f"{rate}, nothing is relayed below {totals['fee_floor_sat_per_vb']:,} sat/vB")
    coins = f"{reserve['sat']:,} sat, confirmed coins: {reserve['confirmed_coins']:,}" if not reserve["problem"] else ""
    held = coins or f"[red]not known: {escape(reserve['problem'])}[/red]"
    if network == "debug":
        held += "; send no coins there, the debug key is public"
    elif reserve["address"]:
        held += f"; to fill it, pay to {reserve['address']}"
    table.add_row("[dim]reserve[/dim]", held)
    return table


def _print_channel(channel: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        out.print_json(data=dict(channel))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in channel.items():
        shown = _moment(value) if name in ("expires", "opened_at") else "" if value is None else str(value)
        table.add_row(f"[dim]{name.replace('_', ' ')}[/dim]", shown)
    out.print(table)


def _path(outpoint: str) -> str:
    txid, colon, vout = outpoint.partition(":")
    if not colon:
        fail(f"{outpoint}: expected txid:vout")
    return f"{txid}/{vout}"


def _moment(unix: int) -> str:
    """Local time, and its distance from now."""
    return f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(unix))} ({_distance(unix)})"


def _distance(unix: int) -> str:
    away = unix - int(time.time())
    hours, minutes = divmod(abs(away) // 60, 60)
    distance = f"{hours // 24} d {hours % 24} h" if hours > 48 else f"{hours} h {minutes} min"
    return f"in {distance}" if away > 0 else f"{distance} ago"
