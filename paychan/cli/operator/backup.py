"""`paychan backup`: creates, verifies, lists, restores and removes backups of the server's channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paychan.cli.options import ConfigFile, find
from paychan.cli.terminal import (
    JsonOption,
    err,
    fail,
    next_command,
    say,
    show_facts,
    show_json,
    show_table,
    warn,
    whole,
)
from paychan.shared.configfiles import SERVER
from paychan.shared.layout import Cell, Column, Value
from paychan.shared.wording import moment, sat

if TYPE_CHECKING:
    import httpx

    from paychan.config import ServerConfig
    from paychan.store.backup.archive import BackupError, Manifest

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

BackupFile = Annotated[Path, typer.Argument(metavar="BACKUP", help="A file that ends in .backup")]
ToOption = Annotated[Path | None, typer.Option(help="Directory of the backup, instead of store.backup_dir")]
CopyToOption = Annotated[
    Path | None,
    typer.Option(
        help="Directory of the backup. A running server writes its backup to store.backup_dir all the same, and the "
        "directory gets a copy"
    ),
]


PlaceArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="server.toml or its directory, or a directory of backups")
]


def _find_first(given: Path) -> Path:
    """Find the settings; a backup in their place is the order of arguments of 0.1.0."""
    if given.suffix == ".backup":
        fail("the settings come first: `paychan backup restore FILE BACKUP`", 2)
    return find(given)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  paychan backup create config/live/server.toml\n\n"
    "  paychan backup create config/live/server.toml --to /mnt/usb"
)
def create(
    config_file: ConfigFile,
    to: CopyToOption = None,
    as_json: JsonOption = False,
) -> None:
    """Back up all channels at one moment, through the running server, or from its files when it is stopped."""
    from paychan.config import load_server_config
    from paychan.store.backup.create import check_directory

    with _sentences():
        config = load_server_config(config_file)
        if to is not None:
            check_directory(to)
        found = _from_server(config, to) or _from_store(config, to)
        _show("created", found[0], found[1], as_json=as_json)
        if not as_json:
            next_command("backup", "verify", found[0])


@app.command(epilog="[bold]Example[/bold]\n\n  paychan backup verify /var/lib/paychan/live/backups/*.backup")
def verify(
    files: Annotated[list[Path], typer.Argument(metavar="BACKUP...", help="Files that end in .backup")],
    as_json: JsonOption = False,
) -> None:
    """Read backups completely and check every byte; the exit status is 1 if one is damaged."""
    from paychan.store.backup import create as backup
    from paychan.store.backup.archive import BackupError, read_manifest

    found: list[dict[str, Any]] = []
    for file in files:
        try:
            with _progress("verifying", read_manifest(file).records) as progress:
                manifest = backup.verify(file, progress)
        except (BackupError, OSError) as error:
            found.append({"path": str(file), "code": "damaged", "error": _reason_of(error)})
            if not as_json:
                warn(f"paychan: {_reason_of(error)}")
        else:
            found.append(_facts(file, manifest))
            if not as_json:
                _show("good", file, manifest)
    if as_json:
        show_json(found)
    if any("error" in each for each in found):
        raise typer.Exit(1)


@app.command(
    epilog="[bold]Example[/bold]\n\n"
    "  paychan backup restore config/live/server.toml paychan-live-20260102T030405Z.backup"
)
def restore(
    config_file: Annotated[
        Path, typer.Argument(metavar="FILE", help="server.toml or its directory, such as live", callback=_find_first)
    ],
    file: BackupFile,
    as_json: JsonOption = False,
) -> None:
    """Verify a backup and create the server's store from it. The server must be stopped. A store is not overwritten.

    The backup lacks payments that were accepted later: use the newest one, and only if the store is lost.
    """
    from paychan.cli.operator.beside import running_server
    from paychan.config import load_server_config
    from paychan.parts import restored_messages
    from paychan.shared.holders import described
    from paychan.store.backup import create as backup
    from paychan.store.backup.archive import read_manifest

    with _sentences():
        config = load_server_config(config_file)
        running = running_server(config)
        if running is not None:
            fail(f"{config.state_dir} is in use by {described(running.pid)}: stop the server, then restore")
        with _progress("restoring", read_manifest(file).records) as progress:
            announce = restored_messages(config)
            manifest = backup.restore(file, config.store_path, config.network_name, progress, announce)
        _show("restored", config.store_path, manifest, as_json=as_json)
        if not as_json:
            say(f"Payments accepted after {moment(manifest.created_at)} are not in it.")
            next_command("serve", "FILE")


@app.command(epilog="[bold]Example[/bold]\n\n  paychan backup salvage config/live/server.toml")
def salvage(
    config_file: ConfigFile,
    to: ToOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a backup of all readable records of a damaged store, and list the losses. The store is not changed.

    For a channel whose newest record is lost, the backup may hold an older one: the signer, which knows the payments
    that it signed or saw, and the payers repair that. The exit status is 1 if records were lost.
    """
    import time

    from paychan.config import load_server_config
    from paychan.protocol.types import UnixTime
    from paychan.store.backup.create import check_directory
    from paychan.store.backup.salvage import salvage as write_readable

    with _sentences():
        config = load_server_config(config_file)
        check_directory(to or config.backup_dir)
        now = UnixTime(int(time.time()))
        with _progress("salvaging", None) as progress:
            found = write_readable(config.store_path, to or config.backup_dir, config.network_name, now, progress)
    losses = {"damaged record": found.damaged, "record lost": found.missing, "LevelDB dropped": found.notes}
    if as_json:
        named = {name.replace(" ", "_"): list(lines) for name, lines in losses.items()}
        show_json(_facts(found.path, found.manifest) | named | {"older": list(found.older)})
    else:
        _show("created", found.path, found.manifest)
        for kind, lines in losses.items():
            for line in lines:
                older = ": the backup holds an older one" if line in found.older else ""
                say(f"{kind} {line}{older}", "red")
        say(f"Move {config.store_path} away first.")
        next_command("backup", "restore", "FILE", found.path)
    if found.damaged or found.missing or found.notes:
        raise typer.Exit(1)


