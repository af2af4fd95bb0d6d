"""The chain's backends for the contract suite: a node, and a way to open a backend on it.

Also the transactions that both sides of a real channel may broadcast.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from paychan.chain.base import Chain, ChainFailed, Funding, Payee
from paychan.chain.bitcoind.chain import BitcoindChain
from paychan.chain.electrum.chain import ElectrumChain
from paychan.protocol.kinds.refund import Refund, sign_refund
from paychan.protocol.payment import sign_payment
from paychan.protocol.settlement import Claim, Coin, Reserve, Settlement, sign_child, sign_settlement
from paychan.protocol.types import Network, Sat, UnixTime
from tests.lib.channels import SERVER_DESTINATION, Payer, private_key
from tests.lib.electrumx import ElectrumX
from tests.lib.node import Node

DAY_SECONDS = 86_400
PAST = UnixTime(1_400_000_000)
"""Expiry of channels whose refund is already valid; earlier than any block mined here."""
FUNDING_SAT = Sat(12_345_679)
FEE_SAT = Sat(2_000)
PATIENCE_SECONDS = 90.0
OLD = Payer("funded before the watch")
DESTINATION_KEY = private_key("server destination")
RESERVE_KEY = private_key("reserve")

_SMALL_MEMPOOL = "-maxmempool=5"

_T = TypeVar("_T")


class World(Protocol):
    """A node that the test controls, and the servers between it and the backend. Its chain begins two days ago."""

    node: Node
    tells_replacement_cost: bool

    def open(self) -> Chain:
        """Create a backend on the node: the first one, or another one as after a restart of the server."""


class BitcoindWorld:
    """A full node with transaction index and ZMQ."""

    flags: tuple[str, ...] = ("-txindex=1", _SMALL_MEMPOOL)
    zmq = True
    tells_replacement_cost = True

    def __init__(self, directory: Path) -> None:
        self.node = Node(directory, *self.flags, zmq=self.zmq, born=int(time.time()) - 2 * DAY_SECONDS)

    def __enter__(self) -> Self:
        self.node.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.node.__exit__(kind, error, traceback)

    def open(self) -> Chain:
        return BitcoindChain(self.node.url, Network.REGTEST, credentials=self.node.credentials)


class PrunedBitcoindWorld(BitcoindWorld):
    """The smallest node that operators run: pruned, no index, no notifications."""

    flags = ("-prune=550", _SMALL_MEMPOOL)
    zmq = False


class _RememberingNode(Node):
    """Keeps its newest blocks when killed: ElectrumX follows only a longer branch, and no peer sends lost blocks again."""

    def kill(self) -> None:
        if self._process is not None:
            self.rpc("gettxoutsetinfo", "none")  # makes the node write its state to disk
        super().kill()


class ElectrumXWorld:
    """An Electrum server on a node with the transaction index that it needs."""

    tells_replacement_cost = False

    def __init__(self, directory: Path) -> None:
        born = int(time.time()) - 2 * DAY_SECONDS
        flags = ("-txindex=1", _SMALL_MEMPOOL)
        self.node = _RememberingNode(directory / "node", *flags, zmq=False, login="electrumx:secret", born=born)
        self._server = ElectrumX(self.node, directory / "electrumx")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.node)
            stack.enter_context(self._server)
            self._running = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._running.close()

    def open(self) -> Chain:
        return ElectrumChain(self._server.tcp_url, Network.REGTEST, timeout_seconds=5)


class WorldMaker(Protocol):
    def __call__(self, directory: Path) -> AbstractContextManager[World]:
        """Create a world in a directory of its own; it starts when it is entered."""


WORLDS: dict[str, WorldMaker] = {
    "bitcoind": BitcoindWorld,
    "bitcoind-pruned": PrunedBitcoindWorld,
    "electrum": ElectrumXWorld,
}


def address(payee: Payee | Payer) -> str:
    terms = payee.terms if isinstance(payee, Payer) else payee
    return terms.funding_address(Network.REGTEST)


def settle(
    payer: Payer,
    funding: Funding,
    paid_sat: int = 100_000,
    to: bytes = SERVER_DESTINATION,
    fee_sat: int = FEE_SAT,
    reserve: Reserve | None = None,
) -> Settlement:
    """Build the settlement of a channel that received this amount, with or without help of the reserve."""
    payment = sign_payment(
        payer.key,
        payer.terms,
        funding.outpoint,
        funding.value_sat,
        payer.change_script,
        Sat(funding.value_sat - paid_sat),
    )
    claim = Claim(payer.terms, funding.outpoint, funding.value_sat, payer.change_script, payment)
    keys = [payer.server_key, *[RESERVE_KEY] * (len(reserve.coins) if reserve else 0)]
    return sign_settlement(
        [claim], to, Sat(fee_sat), lambda index, digest: keys[index].sign(digest, hasher=None), reserve
    )


def lift(settlement: Settlement, fee_sat: int) -> Settlement:
    """Build the child that the server broadcasts with a settlement to its usual destination."""
    public_key = DESTINATION_KEY.public_key.format()
    return sign_child(settlement, public_key, Sat(fee_sat), lambda _, digest: DESTINATION_KEY.sign(digest, hasher=None))


def reserve_of(*fundings: Funding) -> Reserve:
    """The server's reserve with these coins."""
    coins = tuple(Coin(each.outpoint, each.value_sat) for each in fundings)
    return Reserve(RESERVE_KEY.public_key.format(), coins)


def refund(payer: Payer, funding: Funding) -> Refund:
    """Build the refund that the payer broadcasts after expiry; its fee is higher than the settlement's."""
    return sign_refund(
        payer.key, payer.terms, funding.outpoint, funding.value_sat, payer.change_script, Sat(5 * FEE_SAT)
    )


async def eventually(ask: Callable[[], Awaitable[_T]], expected: _T) -> None:
    """Wait for an answer: a backend behind another server may be moments behind the node."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    answer = await ask()
    while answer != expected and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        answer = await ask()
    assert answer == expected


async def opened(world: World) -> Chain:
    """Open a backend and wait until it has reached the node's tip."""
    chain = world.open()
    await chain.check()
    await eventually(lambda: tip_hash(chain), world.node.best)
    return chain


async def tip_hash(chain: Chain) -> str:
    return (await chain.tip()).block_hash


async def funded(chain: Chain, node: Node, seed: str, confirmations: int = 1) -> tuple[Payer, Funding]:
    """A watched channel with one output of this depth."""
    payer = Payer(seed, PAST)
    await chain.watch([payer.terms])
    outpoint = node.fund(address(payer), FUNDING_SAT)
    for _ in range(confirmations):
        node.mine()
    funding = Funding(outpoint, FUNDING_SAT, confirmations)
    await eventually(lambda: chain.funding(payer.terms), (funding,))
    return payer, funding


async def asked(question: Callable[..., Awaitable[Any]], *parameters: Any) -> Any:
    """Return the answer, or None while no server answers."""
    try:
        return await question(*parameters)
    except ChainFailed:
        return None
