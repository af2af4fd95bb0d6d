"""Payments that need the application's answer: one request each, answers in order, no value without a yes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec.structs import replace

from actors.channel import Resume
from paychan.callback.base import ApplicationSilent, Verdict, question_key
from paychan.protocol.channel import Accepted, Channel, Close, CloseByProof, CloseReason, Outcome, State
from paychan.protocol.errors import ApplicationRefused, NotNewestPayment, PaymentPending, TryAgain
from paychan.protocol.state_machine import apply
from paychan.protocol.types import UnixTime
from paychan.store.base import Change
from tests.lib.channels import accepted as channel_of
from tests.lib.world import DebugPayer, Local, accepted, local, refused, settled_down, until

PAYER = DebugPayer("application")


class Shop:
    """An application that answers each request when the test says so."""

    def __init__(self) -> None:
        self.questions: list[int] = []
        """Total received satoshi for each request, if its payment is booked."""
        self._thinking: list[asyncio.Future[Verdict]] = []

    async def ask(self, channel: Channel) -> Verdict:
        assert channel.offered is not None
        self.questions.append(channel.funding_sat - channel.offered.change_sat)
        self._thinking.append(asyncio.get_running_loop().create_future())
        return await self._thinking[-1]

    async def close(self) -> None:
        pass

    async def says(self, verdict: Verdict | None) -> None:
        """Answer the open request, or the next one; None: stay silent until the deadline."""
        await until(lambda: self._thinking)
        thought = self._thinking.pop()
        if verdict is None:
            thought.set_exception(ApplicationSilent("deadline"))
        else:
            thought.set_result(verdict)


YES = Verdict(data="a song")
NO = Verdict(refusal="sold out")


def pay(server: Local, paid_sat: int) -> asyncio.Future[Outcome]:
    return asyncio.ensure_future(server.registry.ask(PAYER.outpoint, PAYER.pays(paid_sat)))


async def test_a_payment_counts_when_the_application_says_yes(tmp_path: Path):
    """The payment is booked with the application's text for the client, and is no longer offered."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        payment = pay(server, 10_007)
        await shop.says(YES)
        outcome = accepted(await payment)
        stored = await server.stored(PAYER)

    assert (outcome.value_sat, outcome.application_data) == (7, "a song")
    assert (stored.received_sat, stored.offered) == (10_007, None)


async def test_the_application_hears_of_a_payment_only_when_that_is_durable(tmp_path: Path):
    """A crash can't lose a payment for which the application has delivered."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        server.store.hold("commit")
        pay(server, 10_007)
        await until(lambda: server.store.calls["commit"] == 2)
        await settled_down()

        assert shop.questions == []
        server.store.release("commit")
        await until(lambda: shop.questions)
        assert (await server.stored(PAYER)).offered is not None


async def test_a_refusal_leaves_the_channel_where_it_was(tmp_path: Path):
    """The client gets the reason, no payment is booked, and the next payment is a new request."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        before = await server.open(PAYER, 10_000)
        payment = pay(server, 10_007)
        await shop.says(NO)
        assert refused(await payment) == ApplicationRefused(reason="sold out")
        after = await server.stored(PAYER)

        assert (after.payment, after.payments, after.offered) == (before.payment, before.payments, None)
        payment = pay(server, 10_008)
        await shop.says(YES)
        assert accepted(await payment).value_sat == 8


async def test_a_retry_shares_the_request(tmp_path: Path):
    """The same payment sent three times at once is one request, and all three get its answer."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        payments = [pay(server, 10_007) for _ in range(3)]
        await shop.says(NO)
        outcomes = await asyncio.gather(*payments)

    assert [refused(outcome) for outcome in outcomes] == [ApplicationRefused(reason="sold out")] * 3
    assert shop.questions == [10_007]


async def test_a_retry_at_every_moment_is_one_delivery(tmp_path: Path):
    """At any moment between offer, request and answer a retry causes no second booking and no second request."""
    for hops in range(0, 40, 2):
        shop, payer = Shop(), DebugPayer(f"retry {hops}")
        async with local(tmp_path / str(hops), application=shop) as server:
            await server.open(payer, 10_000)
            first = asyncio.ensure_future(server.registry.ask(payer.outpoint, payer.pays(10_007)))
            saying = asyncio.ensure_future(shop.says(YES))
            for _ in range(hops):
                await asyncio.sleep(0)
            again = asyncio.ensure_future(server.registry.ask(payer.outpoint, payer.pays(10_007)))
            outcomes = await asyncio.gather(first, again)
            await saying

            assert [accepted(outcome).channel.received_sat for outcome in outcomes] == [10_007, 10_007], hops
            assert shop.questions == [10_007], hops
            assert (await server.stored(payer)).payments == 1, hops


async def test_a_silent_application_keeps_the_offer(tmp_path: Path):
    """Without an answer no payment counts, another payment must wait, and a retry causes a new request."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        first = pay(server, 10_007)
        await shop.says(None)
        assert isinstance(refused(await first), PaymentPending)
        assert (await server.stored(PAYER)).offered == PAYER.pays(10_007).payment

        other = pay(server, 10_009)
        await shop.says(None)
        assert isinstance(refused(await other), PaymentPending)
        again = pay(server, 10_007)
        await shop.says(YES)
        assert accepted(await again).value_sat == 7
        assert shop.questions == [10_007] * 3


