"""`channel_for`: one channel for each server, however often and by however many processes it is asked for."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from paychan.client import (
    AsyncPayer,
    Channel,
    ChannelInUse,
    DamagedFile,
    FundingMissing,
    Limits,
    Patience,
    Payer,
    Source,
    State,
    TermsUnacceptable,
)
from paychan.client.flows.find import Need, room_sat, same_server
from tests.lib.system import System

PAY = """
import sys
from paychan.client import Payer
url, wallet, times = sys.argv[1:]
with Payer(wallet=wallet, time_limit_seconds=60) as payer:
    channel = payer.channel_for(url)
    for _ in range(int(times)):
        channel.pay(1)
        print("paid", flush=True)
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


def program(system: System, wallet: Path, times: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PAY, system.url, str(wallet), str(times)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_fault_51_a_server_has_one_channel(system: System, tmp_path: Path) -> None:
    """Asked for again and again, by any spelling of the URL, by this payer and by later ones, it is the same channel."""
    with Payer(system.url, wallet=tmp_path) as payer:
        first = payer.channel_for()
        first.pay(1000)
        assert first.record.funding_source is Source.DEBUG
        for url in ("", system.url + "/", system.url.replace("http:", "HTTP:"), system.url):
            assert payer.channel_for(url) is first
        name, port = first.name, system.url.rsplit(":", 1)[1]
        assert payer.channel_for(f"http://127.0.0.1:{port}", room_sat=5) is first
    for _ in range(3):
        with Payer(wallet=tmp_path) as payer:
            channel = payer.channel_for(system.url)
            assert channel.name == name
            channel.pay(1)
    assert len(Payer(wallet=tmp_path).records()) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://shop.example", "HTTP://SHOP.example:80/", True),
        ("https://shop.example", "https://shop.example:443", True),
        ("https://shop.example", "http://shop.example", False),
        ("https://shop.example/a", "https://shop.example/a/", True),
        ("https://shop.example/a", "https://shop.example/b", False),
        ("https://shop.example", "https://shop.example.", True),
        ("http://[::1]:8000", "http://[::1]:8000/", True),
    ],
)
def test_fault_51_servers_are_compared_as_urls(one: str, other: str, same: bool) -> None:
    """Case, the scheme's own port and a slash at the end make no other server."""
    assert same_server(one, other) is same


def test_fault_51_another_channel_is_made_only_if_none_has_enough(system: System, tmp_path: Path) -> None:
    """The amount that must still be payable decides; a channel near its end and a closed one do not count."""
    with Payer(system.url, wallet=tmp_path, limits=Limits(payment_sat=10**14)) as payer:
        first = payer.channel_for()
        assert payer.channel_for(room_sat=room_sat(first.record)) is first
        first.pay(room_sat(first.record) - 5)
        assert payer.channel_for(room_sat=5) is first
        second = payer.channel_for(room_sat=6)
        assert second is not first
        second.close()
        third = payer.channel_for(room_sat=6)
        assert third.name not in (first.name, second.name)
        need = Need(system.url, None, 6)
        assert need.is_met(third.record, time.time())
        assert not need.is_met(third.record, third.record.expiry - 3600 * third.record.settlement_period_hours)


def test_a_call_with_less_room_goes_on_with_a_channel_that_could_not_be_funded(system: System, tmp_path: Path) -> None:
    """An earlier call asked for more than the debug funding; a later one takes the same channel for its own room."""
    with Payer(system.url, wallet=tmp_path) as payer:
        with pytest.raises(FundingMissing, match=f"{10**15 + 100_700:,}"):
            payer.channel_for(room_sat=10**15)
        (before,) = payer.records()
        channel = payer.channel_for(room_sat=5000)
        assert channel.name == before.name
        assert channel.pay(5000).paid_sat == 5000


def test_the_function_that_pays_gets_the_amount_of_its_own_call(system: System, tmp_path: Path) -> None:
    """An earlier call had planned more."""
    asked: list[int] = []
    with Payer(system.url, wallet=tmp_path) as payer:
        payer.new_channel(amount_sat=10**15).release()
        channel = payer.channel_for(room_sat=5000, fund=lambda channel: asked.append(channel.amount_sat))
        assert asked == [channel.min_funding_sat + 5000]
        assert len(payer.records()) == 1


async def test_asyncio_goes_on_with_less_room_too(system: System, tmp_path: Path) -> None:
    async with AsyncPayer(system.url, wallet=tmp_path) as payer:
        with pytest.raises(FundingMissing):
            await payer.channel_for(room_sat=10**15)
        channel = await payer.channel_for(room_sat=5000)
        assert (channel.record.state, len(payer.records())) == (State.OPEN, 1)


@pytest.mark.parametrize("way", ["forget", "open"])
def test_a_debug_channel_that_was_planned_too_large_is_no_dead_end(system: System, tmp_path: Path, way: str) -> None:
    """It leaves the list, because no chain has its coins; or the debug funding opens it, since no other one can come."""
    with Payer(system.url, wallet=tmp_path) as payer:
        with pytest.raises(FundingMissing):
            payer.channel_for(room_sat=10**15)
        (record,) = payer.records()
        assert [each.source for each in record.deposits] == [Source.DEBUG]
        channel = payer.channel(record.name)
        if way == "forget":
            channel.forget()
            assert payer.records() == []
        else:
            assert channel.wait_funded(0).source is Source.DEBUG
            assert channel.open().paid_sat == record.open_price_sat


