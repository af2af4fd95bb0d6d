"""Payments while a channel moves are neither lost nor counted twice, whichever part fails.

The real client library pays, over HTTP, to the real server in this process; requests and answers get lost, either side
dies and comes back, the operator withdraws, the settlement takes its time. A sum of integers is the model.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
from bitcoin.core import CTransaction
from hypothesis import given, settings
from hypothesis import strategies as st

from paychan.api.budgets.descriptors import divide
from paychan.api.server import listen, public_server
from paychan.api.service import Service
from paychan.chain.base import Spend
from paychan.chain.debug import DebugChain
from paychan.client import AsyncChannel, AsyncPayer, Declined, Dialect, Patience, Refused, State, Unreachable
from paychan.config import Chain, ServerConfig
from paychan.protocol.channel import Channel, Close, CloseReason
from paychan.protocol.channel import State as Standing
from paychan.protocol.types import OutPoint
from paychan.signer_client.base import SignerAbsent
from paychan.store.base import walk
from tests.lib.world import Clock, Local, local

LOSSES = ["", "", "", "request lost", "answer lost", "dies before", "dies after"]
STEPS = st.one_of(
    st.tuples(st.just("pay"), st.sampled_from([1, 900, 20_000]), st.sampled_from(LOSSES), st.integers(0, 1)),
    st.tuples(st.just("resume"), st.just(0), st.sampled_from(LOSSES), st.integers(0, 1)),
    st.tuples(st.just("status"), st.just(0), st.sampled_from(LOSSES), st.integers(0, 1)),
    st.tuples(st.sampled_from(["withdraw", "move", "move", "stuck", "confirm", "restart"])),
)


class Died(Exception):
    """The payer's process ends at this point."""


