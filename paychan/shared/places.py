"""Directories in which data is kept if none is named: where the platform keeps such data, not below the current directory.

A start from another directory must find the same data. Data that an earlier version keeps in an old place is used there.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from paychan.shared.called import quoted

STATE_HOME = Path("/var/lib/paychan")
"""Filesystem Hierarchy Standard 3.0, section 5.8: state of a program, which survives its end and a reboot."""

_TRIALS = ("debug", "regtest")
"""Networks without coins: their data may be removed together with the directory of a trial."""

_OLD_STATE_HOME, _OLD_WALLET = Path(".paychan"), Path("~/.paychan/wallet")


class Place(NamedTuple):
    """A directory, and a sentence for the operator about an old place; "" if there is nothing to say."""

    directory: Path
    note: str = ""
    is_doubtful: bool = False
    """Two places have data: only the operator knows which is the right one."""


def state_place(configured: str, network: str) -> Place:
    """Return the directory of a server's and a signer's data: the configured one, or that of the network."""
    if configured:
        return Place(Path(configured).resolve())
    old = (_OLD_STATE_HOME / network).resolve()
    if network in _TRIALS:
        return Place(old)
    usual = STATE_HOME / network
    if not _has_data(old):
        return Place(usual)
    if _has_data(usual):
        return Place(usual, f"both {usual} and {old} have data: name the right one here", is_doubtful=True)
    note = f"data is in {old}, where earlier versions kept it, and is used there: move it to {usual}, or set state_dir"
    return Place(old, note)


def how_to_make(directory: Path) -> str:
    """Return the remedy for a state directory that this user can't make."""
    nearest = next(each for each in (directory, *directory.parents) if os.path.exists(each))  # noqa: PTH110 - no error
    if not os.path.isdir(nearest):  # noqa: PTH112 - no error if a directory above is closed to this user
        return f"{nearest} is a file: name a directory in state_dir"
    return f"As root, `install -d -m 700 -o {quoted(_user(), directory)}` makes it for this user; or change state_dir"


def is_usable(directory: Path) -> bool:
    """Say whether this user can make the directory, or write to it."""
    nearest = next(each for each in (directory, *directory.parents) if each.exists())
    return os.access(nearest, os.W_OK | os.X_OK)


def _user() -> str:
    """Return the name of this user, or the number if it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def trouble_with_path(path: str, network: str) -> str:
    """Return why a configured path can't be used for data with coins, or "": it depends on the current directory."""
    if not path or network in _TRIALS or Path(path).is_absolute():
        return ""
    return (
        f'"{path}" depends on the directory of the start, and another one would have no data: "{Path(path).resolve()}"'
    )


def wallet_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Return the directory of a payer's channels (XDG Base Directory Specification 0.8: user-specific data).

    Raises:
        RuntimeError: the environment names no such directory, and the user has no home directory.
    """
    data_home = environment.get("XDG_DATA_HOME", "")
    usual = (
        (Path(data_home) if Path(data_home).is_absolute() else Path("~/.local/share").expanduser())
        / "paychan"
        / "wallet"
    )
    try:
        old = _OLD_WALLET.expanduser()
    except RuntimeError:
        return Place(usual)
    if not _has_data(old):
        return Place(usual)
    if _has_data(usual):
        return Place(usual, f"{old} has channels too: --wallet {old} or PAYCHAN_WALLET names it")
    return Place(
        old, f"the wallet is in {old}, where earlier versions kept it, and is used there; its new place is {usual}"
    )


def _has_data(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except OSError:
        return False
