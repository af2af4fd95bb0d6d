"""The server without HTTP, in this process: real LevelDB, real keys and policies, the debug chain, a settable clock.

`local` assembles it. A `Faulty` wraps store, chain and signer. It passes every call on to the real part, unless a test
tells it to hold calls back or to fail.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from coincurve import PrivateKey
from msgspec import Struct

from actors.context import Context
from actors.group_commit import GroupCommit
from actors.opening.opener import Opener, OpenRequest
from actors.registry import Registry
from actors.roles import Serving, Settling
from actors.watching.expiry import Watcher
from paychan.callback.base import Application
from paychan.chain.debug import DebugChain
from paychan.protocol.certificate import Certificate
from paychan.protocol.channel import Accepted, Adopt, Channel, Outcome, Pay, Rejected
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.errors import PaychanError
from paychan.protocol.settlement import Claim, Reserve, Settlement
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from paychan.protocol.wire.rbpcp import opening_secret
from paychan.protocol.wire.signer_messages import (
    AgainReply,
    AgainRequest,
    BehindReply,
    BehindRequest,
    CertificateRequest,
    ChildReply,
    ChildRequest,
    FundingRequest,
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
    Newest,
    NewestReply,
    NewestRequest,
    OtherKeysReply,
    OtherKeysRequest,
    Refusal,
    Reply,
    Request,
    ReserveReply,
    ReserveRequest,
    SettlementReply,
    SettlementRequest,
    ShownReply,
    ShownRequest,
)
from paychan.signer_client.base import SignerRefused
from paychan.signer_client.reply_checks import check_again, check_certificate
from paychan.store.base import Change
from paychan.store.leveldb.store import LevelDbStore
from signer.judge.facts import Limits
from signer.judge.handler import Handler
from signer.judge.queries import Identity
from signer.keys.ring import DEBUG_KEY, KeyRing, StaticKey
from signer.ledger.base import Ledger
from tests.lib.channels import NOW, RULES, SERVER_DESTINATION, Payer
from tests.lib.ledger import MemoryLedger

_DEBUG_KEY = PrivateKey(DEBUG_KEY)

ALARM_SECONDS = 7_200
IDLE_SECONDS = 300


class DebugPayer(Payer, frozen=True):
    """A client whose channel has debug funding, with the server key of debug mode."""

    funding_sat: Sat = DEBUG_FUNDING_SAT

    @property
    def server_key(self) -> PrivateKey:
        return _DEBUG_KEY

    @property
    def outpoint(self) -> OutPoint:
        return self.at or debug_outpoint(self.key.public_key.format(), self.expiry)

    def request(self, paid_sat: int = 10_000) -> OpenRequest:
        """Build the opening request of v1; for a movable channel that of v2, with its secret."""
        payment = self.payment(self.funding_sat - paid_sat)
        return OpenRequest(
            client_key=self.key.public_key.format(),
            expiry=self.expiry,
            change_script=self.change_script,
            payment=payment,
            price_sat=Sat(1),
            secret=opening_secret(payment) if self.movable else b"",
        )

    def pays(self, paid_sat: int) -> Pay:
        """Sign the payment that raises the server's sum to `paid_sat`."""
        return Pay(self.payment(self.funding_sat - paid_sat))