class SlowChain(DebugChain):
    """A chain on which broadcast transactions stay unconfirmed until `confirm`."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.deep: set[bytes] = set()

    def confirm(self) -> None:
        self.deep.update(self._published)

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        spend = await super().spender(outpoint)
        return spend if spend is None or spend.txid in self.deep else Spend(spend.txid, 0)


class Stream(httpx.AsyncBaseTransport):
    """A transport to the server that loses the request or answer chosen by the test."""

    def __init__(self) -> None:
        self.port, self.loss, self.passes = 0, "", 0
        self.way = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(host="127.0.0.1", port=self.port)
        loss = self.loss if self.passes == 0 else ""
        self.passes -= 1
        if loss == "request lost":
            raise httpx.ConnectError(loss)
        if loss == "dies before":
            raise Died
        response = await self.way.handle_async_request(request)
        if loss:
            await response.aread()
            raise Died if loss == "dies after" else httpx.ReadError(loss)
        return response


class Scene:
    """One payer, one server, one channel, and the value that the payer has signed away."""

    def __init__(self, directory: Path, dialect: Dialect) -> None:
        self.directory, self.dialect = directory, dialect
        self.clock = Clock(int(time.time()))
        self.chain = SlowChain(self.clock)
        self.line = Stream()
        self.config = ServerConfig(network="test", debug=True, chain=Chain(backend="debug"))
        self.stack = AsyncExitStack()
        self.meant_sat = 0

    # --- the server -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self.server: Local = await self.stack.enter_async_context(
            local(self.directory, self.clock, chain=self.chain, min_confirmations=1)
        )
        context = self.server.context
        actors = (self.server.registry, self.server.opener, self.server.settling)
        service = Service(self.config, context, *actors, divide(1024, self.config))
        self.door = public_server(service)
        self.line.port = await listen(self.door, "127.0.0.1", 0)

    async def stop(self) -> None:
        self.door.stop()
        await self.door.close_all_connections()
        await self.line.way.aclose()
        self.line.way = httpx.AsyncHTTPTransport()
        await self.stack.aclose()

    async def records(self) -> list[Channel]:
        return [channel for state in Standing async for channel in walk(self.server.store.real, state)]

    async def received_sat(self) -> int:
        return sum(channel.received_sat for channel in await self.records())

    async def withdraw(self) -> None:
        for channel in await self.records():
            if channel.state is Standing.OPEN:
                await self.server.registry.ask(channel.outpoint, Close(CloseReason.WITHDRAW))

    async def confirm(self) -> None:
        self.server.signer.heal("sign_settlement")
        await self.server.watcher.scan()
        self.chain.confirm()
        for _ in range(2):  # the channel at the new output accepts payments after chain and signer were asked about it
            await self.server.watcher.scan()

    async def do(self, step: Sequence[object]) -> None:
        match step[0]:
            case "withdraw":
                await self.withdraw()
            case "stuck":
                self.server.signer.fail("sign_settlement", SignerAbsent("asleep"))
                await self.withdraw()
            case "confirm":
                await self.confirm()
            case "move":
                await self.withdraw()
                await self.confirm()
            case "restart":
                await self.stop()
                await self.start()
            case _:
                await self.act(*step)  # type: ignore[arg-type]

    # --- the payer --------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        self.payer = AsyncPayer(
            "http://paychan.test",
            wallet=self.directory / "wallet",
            dialect=self.dialect,
            patience=Patience(attempts=1),
            http=httpx.AsyncClient(transport=self.line),
        )
        self.channel: AsyncChannel = await self.payer.new_channel(hours=1000, movable=True)
        await self.channel.fund_debug()
        self.meant_sat = (await self.channel.open()).paid_sat

    async def act(self, what: str, amount_sat: int, loss: str, passes: int) -> None:
        """Pay, resume or ask; a signed payment counts in the model, whatever its answer.

        If the server is known not to have it, the payer replaces it by the next.
        """
        self.line.loss, self.line.passes = loss, passes
        before = self.meant_sat
        try:
            if what == "pay":
                given_up = self.channel.record.pending_sat if self.channel.record.refused else 0
                self.meant_sat += amount_sat - given_up
                await self.channel.pay(amount_sat)
            elif what == "resume":
                await self.channel.resume()
            else:
                await self.channel.status()
        except Declined:
            self.meant_sat = before
        except Died:
            self.channel.release()
            self.channel = self.payer.channel(self.channel.name)
        except (Unreachable, Refused):
            pass
        self.line.loss = ""

    # --- invariants -------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Each side counts between the acknowledged and the signed value; the refund spends the present output."""
        record, received = self.channel.record, await self.received_sat()
        acknowledged = record.earlier_paid_sat + record.funding_sat - record.agreed_sat
        assert acknowledged <= received <= record.paid_sat == self.meant_sat
        refund = CTransaction.deserialize(bytes.fromhex(record.refunds[-1]))
        assert OutPoint(bytes(refund.vin[0].prevout.hash), refund.vin[0].prevout.n) == record.outpoint
        assert self.payer.wallet.read(record.name) == record
        records = {channel.outpoint: channel for channel in await self.records()}
        for channel in records.values():
            if channel.closing is not None and channel.closing.spent_by:
                settlement = CTransaction.deserialize(await self.chain.transaction(channel.closing.spent_by))
                successor = records[OutPoint(channel.closing.spent_by, 0)]
                assert settlement.vout[0].nValue == channel.payment.change_sat == successor.funding_sat

    async def end(self) -> None:
        """After all work has finished, both sides count the same; a last payment and the closing succeed."""
        await self.confirm()
        if self.channel.record.unacknowledged:
            await self.channel.resume()
        await self.act("pay", 5_000, "", 0)
        assert await self.received_sat() == self.channel.paid_sat == self.meant_sat
        assert not self.channel.record.unacknowledged
        settled = await self.channel.close(fee_sat=5_000)
        assert self.channel.record.state is State.CLOSED
        total = self.channel.record.earlier_paid_sat + self.channel.record.funding_sat
        assert settled.change_sat == total - self.meant_sat - 5_000


async def play(steps: Sequence[Sequence[object]], dialect: Dialect) -> None:
    with tempfile.TemporaryDirectory() as directory:
        scene = Scene(Path(directory), dialect)
        await scene.start()
        try:
            await scene.open()
            for step in steps:
                await scene.do(step)
                await scene.check()
            await scene.end()
            await scene.payer.close()
        finally:
            await scene.stop()


@settings(max_examples=settings().max_examples // 2)
@given(steps=st.lists(STEPS, min_size=3, max_size=16), dialect=st.sampled_from(Dialect))
def test_payments_during_moves_are_neither_lost_nor_counted_twice(
    steps: list[Sequence[object]], dialect: Dialect
) -> None:
    """Random lives of a channel: in the end the received value equals the signed value, over all its outputs."""
    asyncio.run(play(steps, dialect))
