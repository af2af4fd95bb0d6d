"""A payer's whole life against the real server and the real signer, in every version and dialect."""

from __future__ import annotations

import asyncio
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from paychan import client
from paychan.client import AsyncPayer, ChannelConflict, ChannelGone, Dialect, Payer, State
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT
from paychan.protocol.expiry import MAX_EXPIRY
from tests.client.conftest import DRAINS
from tests.lib.system import System

SPOKEN = pytest.mark.parametrize(
    ("version", "dialect"), [(1, Dialect.S), (2, Dialect.S), (2, Dialect.A)], ids=["v1", "v2-S", "v2-A"]
)
ADDRESS = "mmA2XECa7bVERzQKkyy1pNBQ3PC4HnxTC5"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


@SPOKEN
def test_open_pay_close(system: System, tmp_path: Path, version: int, dialect: Dialect) -> None:
    """A channel opens at the open price, takes payments, and settles with exactly the last signed change."""
    with Payer(system.url, wallet=tmp_path, version=version, dialect=dialect) as payer:
        channel = payer.new_channel(hours=100, change_address=ADDRESS)
        channel.fund_debug()
        price = channel.record.open_price_sat
        assert channel.open().paid_sat == price
        for amount_sat in (1, 1000, 1):
            assert channel.pay(amount_sat).paid_sat == amount_sat
        assert channel.status().left_sat == DEBUG_FUNDING_SAT - price - 1002

        settled = channel.close()

        assert (settled.change_sat, settled.change_address) == (DEBUG_FUNDING_SAT - price - 1002, ADDRESS)
        assert channel.close() == structs.replace(settled, before=True), "closing again returns the same"
        seen = system.channel(channel.record.outpoint)
        assert settled.settlement_txid in str(seen)