class LocalSigner:
    """The signer's own handlers, called directly: a `Signer` with real keys and policies, no socket and no disk."""

    def __init__(
        self, ledger: Ledger | None = None, keys: KeyRing | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """Begin with an empty ledger, or with that of another `LocalSigner`; with the debug key, or with other keys."""
        keys = keys or KeyRing([StaticKey(DEBUG_KEY)], SERVER_DESTINATION)
        limits = Limits(
            max_fee_percent=100,
            max_fee_sat_per_vb=10_000,
            requests_per_second=1_000_000,
            keys_per_second=1_000_000,
            debug=True,
        )
        self._handler = Handler(
            keys, ledger or MemoryLedger(), Identity("test", "debug", debug=True), limits, clock=clock
        )

    async def health(self) -> HealthReply:
        return await self._ask(Health(1))

    async def public_key(self, client_key: bytes, expiry: UnixTime, *, settling: bool = False) -> KeyReply:
        return await self._ask(KeyRequest(1, client_key, expiry, settling))

    async def other_keys(self, client_key: bytes, expiry: UnixTime, *, settling: bool = False) -> tuple[bytes, ...]:
        reply = await self._ask(OtherKeysRequest(1, client_key, expiry, settling))
        assert isinstance(reply, OtherKeysReply)
        return reply.server_keys

    async def reserve_key(self) -> bytes:
        reply = await self._ask(ReserveRequest(1))
        assert isinstance(reply, ReserveReply)
        return reply.public_key

    async def certify(self, receipt_key: bytes, not_before: UnixTime, not_after: UnixTime) -> Certificate:
        request = CertificateRequest(1, receipt_key, not_before, not_after)
        return check_certificate(await self._ask(request), request)

    async def sign_settlement(
        self, claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, reserve: Reserve | None = None
    ) -> Settlement:
        reply = await self._ask(SettlementRequest(1, tuple(claims), destination_script, fee_sat, reserve))
        assert isinstance(reply, SettlementReply)
        return reply.settlement

    async def sign_child(
        self,
        claims: Sequence[Claim],
        destination_script: bytes,
        fee_sat: Sat,
        child_fee_sat: Sat,
        reserve: Reserve | None = None,
    ) -> Settlement:
        parent = SettlementRequest(0, tuple(claims), destination_script, fee_sat, reserve)
        reply = await self._ask(ChildRequest(1, parent, child_fee_sat))
        assert isinstance(reply, ChildReply)
        return reply.child

    async def show_funding(self, transaction: bytes, outputs: Sequence[int]) -> None:
        await self._ask(FundingRequest(1, transaction, tuple(outputs)))

    async def show_newest(self, claims: Sequence[Claim]) -> NewestReply:
        reply = await self._ask(NewestRequest(1, tuple(claims)))
        assert isinstance(reply, NewestReply)
        return reply

    async def behind(self, payments: Sequence[Newest]) -> tuple[OutPoint, ...]:
        reply = await self._ask(BehindRequest(1, tuple(payments)))
        assert isinstance(reply, BehindReply)
        return reply.outpoints

    async def shown(
        self, expires_after: UnixTime, after: OutPoint | None
    ) -> tuple[tuple[OutPoint, ...], OutPoint | None]:
        reply = await self._ask(ShownRequest(1, expires_after, after))
        assert isinstance(reply, ShownReply)
        return reply.outpoints, reply.after

    async def sign_again(self, outpoint: OutPoint) -> Adopt:
        reply = await self._ask(AgainRequest(1, outpoint))
        assert isinstance(reply, AgainReply)
        check_again(reply, outpoint)
        return Adopt(reply.claim, reply.settlement)

    async def close(self) -> None:
        pass

    async def _ask(self, request: Request) -> Any:
        reply: Reply = await self._handler.handle(request, 0)
        if isinstance(reply, Refusal):
            raise SignerRefused(reply.tag, reply.reason, reply.need_sat)
        return reply


class Faulty:
    """Wraps a real part; a test may hold back calls of a method, or let them fail."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.calls: Counter[str] = Counter()
        self._gates: dict[str, tuple[asyncio.Event, int]] = {}
        self._errors: dict[str, tuple[Exception, int]] = {}

    def hold(self, method: str, after: int = 0) -> None:
        """Hold back all calls of a method until `release`, except the first `after`."""
        self._gates[method] = (asyncio.Event(), self.calls[method] + after)

    def release(self, method: str) -> None:
        self._gates.pop(method)[0].set()

    def fail(self, method: str, error: Exception, times: int = 1_000_000) -> None:
        """Let the next calls of a method fail before they reach the real part."""
        self._errors[method] = (error, times)

    def heal(self, method: str) -> None:
        self._errors.pop(method, None)

    def __getattr__(self, method: str) -> Any:
        real = getattr(self.real, method)
        if not inspect.iscoroutinefunction(real):
            return real

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[method] += 1
            gate, passed = self._gates.get(method, (None, 0))
            if gate is not None and self.calls[method] > passed:
                await gate.wait()
            error, times = self._errors.get(method, (None, 0))
            if error is not None and times:
                self._errors[method] = (error, times - 1)
                raise error
            return await real(*args, **kwargs)

        return call


class Clock:
    """Wall clock of a test: it stands still until the test sets it."""

    def __init__(self, now: int = NOW) -> None:
        self.now = now

    def __call__(self) -> UnixTime:
        return UnixTime(self.now)


class Local(Struct):
    """A running server without its listeners."""

    store: Any
    chain: Any
    signer: Any
    clock: Clock
    context: Context
    registry: Registry
    opener: Opener
    settling: Settling
    watcher: Watcher
    failures: list[BaseException]
    """Errors of the group commit; the real server ends at the first."""

    async def open(self, payer: DebugPayer, paid_sat: int = 10_000) -> Channel:
        """Open a channel, which must be accepted."""
        return accepted(await self.opener.open(payer.request(paid_sat))).channel

    async def stored(self, payer: Payer) -> Channel:
        """Return the stored record of a channel."""
        channel = await self.store.real.get(payer.outpoint)
        assert isinstance(channel, Channel)
        return channel

    async def fill(self, channels: Sequence[Channel]) -> None:
        """Store channels as if they had been opened."""
        for begin in range(0, len(channels), 1_000):
            written = await self.store.real.commit(
                [Change(None, channel) for channel in channels[begin : begin + 1_000]]
            )
            assert all(written)


@asynccontextmanager
async def local(
    directory: Path,
    clock: Clock | None = None,
    *,
    application: Application | None = None,
    chain: DebugChain | None = None,
    settings: dict[str, Any] | None = None,
    stale_seconds: int = 0,
    ledger: Ledger | None = None,
    **rules: Any,
) -> AsyncIterator[Local]:
    """Run a server on the store in a directory; `rules` change `RULES`, `settings` the operator's other settings.

    It ends like a killed process: running work is cut off, and only stored state remains.
    """
    clock = clock or Clock()
    others = asyncio.all_tasks()
    store, signer = Faulty(LevelDbStore.open(directory / "store", "test")), Faulty(LocalSigner(ledger))
    failures: list[BaseException] = []
    context = Context(
        network=Network.TEST,
        rules=msgspec.structs.replace(RULES, asks_application=application is not None, **rules),
        settlement_confirmations=6,
        clock=clock,
        store=store,  # type: ignore[arg-type] # wraps a store
        commits=GroupCommit(store, 0, failures.append, observers=(settings or {}).get("observers")),  # type: ignore[arg-type]
        chain=Faulty(chain or DebugChain(clock)),  # type: ignore[arg-type]
        signer=signer,  # type: ignore[arg-type]
        application=application,
        **(settings or {}),
    )
    serving = Serving(context)
    settling = Settling(
        context,
        serving.registry,
        interval_seconds=0.001,
        alarm_seconds=ALARM_SECONDS,
        idle_seconds=IDLE_SECONDS,
        stale_seconds=stale_seconds,
    )
    try:
        yield Local(
            store=store,
            chain=context.chain,
            signer=signer,
            clock=clock,
            context=context,
            registry=serving.registry,
            opener=serving.opener,
            settling=settling,
            watcher=settling.watcher,
            failures=failures,
        )
    finally:
        under_way = asyncio.all_tasks() - others
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await store.real.close()


async def until(condition: Callable[[], Any]) -> None:
    """Let all other tasks run until a condition holds.

    Raises:
        TimeoutError: it did not hold in time.
    """
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - an arbitrary condition sends no event
            await asyncio.sleep(0.001)


async def settled_down() -> None:
    """Let every task run that needs neither the disk nor another thread."""
    for _ in range(50):
        await asyncio.sleep(0)


def accepted(outcome: Outcome) -> Accepted:
    """Return an outcome, which must not be a refusal."""
    assert isinstance(outcome, Accepted), outcome
    return outcome


def refused(outcome: Outcome) -> PaychanError:
    """Return the error of an outcome, which must be a refusal."""
    assert isinstance(outcome, Rejected), outcome
    return outcome.error