def test_fault_51_a_channel_that_the_server_closed_is_replaced(system: System, tmp_path: Path) -> None:
    """The server is asked once when a channel of an earlier program is taken."""
    with Payer(system.url, wallet=tmp_path) as payer:
        first = payer.channel_for()
        name = first.name
        copy = (tmp_path / f"{name}.json").read_bytes()
        first.close()
    (tmp_path / f"{name}.json").write_bytes(copy)

    with Payer(system.url, wallet=tmp_path) as payer:
        second = payer.channel_for()
        assert second.name != name
        assert payer.wallet.read(name).state is State.CLOSED


def test_fault_51_a_new_channel_keeps_the_limits(system: System, tmp_path: Path) -> None:
    """Price, amount and hours are bounded before there is an address; the amount is the least that suffices."""
    with Payer(system.url, wallet=tmp_path, limits=Limits(open_price_sat=99_999)) as payer:
        with pytest.raises(TermsUnacceptable, match="open price"):
            payer.channel_for()
        assert payer.records() == []
    with Payer(system.url, wallet=tmp_path) as payer:
        with pytest.raises(TermsUnacceptable, match="amount to fund"):
            payer.channel_for(amount_sat=100_000)
        with pytest.raises(TermsUnacceptable, match="amount to fund"):
            payer.channel_for(amount_sat=200_000, room_sat=100_000)
        with pytest.raises(TermsUnacceptable, match="hours"):
            payer.channel_for(hours=1)
        with pytest.raises(ValueError, match="want 0 or more"):
            payer.channel_for(room_sat=-1)
        assert payer.records() == []


def test_fault_51_processes_share_a_channel(system: System, tmp_path: Path) -> None:
    """Programs that start at once make one channel, and pay over it in turn."""
    programs = [program(system, tmp_path, 5) for _ in range(4)]
    for each in programs:
        each.communicate(timeout=120)
        assert each.returncode == 0

    (record,) = Payer(wallet=tmp_path).records()
    assert record.paid_sat == record.open_price_sat + 20


def test_fault_51_a_channel_in_use_is_waited_for_and_none_is_made(system: System, tmp_path: Path) -> None:
    """While another program holds the channel, the call waits until the time limit."""
    holder = program(system, tmp_path, 1_000_000)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "paid\n"
    with Payer(system.url, wallet=tmp_path, time_limit_seconds=1) as payer:
        with pytest.raises(ChannelInUse):
            payer.channel_for()
        assert len(payer.records()) == 1
    holder.kill()
    holder.communicate()


def test_fault_51_after_a_kill_the_same_channel_goes_on(system: System, tmp_path: Path) -> None:
    """Killed at any moment, also while the channel is made, the next program pays over the only channel."""
    for delay in (0.3, 0.5, 0.7, 0.9, 1.1, 1.3):
        killed = program(system, tmp_path, 1_000_000)
        time.sleep(delay)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert len(Payer(wallet=tmp_path).records()) <= 1

    with Payer(system.url, wallet=tmp_path) as payer:
        receipt = payer.channel_for().pay(7)
        assert receipt.paid_sat == 7
        assert len(payer.records()) == 1


def test_fault_51_threads_share_a_channel(system: System, tmp_path: Path) -> None:
    """Threads of one payer get the same object."""
    found: list[Channel] = []
    with Payer(system.url, wallet=tmp_path) as payer:
        threads = [threading.Thread(target=lambda: found.append(payer.channel_for())) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(set(map(id, found))) == 1
        assert len(found) == 8
        assert len(payer.records()) == 1


async def test_fault_51_the_same_on_an_event_loop(system: System, tmp_path: Path) -> None:
    """Tasks of one `AsyncPayer` get the same object, and a later payer the same channel."""
    async with AsyncPayer(system.url, wallet=tmp_path) as payer:
        found = await asyncio.gather(*(payer.channel_for() for _ in range(5)))
        assert len(set(map(id, found))) == 1
        await found[0].pay(10)
        name = found[0].name
    async with AsyncPayer(system.url, wallet=tmp_path) as payer:
        assert (await payer.channel_for()).name == name


def test_fault_51_a_damaged_file_stands_against_a_new_channel(system: System, tmp_path: Path) -> None:
    """The file might be the channel that is looked for, so its damage is named, and no other channel is made."""
    with Payer(system.url, wallet=tmp_path, patience=Patience(attempts=1)) as payer:
        channel = payer.channel_for()
        file = tmp_path / f"{channel.name}.json"
        channel.release()
        good = file.read_bytes()
        file.write_bytes(good[:100])
        with pytest.raises(DamagedFile):
            payer.channel_for()
        file.write_bytes(good)
        assert payer.channel_for().name == channel.name


def test_fault_51_a_channel_of_another_network_does_not_count(system: System, tmp_path: Path) -> None:
    """A payer that accepts one network alone takes no channel of another."""
    with Payer(system.url, wallet=tmp_path) as payer:
        record = payer.channel_for().record
    need = Need(system.url, record.network, 1)
    assert need.is_met(record, time.time())
    assert not any(
        structs.replace(need, network=each).is_met(record, time.time())
        for each in type(record.network)
        if each is not record.network
    )
