"""The configurations that are part of the package: one directory per network, with server.toml and signer.toml."""

from __future__ import annotations

from pathlib import Path

NETWORKS = ("debug", "regtest", "test", "live")

_PACKAGE = Path(__file__).parent
_IN_WHEEL = _PACKAGE / "shipped"
"""`pyproject.toml` copies the repository's `config` to this directory when a wheel is built."""


def shipped_directory(network: str) -> Path | None:
    """Find the directory of a network's configuration; None if the name is no network.

    An installed wheel has the directory inside the package, a clone beside it.
    """
    if network not in NETWORKS:
        return None
    return (_IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent / "config") / network