async def test_the_offer_survives_a_crash(tmp_path: Path):
    """If the process died during a request, it is sent again when the payer repeats the payment."""
    async with local(tmp_path, application=Shop()) as server:
        await server.open(PAYER, 10_000)
        pay(server, 10_007)
        await until(lambda: server.store.calls["commit"] == 2)
        await server.context.commits.close()
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        again = pay(server, 10_007)
        await shop.says(YES)
        assert accepted(await again).value_sat == 7


async def test_messages_behind_an_offer_wait_in_order(tmp_path: Path):
    """Payments that come during a request are judged in the order of arrival."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        payments = [pay(server, 10_000 + n) for n in range(1, 9)]
        for _ in payments:
            await shop.says(YES)
        outcomes = await asyncio.gather(*payments)

    assert [accepted(outcome).value_sat for outcome in outcomes] == [1] * 8
    assert shop.questions == list(range(10_001, 10_009))


async def test_no_message_overtakes_those_that_wait(tmp_path: Path):
    """A payment that comes at the moment of the answer is judged after those that waited for it."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        payments = [pay(server, 10_001), pay(server, 10_002), pay(server, 10_003)]
        await until(lambda: shop.questions)
        actor = server.registry.actors[PAYER.outpoint]
        assert actor._offering is not None
        actor._offering.add_done_callback(
            lambda _: payments.append(actor.actor_ref.ask(PAYER.pays(10_004), block=False))  # type: ignore[arg-type]
        )
        for _ in range(4):
            await shop.says(YES)
        outcomes = [await payment for payment in payments]

    assert [accepted(outcome).value_sat for outcome in outcomes] == [1] * 4
    assert shop.questions == [10_001, 10_002, 10_003, 10_004]


async def test_a_retry_gets_the_answer_of_its_own_payment(tmp_path: Path):
    """A payment and its retry that come while an earlier answer is written do not get the earlier answer."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        first = pay(server, 10_001)
        await until(lambda: shop.questions)
        server.store.hold("commit")
        await shop.says(YES)
        await until(lambda: server.store.calls["commit"] == 3)
        second, retry = pay(server, 10_002), pay(server, 10_002)
        await settled_down()
        server.store.release("commit")
        for _ in range(2):
            await shop.says(NO)

        assert accepted(await first).value_sat == 1
        assert [refused(outcome) for outcome in await asyncio.gather(second, retry)] == [
            ApplicationRefused(reason="sold out")
        ] * 2


async def test_fault_7_a_closing_channel_keeps_asking_and_settles_a_late_yes(tmp_path: Path):
    """Near expiry the channel closes; a late yes of the application settles the offered payment."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        payment = pay(server, 70_000)
        await until(lambda: shop.questions)
        closing = asyncio.ensure_future(server.registry.ask(PAYER.outpoint, Close(CloseReason.EXPIRY)))
        await shop.says(None)
        assert isinstance(refused(await payment), PaymentPending)
        await shop.says(None)
        closed = accepted(await closing).channel
        assert (closed.state, closed.received_sat) == (State.CLOSING, 10_000)
        assert closed.offered is not None

        look = asyncio.ensure_future(server.registry.ask(PAYER.outpoint, Resume()))
        await shop.says(YES)
        settled = accepted(await look).channel

        assert (settled.state, settled.received_sat, settled.offered) == (State.CLOSED, 70_000, None)
        assert shop.questions == [70_000] * 3


