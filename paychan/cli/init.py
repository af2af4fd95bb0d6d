"""`paychan init`: writes the shipped configuration of a network, for the operator to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paychan.cli.terminal import fail, next_command, say, show_facts, whole
from paychan.shared.configfiles import NETWORKS, shipped_directory
from paychan.shared.places import how_to_make, is_usable

EXAMPLES = """[bold]Examples[/bold]

  paychan init regtest

  paychan init live /etc/paychan
"""

_FILES = ("signer.toml", "server.toml")


def init(
    network: Annotated[str, typer.Argument(metavar="NETWORK", help="debug, regtest, test or live")],
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIRECTORY]", help="Directory to write to. \\[default: a directory named like the network]"
        ),
    ] = None,
) -> None:
    """Write signer.toml and server.toml for a network into a directory. Existing files are not changed."""
    source = shipped_directory(network)
    if source is None:
        fail(f"no network {network!r}: choose one of {', '.join(NETWORKS)}", status=2)
    target = directory or Path(network)
    taken = [str(target / name) for name in _FILES if (target / name).exists()]
    if taken:
        fail(f"{taken[0]} exists and was not changed. Choose another directory, or edit that file", status=2)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            (target / name).write_text((source / name).read_text())
    except OSError as error:
        fail(f"can't write to {target}: {error.strerror}. Choose another directory", status=2)
    show_facts("", *(("Wrote", whole(target / name)) for name in _FILES))
    if network in ("test", "live"):
        from paychan.config import load_server_config

        _say_how_to_make(load_server_config(target / "server.toml").state_dir)
        say("Edit both files first.")
        next_command("init", target, program="paychan-signer")
    else:
        next_command("up", target)


def _say_how_to_make(state_dir: Path) -> None:
    """Say where the data will be, and how the directory is made if this user can't make it."""
    say(f"The data will be in {state_dir}.")
    if not is_usable(state_dir):
        say(how_to_make(state_dir))
