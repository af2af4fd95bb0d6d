"""The receipt key: certified by the signer's own handlers, renewed in time, and no payment's business while it lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import structlog.testing

from paychan.gateway import receipt_key
from paychan.gateway.receipt_key import EARLIER_SECONDS, LIFE_SECONDS, ReceiptKey
from paychan.protocol.receipts import Paid, Verified, verify_receipt
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.signer_client.base import SignerAbsent, SignerRefused
from paychan.supervisor import Supervised
from tests.lib.world import Faulty, LocalSigner

NOW = 1_800_000_000


class World:
    """A receipt key, a signer that may fail, and the clock of both."""

    def __init__(self) -> None:
        self.now = NOW
        self.signer: Any = Faulty(LocalSigner(clock=lambda: float(self.now)))
        self.key = ReceiptKey(self.signer, lambda: UnixTime(self.now))

    def receipt(self, url: str = "https://tiles.example/5") -> bytes | None:
        """The receipt of a request that is paid now."""
        now = UnixTime(self.now)
        return self.key.sign(Paid(OutPoint(bytes(32), 0), Sat(5_000), Sat(25), Sat(0), "GET", url, now))


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


async def test_receipts_verify_by_the_signers_identity(world: World) -> None:
    """Without a certificate there is none; with one, each verifies by the identity key that the signer reports."""
    assert world.receipt() is None
    assert world.key.certificate is None

    assert await world.key.renew()

    raw = world.receipt()
    assert raw is not None
    identity = (await world.signer.health()).identity_key
    assert isinstance(verify_receipt(raw, identity), Verified)
    assert world.key.certificate is not None
    assert world.key.certificate.identity == identity


async def test_renewal_takes_another_key_before_the_end(world: World) -> None:
    """The certificate of the second day names another key, and earlier receipts still verify."""
    await world.key.renew()
    first, early = world.key.certificate, world.receipt()
    world.now += 24 * 3600

    assert await world.key.renew()

    second = world.key.certificate
    assert first is not None
    assert second is not None
    assert second.receipt_key != first.receipt_key
    assert second.identity == first.identity
    for raw in (early, world.receipt()):
        assert raw is not None
        assert isinstance(verify_receipt(raw, first.identity), Verified)


@pytest.mark.parametrize("error", [SignerAbsent("away"), SignerRefused("policy-certificate", "no")])
async def test_receipts_end_with_the_certificate_while_the_signer_is_away(
    world: World, logged: list[Any], error: Exception
) -> None:
    """The key before goes on to the last second of its certificate, then receipts are left out; the log says it once."""
    await world.key.renew()
    world.signer.fail("certify", error)

    for seconds, is_there in ((LIFE_SECONDS, True), (LIFE_SECONDS + 1, False), (-EARLIER_SECONDS - 1, False)):
        world.now = NOW + seconds
        assert not await world.key.renew()
        assert (world.receipt() is not None) == is_there
    assert [line["reason"] for line in logged if line["log_level"] == "warning"] == [str(error)]

    world.now = NOW + LIFE_SECONDS + 1
    world.signer.heal("certify")
    assert await world.key.renew()
    assert world.receipt() is not None


async def test_a_url_that_no_receipt_can_have_leaves_it_out(world: World) -> None:
    """Whatever a request line holds, signing raises nothing."""
    await world.key.renew()

    assert world.receipt("https://tiles.example/" + "a" * 100_000) is None
    assert world.receipt("https://tiles.example/\x00") is None


class Reporting(Supervised):
    """A task whose first success a test waits for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.reported = asyncio.Event()

    def succeeded(self) -> None:
        super().succeeded()
        self.reported.set()


async def test_the_task_tries_until_the_signer_is_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task needs no restart: it tries again after each pause, and reports success once a key is certified."""
    monkeypatch.setattr(receipt_key, "FIRST_PAUSE_SECONDS", 0.001)
    world.signer.fail("certify", SignerAbsent("away"), times=3)
    task = Reporting("receipt key", lambda: UnixTime(world.now), 0)

    running = asyncio.create_task(world.key.run(task))
    async with asyncio.timeout(30):
        await task.reported.wait()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running

    assert world.signer.calls["certify"] == 4
    assert task.last_success == NOW
