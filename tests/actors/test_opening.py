"""Opening: an outpoint can be used only once, and a refused channel leaves no record (threat 4)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Accepted, CloseByProof, Rejected, State
from paychan.protocol.errors import ChainUnavailable, ChannelExists, OutpointUsed, SignerUnavailable, SigningFailed
from paychan.signer_client.base import SignerAbsent, SignerRefused
from tests.lib.world import DebugPayer, accepted, local, refused, until

PAYER = DebugPayer("opening")


@pytest.mark.parametrize("held", ["", "commit", "get"])
async def test_threat_4_two_at_once_open_one_channel(tmp_path: Path, held: str):
    """Of 16 concurrent requests for one outpoint exactly one opens it, at whatever call the store blocks."""
    async with local(tmp_path) as server:
        if held:
            server.store.hold(held)
        requests = [PAYER.request(10_000 + n) for n in range(16)]
        opening = [asyncio.ensure_future(server.opener.open(request)) for request in requests]
        if held:
            await until(lambda: server.store.calls[held])
            server.store.release(held)
        outcomes = await asyncio.gather(*opening)
        opened = [outcome.channel for outcome in outcomes if isinstance(outcome, Accepted)]
        errors = [outcome.error for outcome in outcomes if isinstance(outcome, Rejected)]

        assert opened == [await server.stored(PAYER)]
        assert errors == [ChannelExists(outpoint=str(PAYER.outpoint))] * 15


async def test_threat_4_a_settled_outpoint_is_never_opened_again(tmp_path: Path):
    """After the channel is closed, even by another process, its outpoint stays used."""
    async with local(tmp_path) as server:
        opened = await server.open(PAYER)
        accepted(await server.registry.ask(PAYER.outpoint, CloseByProof(opened.payment)))
        assert refused(await server.opener.open(PAYER.request())) == OutpointUsed(outpoint=str(PAYER.outpoint))
    async with local(tmp_path) as server:
        assert refused(await server.opener.open(PAYER.request())) == OutpointUsed(outpoint=str(PAYER.outpoint))


@pytest.mark.parametrize(
    ("part", "method", "failure", "error"),
    [
        ("signer", "public_key", SignerAbsent("asleep"), SignerUnavailable(reason="asleep")),
        ("signer", "public_key", SignerRefused("policy-x", "no"), SigningFailed(reason="policy-x: no")),
        ("chain", "funding", ChainFailed("no tip"), ChainUnavailable(reason="no tip")),
    ],
)
async def test_without_signer_or_chain_nothing_is_opened(
    tmp_path: Path, part: str, method: str, failure: Exception, error: Exception
):
    """If signer or chain is away, the opening fails with its reason and stores nothing; later it succeeds."""
    async with local(tmp_path) as server:
        faulty = getattr(server, part)
        faulty.fail(method, failure)
        assert refused(await server.opener.open(PAYER.request())) == error
        assert await server.store.get(PAYER.outpoint) is None

        faulty.heal(method)
        accepted(await server.opener.open(PAYER.request()))


async def test_an_opening_without_change_is_settled_at_once(tmp_path: Path):
    """A first payment without change opens, closes and settles the channel in one request (RBPCP §5.2)."""
    async with local(tmp_path) as server:
        outcome = accepted(await server.opener.open(PAYER.request(PAYER.funding_sat)))

        assert outcome.value_sat == PAYER.funding_sat
        assert (await server.stored(PAYER)).state is State.CLOSED


async def test_an_opening_that_was_stored_is_answered_as_opened(tmp_path: Path):
    """If the settlement of such a channel must wait, the client still learns that its payment was accepted."""
    async with local(tmp_path) as server:
        server.signer.fail("sign_settlement", SignerAbsent("asleep"))
        outcome = accepted(await server.opener.open(PAYER.request(PAYER.funding_sat)))
        assert (outcome.value_sat, outcome.channel.state) == (PAYER.funding_sat, State.CLOSING)

        server.signer.heal("sign_settlement")
        await server.watcher.scan()
        assert (await server.stored(PAYER)).state is State.CLOSED


async def test_the_signer_is_asked_for_a_key_once(tmp_path: Path):
    """Funding info and opening of one channel ask the signer once; another expiry is another key."""
    later = msgspec.structs.replace(PAYER, expiry=PAYER.expiry + 1)
    async with local(tmp_path) as server:
        for payer in (PAYER, PAYER, later):
            await server.opener.terms(payer.terms.client_key, payer.expiry)

        assert server.signer.calls["public_key"] == 2