async def test_fault_7_a_channel_without_an_answer_is_settled_in_time(tmp_path: Path):
    """After half of the time to the deadline the rule decides: by default the signed payment is settled."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        payment = pay(server, 70_000)
        await shop.says(None)
        assert isinstance(refused(await payment), PaymentPending)
        server.clock.now = UnixTime(PAYER.terms.expiry.lock_time - 60)
        closing = asyncio.ensure_future(server.registry.ask(PAYER.outpoint, Close(CloseReason.EXPIRY)))
        for _ in range(2):
            await shop.says(None)
        closed = accepted(await closing).channel
        if closed.state is State.CLOSING:
            server.clock.now = UnixTime(PAYER.terms.expiry.lock_time - 20)
            look = asyncio.ensure_future(server.registry.ask(PAYER.outpoint, Resume()))
            await shop.says(None)
            closed = accepted(await look).channel

        assert (closed.state, closed.received_sat) == (State.CLOSED, 70_000)


async def test_fault_14_a_silent_application_keeps_no_client(tmp_path: Path):
    """The client closes by the payment before the offered one: the server asks once more, then drops the offer."""
    for answer, paid_sat in ((None, 10_000), (NO, 10_000), (YES, None)):
        shop, payer = Shop(), DebugPayer(f"leaving {answer}")
        async with local(tmp_path / str(paid_sat and answer), application=shop) as server:
            await server.open(payer, 10_000)
            first = asyncio.ensure_future(server.registry.ask(payer.outpoint, payer.pays(70_000)))
            await shop.says(None)
            await first
            proof = CloseByProof(payer.pays(10_000).payment)
            closing = asyncio.ensure_future(server.registry.ask(payer.outpoint, proof))
            await shop.says(answer)
            if paid_sat is None:  # the yes came before the closing was judged: the client must show that payment
                assert isinstance(refused(await closing), NotNewestPayment)
                continue
            closed = accepted(await closing).channel

            assert (closed.state, closed.received_sat, closed.offered) == (State.CLOSED, paid_sat, None)


async def test_an_offer_that_was_not_written_is_not_asked_about(tmp_path: Path):
    """If another process changed the channel first, the server does not ask about its payment."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        opened = await server.open(PAYER, 10_000)
        server.store.hold("commit")
        payments = [pay(server, 10_007), pay(server, 10_007), pay(server, 10_008)]
        await until(lambda: server.store.calls["commit"] == 2)
        elsewhere = channel_of(apply(opened, Close(CloseReason.OPERATOR), server.context.view()))
        await server.store.real.commit([Change(opened, elsewhere)])
        server.store.release("commit")

        assert [refused(outcome) for outcome in await asyncio.gather(*payments)] == [TryAgain()] * 3
        assert shop.questions == []


async def test_a_payment_of_0_sat_is_no_request(tmp_path: Path):
    """A repetition or a payment without value brings nothing, so the application is not asked."""
    shop = Shop()
    async with local(tmp_path, application=shop) as server:
        await server.open(PAYER, 10_000)
        outcome = await server.registry.ask(PAYER.outpoint, PAYER.pays(10_000))

    assert isinstance(outcome, Accepted)
    assert shop.questions == []


async def test_fault_15_a_request_is_named_by_its_offer(tmp_path: Path):
    """Each offer has its own request name; repetitions have the same name, also while the channel closes."""
    keys: list[tuple[str, bool]] = []

    class Silent(Shop):
        async def ask(self, channel: Channel) -> Verdict:
            keys.append((question_key(channel), channel.restored))
            return await super().ask(channel)

    shop = Silent()
    async with local(tmp_path, application=shop) as server:
        opened = await server.open(PAYER, 10_000)
        restored = replace(opened, restored=True)
        server.registry.passivate(-1)
        assert await server.store.commit([Change(opened, restored)]) == [True]
        for verdict in (NO, None, YES):
            payment = pay(server, 10_007)
            await shop.says(verdict)
            await payment
        payment = pay(server, 10_008)
        await shop.says(None)
        await payment
        closing = asyncio.ensure_future(server.registry.ask(PAYER.outpoint, Close(CloseReason.OPERATOR)))
        for verdict in (None, YES):  # before the closing is judged, and while the channel closes
            await shop.says(verdict)
        await closing

    names = [key for key, _ in keys]
    assert names[0] != names[1] == names[2] != names[3]
    assert set(names[3:]) == {names[3]}
    assert [restored for _, restored in keys] == [True, True, True, *[False] * (len(keys) - 3)]