def test_the_first_payment_takes_five_lines(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in the package's own documentation is a program that pays."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path))
    example = textwrap.dedent((client.__doc__ or "").partition("\n\n")[2]).replace("http://localhost:8000", system.url)
    found: dict[str, Any] = {}
    exec(example, found)

    assert len([line for line in example.splitlines() if line]) == 5
    assert found["receipt"].paid_sat == 1000


@SPOKEN
def test_drain(system: System, tmp_path: Path, version: int, dialect: Dialect) -> None:
    """Paying everything closes the channel in the same request."""
    with Payer(system.url, wallet=tmp_path, version=version, dialect=dialect, limits=DRAINS) as payer:
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        channel.open()

        receipt = channel.pay(drain=True)

        assert (receipt.left_sat, receipt.total_paid_sat) == (0, DEBUG_FUNDING_SAT)
        assert len(receipt.settlement_txid) == 64
        assert channel.record.state is State.CLOSED


@SPOKEN
def test_a_wallet_directory_is_all_that_a_channel_needs(
    system: System, tmp_path: Path, version: int, dialect: Dialect
) -> None:
    """A wallet directory is all that a channel needs: a later process resumes, pays and closes with it."""
    with Payer(system.url, wallet=tmp_path, version=version, dialect=dialect) as payer:
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        channel.open()
        channel.pay(10)
    with Payer(wallet=tmp_path) as later, later.channel(channel.name) as again:
        assert not again.resume().repeated
        assert again.pay(5).total_paid_sat == channel.paid_sat + 5
        again.close()


@SPOKEN
def test_an_outpoint_opens_one_channel_only(system: System, tmp_path: Path, version: int, dialect: Dialect) -> None:
    """A settled channel's outpoint cannot be opened again, and the error says so."""
    with Payer(system.url, wallet=tmp_path, version=version, dialect=dialect) as payer:
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        file = tmp_path / f"{channel.name}.json"
        before = file.read_bytes()
        channel.open()
        channel.close()
        channel.release()
        file.write_bytes(before)
        with pytest.raises(ChannelConflict):
            payer.channel(channel.name).open()


@pytest.mark.parametrize("version", [1, 2])
def test_a_channel_that_the_operator_closed(system: System, tmp_path: Path, version: int) -> None:
    """A payment after the server settled raises ChannelGone and records the settlement; close then returns it."""
    with Payer(system.url, wallet=tmp_path, version=version) as payer:
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        channel.open()
        txid, vout = channel.record.funding_outpoint.split(":")
        system.manage("POST", f"/channels/{txid}/{vout}/close")
        with pytest.raises(ChannelGone) as caught:
            channel.pay(5)

        assert caught.value.fields["txid"] == channel.close().settlement_txid
        assert channel.record.state is State.CLOSED


def test_a_fee_and_another_address_for_the_change(system: System, tmp_path: Path) -> None:
    """A v2 closing moves the fee to the server and the change to the new address."""
    with Payer(system.url, wallet=tmp_path) as payer:
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        channel.open()

        settled = channel.close(fee_sat=5_000, change_address=ADDRESS)
        assert settled.offered_fee_sat == 5_000
        assert settled.paid_fee_sat is not None

        assert settled.change_sat == DEBUG_FUNDING_SAT - channel.record.open_price_sat - 5_000
        assert settled.change_address == ADDRESS


@pytest.mark.parametrize("version", [1, 2])
def test_a_restarted_server_knows_every_acknowledged_payment(tmp_path: Path, version: int) -> None:
    """A server killed (SIGKILL) between payments loses nothing: the next payment continues."""
    with System(tmp_path / "system") as system:
        with Payer(system.url, wallet=tmp_path / "wallet", version=version) as payer:
            channel = payer.new_channel(hours=100)
            channel.fund_debug()
            channel.open()
            channel.pay(10)
        system.restart_server()
        file = tmp_path / "wallet" / f"{channel.name}.json"
        file.write_text(file.read_text().replace(channel.record.url, system.url))
        with Payer(wallet=tmp_path / "wallet") as payer, payer.channel(channel.name) as again:
            assert again.pay(1).total_paid_sat == channel.paid_sat + 1


def test_threads_share_a_channel(system: System, tmp_path: Path) -> None:
    """Payments of several threads are sent one after another, and all count."""
    with Payer(system.url, wallet=tmp_path) as payer:
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        paid = channel.open().total_paid_sat

        def pay_ten() -> None:
            for _ in range(10):
                channel.pay(3)

        threads = [threading.Thread(target=pay_ten) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert channel.paid_sat == paid + 4 * 10 * 3
        assert not channel.status().unacknowledged


@SPOKEN
async def test_a_whole_channel_on_an_event_loop(system: System, tmp_path: Path, version: int, dialect: Dialect) -> None:
    """AsyncPayer works like Payer; tasks that share a channel pay one after another."""
    async with AsyncPayer(system.url, wallet=tmp_path, version=version, dialect=dialect) as payer:
        channel = await payer.new_channel(hours=100)
        await channel.fund_debug()
        opened = await channel.open()
        receipts = await asyncio.gather(*(channel.pay(7) for _ in range(20)))
        assert max(receipt.total_paid_sat for receipt in receipts) == opened.paid_sat + 140
        assert (await channel.status()).state is State.OPEN

        settled = await channel.close()

    assert settled.change_sat == DEBUG_FUNDING_SAT - opened.paid_sat - 140


async def test_a_cancelled_payment_can_be_resumed(system: System, tmp_path: Path) -> None:
    """A task that is cancelled at any point of a payment leaves a record that includes the payment."""
    async with AsyncPayer(system.url, wallet=tmp_path) as payer:
        channel = await payer.new_channel(hours=100)
        await channel.fund_debug()
        await channel.open()
        for step in range(0, 60, 3):
            before = channel.paid_sat
            task = asyncio.create_task(channel.pay(10))
            for _ in range(step):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert channel.paid_sat in (before, before + 10)
            await channel.resume()
            assert payer.wallet.read(channel.name) == channel.record
        assert (await channel.close()).change_sat == channel.left_sat


def test_expiries_up_to_the_last_one(system: System, tmp_path: Path) -> None:
    """A channel may expire as late as nLockTime allows, with a five-byte expiry in its script."""
    with Payer(system.url, wallet=tmp_path) as payer:
        channel = payer.new_channel(expires=MAX_EXPIRY)
        channel.fund_debug()
        channel.open()

        assert channel.refund().transaction[-4:] == b"\xff\xff\xff\xff"
