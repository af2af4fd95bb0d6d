"""Funded channels for a load: with debug funding, or with coins of a regtest node's wallet."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from coincurve import PrivateKey
from session import CHANNEL_SECONDS, OPENING_SAT, Funded, Server, stop

from paychan.chain.base import ChainFailed
from paychan.chain.bitcoind.rpc import JsonRpc
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.kinds.base import ChannelTerms, make_terms
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime

FIXED_CLIENT_KEY = bytes.fromhex("03da3afe4f58992a8cc909522c2ec859ef218fd92fda0a67c23fb40e0303030405")
FIXED_EXPIRY = UnixTime(1_500_000_000)
"""The original asks for the server's key with these values; in debug mode the key is the same for all channels."""

LEFT_SAT = 1_000_000
"""Change after the last payment; far above the dust limit."""

BLOCKS = 6
"""Default depth that a server requires of its funding."""

_PATIENCE_SECONDS = 30.0

_any: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Any)


@dataclass(frozen=True)
class Node:
    """A regtest node, a file with its "user:password", and one of its wallets that has coins."""

    url: str
    credentials: Path
    wallet: str


def from_nothing(server: Server, wanted_key: str | None, clients: int, version: int) -> list[Funded]:
    """Fund channels in debug mode: the outputs follow from keys and expiry. Raises BenchError."""
    server_key = ask_server_key(server, version, wanted_key, FIXED_CLIENT_KEY, FIXED_EXPIRY)
    expiry, funded = UnixTime(int(time.time()) + CHANNEL_SECONDS), []
    for _ in range(clients):
        key = PrivateKey()
        terms = make_terms(server_key, key.public_key.format(), expiry)
        funded.append(Funded(key, terms, debug_outpoint(terms.client_key, expiry), DEBUG_FUNDING_SAT))
    return funded


def by_node(server: Server, wanted_key: str | None, clients: int, version: int, count: int, node: Node) -> list[Funded]:
    """Pay to all channels with one real transaction; return once the server sees it deep enough. Raises BenchError."""
    expiry, keys = UnixTime(int(time.time()) + CHANNEL_SECONDS), [PrivateKey() for _ in range(clients)]
    public_keys = [key.public_key.format() for key in keys]
    terms = [make_terms(ask_server_key(server, version, wanted_key, key, expiry), key, expiry) for key in public_keys]
    value_sat = Sat(OPENING_SAT + count + LEFT_SAT)
    try:
        outpoints = asyncio.run(_pay(node, [each.funding_address(Network.REGTEST) for each in terms], value_sat))
    except ChainFailed as error:
        stop(str(error))
    for each in terms:
        _wait_until_deep(server, each)
    return [Funded(*each, value_sat) for each in zip(keys, terms, outpoints, strict=True)]


def ask_server_key(server: Server, version: int, wanted: str | None, client_key: bytes, expiry: UnixTime) -> bytes:
    """Read the server's key for a channel from its funding info."""
    path = f"/v2/funding/{expiry}/{client_key.hex()}/info"
    if version == 1:
        path = f"/v1/fundingInfo?client_pubkey={client_key.hex()}&exp_time={expiry}"
    key = str(_get(server, path)["server_pubkey"])
    if wanted not in (None, key):
        stop(f"server key differs: got {key}, want {wanted}")
    return bytes.fromhex(key)


async def _pay(node: Node, addresses: list[str], sat: Sat) -> list[OutPoint]:
    """Pay `value_sat` to each address, mine, and return the outputs in the order of the addresses."""
    rpc = JsonRpc(node.url, node.credentials, _PATIENCE_SECONDS)
    coins = f"{sat // 100_000_000}.{sat % 100_000_000:08d}"
    try:
        txid = await rpc.call(_any, "sendmany", "", dict.fromkeys(addresses, coins), wallet=node.wallet)
        paid = await rpc.call(_any, "gettransaction", txid, True, True, wallet=node.wallet)
        await rpc.call(_any, "generatetoaddress", BLOCKS, await rpc.call(_any, "getnewaddress", wallet=node.wallet))
    finally:
        await rpc.close()
    at = {out["scriptPubKey"].get("address"): out["n"] for out in paid["decoded"]["vout"]}
    return [OutPoint.parse(txid, at[address]) for address in addresses]


def _wait_until_deep(server: Server, terms: ChannelTerms) -> None:
    path = f"/v2/funding/{terms.expiry.lock_time}/{terms.client_key.hex()}/outputs"
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not any(out["confirmations"] >= out["confirmations_needed"] for out in _get(server, path)["outputs"]):
        if time.monotonic() > deadline:
            stop("the server does not see its funding deep enough: is it on the same node?")
        time.sleep(0.1)


def _get(server: Server, path: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except OSError as error:
        stop(f"no answer from {server.host}:{server.port}: {error}")
    finally:
        connection.close()
    if answer.status != 200:
        stop(f"GET {path}: {answer.status} {answer.reason}")
    found: dict[str, Any] = json.loads(body)
    return found
