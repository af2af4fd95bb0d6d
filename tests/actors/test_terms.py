"""Faults 23, 24, 25: an address is given out only if its channel can be opened; earlier terms stay valid for a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from coincurve import PrivateKey

from actors.opening.opener import OpenRequest
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Depth
from paychan.protocol.errors import (
    ChainUnavailable,
    ExpiryTooLate,
    ExpiryTooSoon,
    FundingUnconfirmed,
    KeyReuse,
    PaychanError,
    PaymentShort,
    SignerUnavailable,
    StorageFull,
    Unavailable,
    WrongServerKey,
)
from paychan.protocol.terms import Held, OpeningTerms, TermsHistory, lead_seconds
from paychan.protocol.types import Sat, UnixTime
from paychan.signer_client.base import SignerAbsent
from signer.keys.ring import DEBUG_KEY, KeyRing, StaticKey, hardened_keys
from tests.actors.test_rounds import Blocks
from tests.lib.channels import NOW, RULES, SERVER_DESTINATION, private_key
from tests.lib.looped import looped
from tests.lib.world import DebugPayer, Local, LocalSigner, accepted, local, refused

PAYER = DebugPayer("terms")
KEY = PAYER.key.public_key.format()
LIFE = RULES.settlement_period_seconds + RULES.min_duration_seconds
HOLD = 24 * 3600
EASY = OpeningTerms(
    v1_price_sat=Sat(1_000),
    v2_price_sat=Sat(2_000),
    min_confirmations=1,
    smaller=(),
    least_life_seconds=LIFE,
    longest_life_seconds=0,
)


def frozen(server: Local) -> None:
    server.context.chain_view.problem = "the newest block is 200 minutes old"


def without_node(server: Local) -> None:
    server.chain.fail("tip", ChainFailed("http://10.0.0.1:8332 can't be reached"))


def without_signer(server: Local) -> None:
    server.signer.fail("health", SignerAbsent("/run/paychan/signer.sock: no answer"))


def nothing(_: Local) -> None:
    """Stay well."""


@pytest.mark.parametrize(
    ("break_it", "error", "full"),
    [
        (frozen, ChainUnavailable, False),
        (without_node, ChainUnavailable, False),
        (without_signer, SignerUnavailable, False),
        (nothing, StorageFull, True),
    ],
)
async def test_fault_25_no_address_is_given_out_while_no_channel_can_open(
    tmp_path: Path, break_it: Callable[[Local], None], error: type[PaychanError], *, full: bool
) -> None:
    """The answer is 503 without internals, also for an address that was given out before, until the cause ends."""
    problem = [StorageFull()] if full else []
    settings = {"storage_problem": lambda: problem[0] if problem else None}
    async with local(tmp_path, settings=settings) as server:
        await server.opener.terms(KEY, PAYER.expiry)
        break_it(server)
        for expiry in (PAYER.expiry, UnixTime(PAYER.expiry + 1)):
            with pytest.raises(error) as raised:
                await server.opener.offer(KEY, expiry)
            assert issubclass(error, Unavailable)
            assert not any(word in str(raised.value) for word in ("10.0.0.1", "sock", "200"))
        if full:
            assert refused(await server.opener.open(PAYER.request())) == StorageFull()
        problem.clear()
        server.context.chain_view.problem = ""
        server.chain.heal("tip")
        server.signer.heal("health")
        await asyncio.sleep(1.1)  # an answer is valid for a second
        assert (await server.opener.offer(KEY, PAYER.expiry)).client_key == KEY


async def test_fault_25_many_callers_cost_one_request(tmp_path: Path) -> None:
    """For a hundred concurrent addresses, signer and chain are asked once whether they are ready."""
    async with local(tmp_path) as server:
        await asyncio.gather(*(server.opener.offer(KEY, UnixTime(PAYER.expiry + n)) for n in range(100)))
        assert (server.signer.calls["health"], server.chain.calls["tip"]) == (1, 1)


@pytest.mark.parametrize("confirmations", [0, 1, 6])
async def test_fault_24_an_offered_channel_can_open_when_its_funding_is_deep(
    tmp_path: Path, confirmations: int
) -> None:
    """The soonest offered expiry can still be opened after the longest time that funding may take."""
    rules = msgspec.structs.replace(RULES, min_confirmations=confirmations)
    lead = lead_seconds(rules)
    assert lead >= 3600 + confirmations * 600
    async with local(tmp_path, min_confirmations=confirmations) as server:
        soonest = NOW + LIFE + lead
        with pytest.raises(ExpiryTooSoon) as raised:
            await server.opener.offer(KEY, UnixTime(soonest))
        assert raised.value == ExpiryTooSoon(got_unix=soonest, need_unix=soonest)
        payer = DebugPayer("soon", UnixTime(soonest + 1))
        await server.opener.offer(payer.key.public_key.format(), payer.expiry)
        server.clock.now += lead
        accepted(await server.opener.open(payer.request()))


async def test_fault_24_offer_and_opening_refuse_the_same_expiries(tmp_path: Path) -> None:
    """Both refuse the same late expiries, and an expiry that `open` finds too soon is never offered."""
    year = 366 * 86_400
    async with local(tmp_path, longest_life_seconds=year) as server:
        for expiry in (NOW + LIFE, NOW + 1, 500_000_000, NOW + year + 1, 2**32 - 1):
            payer = DebugPayer("any", UnixTime(expiry))
            with pytest.raises((ExpiryTooSoon, ExpiryTooLate)) as raised:
                await server.opener.offer(KEY, payer.expiry)
            assert type(refused(await server.opener.open(payer.request()))) is type(raised.value)
        latest = DebugPayer("latest", UnixTime(NOW + year))
        await server.opener.offer(KEY, latest.expiry)
        accepted(await server.opener.open(latest.request()))


async def test_fault_24_offer_and_opening_refuse_the_servers_key(tmp_path: Path) -> None:
    """With the same key for both parties, one party could spend alone."""
    async with local(tmp_path) as server:
        ours = StaticKey(DEBUG_KEY).reserve_key().public_key
        with pytest.raises(KeyReuse):
            await server.opener.offer(ours, PAYER.expiry)
        request = msgspec.structs.replace(PAYER.request(), client_key=ours)
        assert isinstance(refused(await server.opener.open(request)), KeyReuse)


# --- terms that were changed ------------------------------------------------------------------------------------------


def history(*terms: tuple[int, OpeningTerms]) -> TermsHistory:
    return TermsHistory(tuple(Held(UnixTime(since), each) for since, each in terms), HOLD)


HARDER = msgspec.structs.replace(EASY, v1_price_sat=Sat(50_000), v2_price_sat=Sat(60_000))


@pytest.mark.parametrize("v2", [False, True])
async def test_fault_23_a_raised_price_counts_after_the_holding_time(tmp_path: Path, *, v2: bool) -> None:
    """A payer may pay the earlier price; a day after the change the refusal has the new number."""
    terms = history((NOW - 1_000, EASY), (NOW, HARDER))
    async with local(tmp_path, settings={"terms": terms}) as server:
        old, new = EASY.price_sat(v2=v2), HARDER.price_sat(v2=v2)

        def opening(name: str, paid_sat: int) -> OpenRequest:
            request = DebugPayer(name, movable=v2).request(paid_sat)
            return msgspec.structs.replace(request, price_sat=new)

        assert refused(await server.opener.open(opening("short", old - 1))) == PaymentShort(
            got_sat=old - 1, need_sat=new
        )
        server.clock.now += HOLD - 1
        accepted(await server.opener.open(opening("in time", old)))
        server.clock.now += 1
        assert refused(await server.opener.open(opening("late", old))) == PaymentShort(got_sat=old, need_sat=new)
        accepted(await server.opener.open(opening("present", new)))


async def test_fault_23_a_lowered_price_counts_at_once(tmp_path: Path) -> None:
    """Easier terms apply without the holding time."""
    terms = history((NOW - 1_000, HARDER), (NOW, EASY))
    async with local(tmp_path, settings={"terms": terms}) as server:
        request = msgspec.structs.replace(PAYER.request(1_000), price_sat=EASY.v1_price_sat)
        accepted(await server.opener.open(request))


async def test_fault_23_a_longer_duration_counts_after_the_holding_time(tmp_path: Path) -> None:
    """An offered expiry can be opened, unless it ends within the present settlement period."""
    long = {"min_duration_seconds": 48 * 3600}
    terms = history(
        (NOW - 1_000, EASY), (NOW, msgspec.structs.replace(EASY, least_life_seconds=LIFE + 48 * 3600 - 3600))
    )
    async with local(tmp_path, settings={"terms": terms}, **long) as server:
        payer = DebugPayer("short life", UnixTime(NOW + LIFE + 1))
        accepted(await server.opener.open(payer.request()))
        server.clock.now += HOLD
        later = DebugPayer("short life later", UnixTime(server.clock.now + LIFE + 1))
        assert isinstance(refused(await server.opener.open(later.request())), ExpiryTooSoon)
    async with local(tmp_path / "2", settings={"terms": terms}, settlement_period_seconds=2 * LIFE) as server:
        payer = DebugPayer("within settling", UnixTime(NOW + LIFE + 1))
        assert isinstance(refused(await server.opener.open(payer.request())), ExpiryTooSoon)


async def test_fault_23_more_depth_counts_after_the_holding_time_and_freezes_no_channel(tmp_path: Path) -> None:
    """A channel opened with the earlier depth accepts payments at that depth; later channels need the new depth."""

    class OneDeep(Blocks):
        def seen(self, funding: Any) -> Any:
            return msgspec.structs.replace(funding, confirmations=1)

    terms = history((NOW - 1_000, EASY), (NOW, msgspec.structs.replace(EASY, min_confirmations=6)))
    chain = OneDeep()
    async with local(tmp_path, chain=chain, settings={"terms": terms}, min_confirmations=6) as server:
        await server.watcher.scan()
        await server.open(PAYER)
        chain.tip_hash = "02" * 32
        await server.watcher.scan()
        assert server.context.chain_view.in_danger == {}
        accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(10_001)))
        server.clock.now += HOLD
        assert refused(await server.opener.open(DebugPayer("later").request())) == FundingUnconfirmed(got=1, need=6)


@looped(
    ("now", "expected"),
    [(100, []), (2_000, ["second", "first"]), (2_000 + HOLD - 1, ["second"]), (2_000 + HOLD, [])],
)
def test_fault_23_the_holding_time_starts_when_terms_are_replaced(now: int, expected: list[str]) -> None:
    """Replaced terms stay valid for the holding time, the newest first; a clock that is set back removes none."""
    first, second, third = (msgspec.structs.replace(EASY, v1_price_sat=Sat(n)) for n in (1, 2, 3))
    names = {first: "first", second: "second", third: "third"}
    held = history((0, first), (1_999, second), (2_000, third))
    got = [names[each] for each in held.earlier(UnixTime(now))]
    assert got == (["second", "first"] if now == 100 else expected)


def test_fault_23_depth_by_value_is_part_of_the_terms() -> None:
    """A channel must keep the lowest depth with which it may have been opened."""
    table = msgspec.structs.replace(EASY, min_confirmations=6, smaller=(Depth(Sat(100), 0), Depth(Sat(1_000), 2)))
    held = history((0, table), (1_000_000, msgspec.structs.replace(EASY, min_confirmations=6)))
    rules = msgspec.structs.replace(RULES, min_confirmations=6)
    opened = [(UnixTime(1_000_000 + HOLD - 1), (0, 2, 6)), (UnixTime(1_000_000 + HOLD), (6, 6, 6))]
    for moment, expected in opened:
        assert tuple(held.confirmations_needed(Sat(sat), moment, rules) for sat in (100, 1_000, 1_001)) == expected


# --- keys of other generations ----------------------------------------------------------------------------------------


class Elsewhere(DebugPayer, frozen=True):
    """A payer with an address of another server."""

    @property
    def server_key(self) -> PrivateKey:
        return private_key("some other server")


def rotated() -> LocalSigner:
    """A signer whose newest seed is newer than the payers' addresses."""
    return LocalSigner(keys=KeyRing([hardened_keys(bytes(range(32))), StaticKey(DEBUG_KEY)], SERVER_DESTINATION))