@app.command(
    "list",
    epilog="[bold]Examples[/bold]\n\n  paychan backup list config/live/server.toml\n\n  paychan backup list /mnt/usb",
)
def list_backups(
    place: PlaceArgument,
    as_json: JsonOption = False,
) -> None:
    """List backups, oldest first, with their own statements; `verify` checks whether these are true."""
    from paychan.store.backup import create as backup
    from paychan.store.backup.archive import BackupError

    with _sentences():
        directory, has_settings = _directory(place)
        found = backup.listing(directory)
        if as_json:
            show_json([_facts(path, manifest) for path, manifest in found])
            return
        rows: list[tuple[Cell, ...]] = []
        for path, manifest in found:
            if isinstance(manifest, BackupError):
                rows.append((whole(path.name), "", "", Value("damaged", "red")))
            else:
                numbers = f"{manifest.records:,}", f"{manifest.unsettled_sat:,}"
                rows.append((whole(path.name), *numbers, moment(manifest.created_at)))
        if not rows:
            file = "FILE" if has_settings else "SERVER.toml"
            fail(f"no backups in {directory}; `paychan backup create {file}` creates one")
        columns = Column("channels", is_number=True), Column("unsettled sat", is_number=True)
        show_table((Column("backup"), *columns, Column("created")), rows)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  paychan backup prune config/live/server.toml --keep 30\n\n"
    "  paychan backup prune /mnt/usb --keep 10"
)
def prune(
    place: PlaceArgument,
    keep: Annotated[int, typer.Option(min=1, help="Number of backups to keep: the newest of each network")],
    as_json: JsonOption = False,
) -> None:
    """Remove old backups. A damaged one is not counted and not removed: `verify` says what is wrong with it."""
    from paychan.store.backup import create as backup

    with _sentences():
        removed = backup.prune(_directory(place)[0], keep)
    if as_json:
        show_json({"removed": [str(path) for path in removed]})
        return
    for path in removed:
        say(f"removed {path}")
    if not removed:
        say("Nothing to remove.")


def _directory(place: Path) -> tuple[Path, bool]:
    """Return a directory of backups, and whether the argument is the settings that name it."""
    from paychan.config import load_server_config
    from paychan.store.backup.create import SUFFIX

    has_settings = not any(place.glob(f"*{SUFFIX}")) and (not place.is_dir() or (place / SERVER.name).exists())
    return (load_server_config(find(place)).backup_dir, True) if has_settings else (place, False)


