"""Finds the server that runs for a state directory: some commands must not work beside it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from paychan.running import Running, read_running
from paychan.shared.holders import has_open
from paychan.shared.tls import verification

if TYPE_CHECKING:
    from paychan.config import ServerConfig

_CONNECT_SECONDS = 2.0


def running_server(config: ServerConfig) -> Running | None:
    """Return the server that runs for this state directory, even if its store was moved, or if it answers no request.

    `running.json` stays after a kill, and its process id may belong to another program now. So the process must have a
    store open, or answer for this network.
    """
    running = read_running(config.state_dir)
    if running is None:
        return None
    return running if _has_store(running) or _answers(running, config.network_name) else None


def _has_store(running: Running) -> bool:
    from paychan.store.leveldb.directory import LOCK_NAME

    return has_open(running.pid, LOCK_NAME)


def _answers(running: Running, network: str) -> bool:
    import httpx

    with contextlib.suppress(httpx.HTTPError, ValueError, TypeError, KeyError):
        answer = httpx.get(
            f"{running.management_url}/health",
            timeout=_CONNECT_SECONDS,
            trust_env=False,
            verify=verification(running.management_url),
        )
        return bool(answer.json()["network"] == network)
    return False
