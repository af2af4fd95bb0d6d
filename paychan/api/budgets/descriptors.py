"""The process's file descriptors: one sum, made once at start, in which every user of descriptors has its share.

    limit = reserved (store, chain, signer, application, log, listeners) + operator's connections + clients' connections

A client's connection counts twice on the fast lane: on a detour its socket is open a second time. What is reserved is more
than those parts open at once, so the store never fails to open a file because of connections.
"""

from __future__ import annotations

import resource

import structlog
from msgspec import Struct

from paychan.config import ServerConfig

log = structlog.get_logger("server")

_MOST_DESCRIPTORS = 1 << 20
"""Nothing here needs more; some systems' hard limit is unlimited, which is no number to divide."""

_BASE = 96
"""Standard streams, event loop, listeners, refused connections that still read their answer."""
_STORE = 48
"""Log, manifest, lock, tables of a compaction, a backup. LevelDB maps its first 1,000 tables and closes their files."""
_CHAIN = 8
"""Connections to the node and its notifications, or to an Electrum server."""
_SIGNER = 4
_APPLICATION = 100
"""httpx opens at most this many connections to the application."""
_MANAGEMENT = 16

_FEWEST = 4
"""With fewer connections for clients a start makes no sense."""


class TooFewDescriptors(Exception):
    """The limit leaves nothing for clients."""


class Descriptors(Struct, frozen=True):
    """Who may open how many."""

    limit: int
    reserved: int
    management: int
    clients: int


def raise_limit() -> int:
    """Raise this process's soft limit to its hard limit; return the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return min(soft, _MOST_DESCRIPTORS) if soft != resource.RLIM_INFINITY else _MOST_DESCRIPTORS


def divide(limit: int, config: ServerConfig) -> Descriptors:
    """Divide the limit among all users of descriptors.

    Raises:
        TooFewDescriptors: too few are left for clients.
    """
    application = _APPLICATION if config.callback.url else 0
    reserved = _BASE + _STORE + _CHAIN + _SIGNER + application
    each = 2 if config.http.fast_lane else 1
    clients = (limit - reserved - _MANAGEMENT) // each
    if clients < _FEWEST:
        need = reserved + _MANAGEMENT + _FEWEST * each
        msg = (
            f"this process may open {limit} files, and needs at least {need}. Raise the limit (ulimit -Hn, LimitNOFILE)"
        )
        raise TooFewDescriptors(msg)
    return Descriptors(limit, reserved, _MANAGEMENT, clients)