@pytest.mark.parametrize("v2", [False, True])
async def test_fault_23_an_address_of_an_earlier_seed_is_opened_and_settled(tmp_path: Path, *, v2: bool) -> None:
    """v1 finds the script by its funding, v2 names it; the channel accepts payments and is settled with the old key."""
    async with local(tmp_path) as server:
        server.signer.real = rotated()
        request = PAYER.request()
        if v2:
            request = msgspec.structs.replace(request, outpoint=PAYER.outpoint, server_key=PAYER.terms.server_key)
        channel = accepted(await server.opener.open(request)).channel
        assert channel.terms == PAYER.terms
        drained = accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(PAYER.funding_sat)))
        assert drained.channel.closing is not None
        newest = await server.opener.terms(KEY, PAYER.expiry)
        assert newest.server_key != PAYER.terms.server_key


async def test_fault_23_a_foreign_server_key_opens_nothing(tmp_path: Path) -> None:
    """The request is funded, signed and paid correctly, but its server key is not one of the signer's."""
    async with local(tmp_path) as server:
        server.signer.real = rotated()
        payer = Elsewhere("terms")
        request = msgspec.structs.replace(payer.request(), outpoint=payer.outpoint, server_key=payer.terms.server_key)
        assert isinstance(refused(await server.opener.open(request)), WrongServerKey)
        assert await server.store.real.get(payer.outpoint) is None