# --- sources of a backup --------------------------------------------------------------------------------------------


def _from_server(config: ServerConfig, to: Path | None) -> tuple[Path, Manifest] | None:
    """Ask the running server, which locks its store; None if no server listens."""
    import httpx
    import msgspec

    from paychan.running import read_running
    from paychan.store.backup import create as backup
    from paychan.store.backup.archive import BackupError, Manifest

    running = read_running(config.state_dir)
    if running is None:
        return None
    try:
        token = config.management_token.read_text(encoding="ascii").strip()
        # a running server writes about 100,000 channels a second; it accepts a connection at once
        timeout = httpx.Timeout(600.0, connect=2.0)
        with err.status("the server is writing a backup"):
            reply = httpx.post(
                f"{running.management_url}/backups", headers={"Authorization": f"Bearer {token}"}, timeout=timeout
            )
    except (FileNotFoundError, httpx.ConnectError):
        return None
    except httpx.HTTPError as error:
        msg = f"the server at {running.management_url} gave no answer ({error}): read its log, then try again"
        raise BackupError(msg) from error
    if reply.status_code != httpx.codes.CREATED:
        msg = f"the server at {running.management_url} created no backup: {_reason(reply)}"
        raise BackupError(msg)
    made = msgspec.json.decode(reply.content)
    if to is None:
        return Path(made["path"]), msgspec.convert(made["manifest"], Manifest)
    return backup.copy(Path(made["path"]), to)


def _reason(reply: httpx.Response) -> str:
    """Return the text of an error answer: the server's have one, another program on that port may send anything."""
    try:
        return str(reply.json()["message"])
    except (ValueError, KeyError, TypeError):
        return f"{reply.status_code} {reply.text[:300].strip()}"


def _from_store(config: ServerConfig, to: Path | None) -> tuple[Path, Manifest]:
    import asyncio
    import time

    from paychan.protocol.types import UnixTime
    from paychan.store.backup import create as backup
    from paychan.store.leveldb.store import LevelDbStore

    store = LevelDbStore.open(config.store_path, config.network_name, create=False)
    now = UnixTime(int(time.time()))
    try:
        with _progress("backing up", None) as progress:
            return backup.create(store.snapshot, to or config.backup_dir, config.network_name, now, progress)
    finally:
        asyncio.run(store.close())


# --- output ---------------------------------------------------------------------------------------------------------


@contextmanager
def _sentences() -> Iterator[None]:
    """End the command with one sentence instead of a traceback."""
    import msgspec

    from paychan.protocol.settings import SettingsError
    from paychan.store.backup.archive import BackupError
    from paychan.store.base import StoreFailed

    try:
        yield
    except (BackupError, StoreFailed, SettingsError, msgspec.MsgspecError) as error:
        fail(str(error))
    except OSError as error:
        fail(_reason_of(error))


@contextmanager
def _progress(doing: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show the number of finished records, if the output is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("records"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda done: bar.update(task, completed=done)


def _facts(path: Path, manifest: Manifest | BackupError) -> dict[str, Any]:
    """The JSON of a backup: its path and manifest, or the reason why it can't be read."""
    import msgspec

    if isinstance(manifest, Exception):
        return {"path": str(path), "code": "damaged", "error": str(manifest)}
    return {"path": str(path), "manifest": msgspec.to_builtins(manifest)}


def _reason_of(error: Exception) -> str:
    """Return a sentence about a file that can't be used."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}; check the path and its permissions"
    return str(error)


def _show(done: str, path: Path, manifest: Manifest, *, as_json: bool = False) -> None:
    """Show the outcome of a command, and what a backup says of itself."""
    if as_json:
        show_json(_facts(path, manifest))
        return
    show_facts(
        f"{done} {path}",
        ("network", manifest.network),
        ("made", f"{moment(manifest.created_at)}, by paychan {manifest.paychan}"),
        ("channels", ", ".join(f"{count:,} {state}" for state, count in manifest.states.items())),
        ("unsettled", sat(manifest.unsettled_sat)),
    )
