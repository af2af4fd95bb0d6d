"""The chain's backends, as the contract suite needs them: a node, and the backend's own way of looking at it.

And what both sides of a real channel may publish.
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
"""Expiry of channels whose refund is valid already; earlier than any block mined here."""
FUNDING_SAT = Sat(12_345_679)
FEE_SAT = Sat(2_000)
PATIENCE_SECONDS = 20.0
OLD = Payer("funded before anybody watched")
DESTINATION_KEY = private_key("server destination")
RESERVE_KEY = private_key("reserve")

_SMALL_MEMPOOL = "-maxmempool=5"

_T = TypeVar("_T")


class World(Protocol):
    """A node that the test moves, and whatever stands between it and the backend. Its chain begins two days ago."""

    node: Node
    tells_replacement_cost: bool

    def open(self) -> Chain:
        """Make a backend that looks at the node: the first, or another as after a restart of ours."""


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
    """The least that operators run: pruned, no index, no notifications."""

    flags = ("-prune=550", _SMALL_MEMPOOL)
    zmq = False


class _RememberingNode(Node):
    """Killed, it keeps its newest blocks: ElectrumX follows only a longer branch, and no peer gives lost blocks back."""

    def kill(self) -> None:
        if self._process is not None:
            self.rpc("gettxoutsetinfo", "none")  # has it write what it holds
        super().kill()


class ElectrumXWorld:
    """An Electrum server on a node with transaction index, which it needs."""

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
        """Make a world with a directory of its own, which begins when it is entered."""


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
    """What the server publishes for a channel that paid so much, with the help of its reserve or without."""
    payment = sign_payment(
        payer.key, payer.terms, funding.outpoint, payer.change_script, Sat(funding.value_sat - paid_sat)
    )
    claim = Claim(payer.terms, funding.outpoint, funding.value_sat, payer.change_script, payment)
    keys = [payer.server_key, *[RESERVE_KEY] * (len(reserve.coins) if reserve else 0)]
    return sign_settlement(
        [claim], to, Sat(fee_sat), lambda index, digest: keys[index].sign(digest, hasher=None), reserve
    )


def lift(settlement: Settlement, fee_sat: int) -> Settlement:
    """The child that the server publishes with a settlement to its usual destination."""
    public_key = DESTINATION_KEY.public_key.format()
    return sign_child(settlement, public_key, Sat(fee_sat), lambda _, digest: DESTINATION_KEY.sign(digest, hasher=None))


def reserve_of(*fundings: Funding) -> Reserve:
    """The server's reserve with these coins."""
    coins = tuple(Coin(each.outpoint, each.value_sat) for each in fundings)
    return Reserve(RESERVE_KEY.public_key.format(), coins)


def refund(payer: Payer, funding: Funding) -> Refund:
    """What the payer publishes after expiry; pays more than the settlement does."""
    return sign_refund(
        payer.key, payer.terms, funding.outpoint, funding.value_sat, payer.change_script, Sat(5 * FEE_SAT)
    )


async def eventually(ask: Callable[[], Awaitable[_T]], expected: _T) -> None:
    """A backend that is told by somebody else may be some moments behind the node."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    answer = await ask()
    while answer != expected and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        answer = await ask()
    assert answer == expected


async def opened(world: World) -> Chain:
    """A backend that is as far as the node is."""
    chain = world.open()
    await chain.check()
    await eventually(lambda: tip_hash(chain), world.node.best)
    return chain


async def tip_hash(chain: Chain) -> str:
    return (await chain.tip()).block_hash


async def funded(chain: Chain, node: Node, seed: str, confirmations: int = 1) -> tuple[Payer, Funding]:
    """A watched channel with one output so deep."""
    payer = Payer(seed, PAST)
    await chain.watch([payer.terms])
    outpoint = node.fund(address(payer), FUNDING_SAT)
    for _ in range(confirmations):
        node.mine()
    funding = Funding(outpoint, FUNDING_SAT, confirmations)
    await eventually(lambda: chain.funding(payer.terms), (funding,))
    return payer, funding


async def asked(question: Callable[..., Awaitable[Any]], *parameters: Any) -> Any:
    """The answer, or None while there is nobody to ask."""
    try:
        return await question(*parameters)
    except ChainFailed:
        return None
