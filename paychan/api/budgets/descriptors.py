"""The budget of the process's file descriptors, computed once at start; each user of descriptors has a share.

    limit = reserved (store, chain, signer, application, log, listeners) + operator's connections + clients' connections

A client's connection counts twice, because the fallback opens its socket a second time. The reserved
number is larger than those parts need at once, so that connections never keep the store from opening a file.
"""

from __future__ import annotations

import resource

import structlog
from msgspec import Struct

from paychan.config import ServerConfig

log = structlog.get_logger("server")

_MOST_DESCRIPTORS = 1 << 20
"""Upper bound, also if the system's hard limit is unlimited."""

_BASE = 96
"""Standard streams, event loop, listeners, and refused connections whose client still reads the answer."""
_STORE = 48
"""Log, manifest, lock, tables of a compaction, a backup. LevelDB maps its first 1,000 tables and closes their files."""
_CHAIN = 8
"""Connections to the node and its notifications, or to an Electrum server."""
_SIGNER = 4
_APPLICATION = 100
"""httpx opens at most this many connections to the application."""
_MANAGEMENT = 16

_PER_CLIENT = 2

_FEWEST = 4
"""The server does not start with fewer client connections."""


class TooFewDescriptors(Exception):
    """The limit leaves too few descriptors for clients."""


class Descriptors(Struct, frozen=True):
    """The share of each user, in descriptors; `clients` in connections."""

    limit: int
    reserved: int
    management: int
    clients: int
    gateway: int = 0
    """Connections of the gateway's clients; each may have one to an upstream, too."""


def raise_limit() -> int:
    """Raise the soft limit of this process to its hard limit, at most to `_MOST_DESCRIPTORS`; return the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return min(soft, _MOST_DESCRIPTORS) if soft != resource.RLIM_INFINITY else _MOST_DESCRIPTORS


def divide(limit: int, config: ServerConfig) -> Descriptors:
    """Divide the limit among all users of descriptors.

    Raises:
        TooFewDescriptors: fewer than `_FEWEST` connections are left for clients.
    """
    application = _APPLICATION if config.callback.url else 0
    reserved = _BASE + _STORE + _CHAIN + _SIGNER + application
    clients = (limit - reserved - _MANAGEMENT) // _PER_CLIENT
    if clients < _FEWEST:
        need = reserved + _MANAGEMENT + _FEWEST * _PER_CLIENT
        msg = (
            f"this process may open {limit} files, and needs at least {need}. Raise the limit (ulimit -Hn, LimitNOFILE)"
        )
        raise TooFewDescriptors(msg)
    if config.gateway.is_on:
        return Descriptors(limit, reserved, _MANAGEMENT, clients - clients // 2, clients // 2)
    return Descriptors(limit, reserved, _MANAGEMENT, clients)
