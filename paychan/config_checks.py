"""Checks of a server's settings against each other, and of its paths, URLs and addresses."""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from paychan.shared.places import trouble_with_path
from paychan.shared.urls import host_trouble, url_trouble

if TYPE_CHECKING:
    from paychan.config import ServerConfig


_PASSWORD = re.compile(r"//[^/]*@")
"""User and password in a URL, which no sentence repeats."""


def contradictions(config: ServerConfig) -> list[tuple[str, str]]:
    """List the combinations that would lose coins or can't work, as (key, reason)."""
    duration, period = config.open.min_duration_hours, config.channel.settlement_period_hours
    rows = [(row.up_to_sat, row.confirmations) for row in config.open.smaller]
    steps = [confirmations for _, confirmations in sorted(rows)] if rows == sorted(rows) else [1, 0]
    steps = [*steps, config.open.min_confirmations]
    needs_none, margin = 0 in steps, config.settlement.margin_hours
    checks = (
        (
            config.debug and config.network != "test",
            "debug",
            f'debug funding exists on the "test" network only, not on "{config.network}"',
        ),
        (
            config.debug != (config.chain.backend == "debug"),
            "chain.backend",
            f'"{config.chain.backend}" does not go with debug = {str(config.debug).lower()}',
        ),
        (
            list(steps) != sorted(steps) or any(row.confirmations < 0 for row in config.open.smaller),
            "open.smaller",
            "the rows must have growing up_to_sat, and no row fewer confirmations than the row before",
        ),
        (
            needs_none and not config.debug and not config.open.unconfirmed_limit_sat,
            "open.unconfirmed_limit_sat",
            "required where a funding output needs no confirmation: the largest total value at risk",
        ),
        (
            config.chain.backend != "debug" and not config.chain.url,
            "chain.url",
            f'required with backend = "{config.chain.backend}"',
        ),
        (
            config.chain.backend == "bitcoind" and not config.chain.credentials_file,
            "chain.credentials_file",
            'required with backend = "bitcoind": the path of its .cookie, or of a file with "user:password"',
        ),
        (
            config.settlement.fee_sat_per_vb > config.settlement.max_fee_sat_per_vb,
            "settlement.fee_sat_per_vb",
            f"{config.settlement.fee_sat_per_vb} sat/vB, more than settlement.max_fee_sat_per_vb",
        ),
        (
            margin >= period,
            "settlement.margin_hours",
            f"{margin} hours, not less than channel.settlement_period_hours = {period}: leaves no time to settle",
        ),
        (
            duration < period,
            "open.min_duration_hours",
            f"{duration} hours, less than channel.settlement_period_hours = {period}: leaves no time for payments",
        ),
        (
            0 < config.open.max_duration_hours < 2 * duration + period,
            "open.max_duration_hours",
            f"{config.open.max_duration_hours} hours, less than twice open.min_duration_hours and the settlement period",
        ),
    )
    return _wrong_places(config) + _wrong_addresses(config) + [(key, reason) for wrong, key, reason in checks if wrong]


def doubts(config: ServerConfig) -> list[tuple[str, str]]:
    """List the settings that work but are seldom meant, as (key, reason): the server warns of them at its start."""
    found = list[tuple[str, str]]()
    for key, listen, who in (
        ("management.listen", config.management.listen, "the operator's interface"),
        ("merchant.listen", config.merchant.listen, "the merchant interface"),
    ):
        if not _is_loopback(listen):
            reason = f"{listen} is not a loopback address: other machines reach {who}, without encryption"
            found.append((key, reason))
    alarm, period = config.watcher.alarm_hours, config.channel.settlement_period_hours
    if alarm > period:
        reason = f"{alarm} hours, more than channel.settlement_period_hours = {period}: the alarm would come while payments go on"
        found.append(("watcher.alarm_hours", reason))
    return found


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address.lower() == "localhost"


def _wrong_addresses(config: ServerConfig) -> list[tuple[str, str]]:
    """List the URLs and addresses that no server, node or application can have."""
    chain, http, troubles = config.chain, config.http, list[tuple[str, str, str]]()
    if "@" in chain.url:  # the sentence must not repeat the password
        return [
            (
                "chain.url",
                "it names a user: want http://host:port, and user:password in the file of chain.credentials_file",
            )
        ]
    if chain.url and chain.backend == "bitcoind":
        troubles.append(("chain.url", chain.url, url_trouble(chain.url, ("http", "https"), path=True)))
    if chain.url and chain.backend == "electrum":
        troubles.append(("chain.url", chain.url, url_trouble(chain.url, ("ssl", "tcp"), needs_port=True)))
    for key, url, query in (("callback.url", config.callback.url, True), ("http.public_url", http.public_url, False)):
        if url:
            troubles.append((key, url, url_trouble(url, ("https", "http"), path=True, query=query)))
    for key, address in (
        ("http.listen", http.listen),
        ("management.listen", config.management.listen),
        ("gateway.listen", config.gateway.listen),
        ("merchant.listen", config.merchant.listen),
    ):
        troubles.append((key, address, host_trouble(address)))
    backend = f', as backend = "{chain.backend}" needs it'
    return _wrong_gateway(config) + [
        (key, f'"{_PASSWORD.sub("//…@", text)}": {trouble}' + (backend if key == "chain.url" else ""))
        for key, text, trouble in troubles
        if trouble
    ]


def _wrong_gateway(config: ServerConfig) -> list[tuple[str, str]]:
    """List what contradicts itself in `[gateway]`; the price list has checks of its own."""
    gateway, shown = config.gateway, _PASSWORD.sub("//…@", config.gateway.upstream)
    trouble = url_trouble(gateway.upstream, ("http", "https"), path=True) if gateway.upstream else ""
    if "@" in gateway.upstream:
        trouble = "want a URL without user and password"
    is_file = not gateway.prices or not Path(gateway.prices).is_dir()
    checks = (
        (
            gateway.upstream and gateway.prices,
            "gateway.upstream",
            "the price list of gateway.prices names the upstreams: want one of both",
        ),
        (
            gateway.upstream and not gateway.price_sat,
            "gateway.price_sat",
            "required with gateway.upstream: a price of at least 1 sat",
        ),
        (
            gateway.price_sat and not gateway.upstream,
            "gateway.price_sat",
            "want gateway.upstream, too: the price is for its answers alone",
        ),
        (trouble, "gateway.upstream", f'"{shown}": {trouble}'),
        (not is_file, "gateway.prices", f'"{gateway.prices}": want a file, this is a directory'),
    )
    return [(key, reason) for wrong, key, reason in checks if wrong]


def _wrong_places(config: ServerConfig) -> list[tuple[str, str]]:
    place, store = config.state_place, config.store
    paths = (
        ("state_dir", config.state_directory),
        ("store.path", store.path),
        ("store.backup_dir", store.backup_dir),
    )
    troubles = [(key, trouble_with_path(path, config.network_name)) for key, path in paths]
    troubles += [
        (key, f'"{path}": want a directory, this is a file')
        for key, path in paths[1:]
        if os.path.exists(path) and not os.path.isdir(path)  # noqa: PTH110, PTH112 - no error if it is out of reach
    ]
    if config.chain.wallet in (".", "..") or re.search(r"[/\\]", config.chain.wallet):
        reason = f'"{config.chain.wallet}": want a name without "/" and "\\": the node makes a directory of this name'
        troubles.append(("chain.wallet", reason))
    troubles += [("state_dir", place.note)] if place.is_doubtful else []
    return [(key, reason) for key, reason in troubles if reason]
