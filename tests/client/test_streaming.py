"""Many payments at a time: over a stream if there is one, otherwise by `PUT`; both pay the same sums."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from typer.testing import CliRunner
from websockets.sync.server import ServerConnection, serve

from paychan.cli.payer.channel import app
from paychan.client import (
    AsyncPayer,
    Channel,
    Limits,
    Patience,
    Payer,
    ServerMisbehaved,
    WouldLeaveDust,
)
from paychan.client.transport.effects import Request
from paychan.client.transport.routes import pay_request, stream_url
from paychan.protocol.types import MAX_MONEY_SAT, Sat
from paychan.protocol.wire.payment_frames import Said, Taken, read_payments, write_answers
from paychan.protocol.wire.rbpcp import Dialect
from tests.client.conftest import OpenChannel
from tests.lib.system import System


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


@pytest.fixture(params=[(2, Dialect.S), (2, Dialect.A), (1, Dialect.S)], ids=["v2-S", "v2-A", "v1"])
def channel(system: System, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Channel]:
    """An open channel to the real server; version 1 has no stream."""
    version, dialect = request.param
    limits = Limits(payment_sat=MAX_MONEY_SAT)
    with Payer(system.url, wallet=tmp_path, version=version, dialect=dialect, limits=limits) as payer:
        opened = payer.new_channel(hours=100)
        opened.fund_debug()
        opened.open()
        yield opened


def test_a_series_equals_single_payments(channel: Channel, tmp_path: Path) -> None:
    """Balance, receipt and file equal those of single payments, and the watcher sees the progress."""
    before, progress = channel.left_sat, []
    receipt = channel.pay_many(3, 500, watcher=progress.append)
    assert (receipt.paid_sat, receipt.left_sat) == (3, before - 1500)
    assert (progress[-1], sorted(progress)) == (500, progress)
    saved = Payer(wallet=tmp_path).wallet.read(channel.name)
    assert (saved.signed_sat, saved.acknowledged_sat) == (before - 1500, before - 1500)
    assert channel.pay(5).left_sat == before - 1505
    assert channel.resume().paid_sat == 0


def test_a_series_pays_as_much_as_fits(channel: Channel) -> None:
    """A series larger than the channel pays as much as fits, then fails like a single payment."""
    channel.pay(channel.left_sat - channel.record.dust_sat - 150)
    with pytest.raises(WouldLeaveDust):
        channel.pay_many(10, 20)
    assert channel.left_sat == channel.record.dust_sat


def test_payments_may_have_seconds_between_them(channel: Channel) -> None:
    """Each payment is acknowledged before the next one is signed."""
    before = channel.left_sat
    signed: list[int] = []
    channel.pay_many(7, 4, every_seconds=0.02, watcher=lambda _: signed.append(channel.record.pending_sat))
    assert channel.left_sat == before - 28
    assert max(signed) <= 7


async def test_the_same_on_an_event_loop(system: System, tmp_path: Path) -> None:
    """`AsyncChannel.pay_many` works like `Channel.pay_many`."""
    async with AsyncPayer(system.url, wallet=tmp_path) as payer:
        channel = await payer.new_channel(hours=100)
        await channel.fund_debug()
        await channel.open()
        before, progress = channel.left_sat, []
        receipt = await channel.pay_many(2, 300, watcher=progress.append)
        assert (receipt.left_sat, progress[-1]) == (before - 600, 300)
        await asyncio.gather(channel.pay_many(1, 100), channel.pay_many(1, 100))
        assert channel.left_sat == before - 800


# --- streams that fail ----------------------------------------------------------------------------------------------


class Stream:
    """A stream in front of a server that has none; the test decides what happens to the frames."""

    def __init__(self, answers: Any) -> None:
        self._server = serve(lambda connection: self._serve(connection, answers), "127.0.0.1", 0)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.frames = 0

    def _serve(self, connection: ServerConnection, answers: Any) -> None:
        for frame in connection:
            assert isinstance(frame, bytes)
            self.frames += 1
            answer = answers(self.frames, read_payments(frame))
            if answer is None:
                return
            connection.send(answer)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()


def over(monkeypatch: pytest.MonkeyPatch, stream: Stream) -> None:
    """Connect streams to this one; all other requests go to the channel's server."""
    monkeypatch.setattr("paychan.client.transport.routes.stream_url", lambda _record: stream.url)


def yes(_number: int, payments: Any) -> bytes:
    return write_answers([Taken(Sat(change), Sat(10)) for change in payments.changes])


def test_a_server_without_a_stream_is_paid_by_put(opened: OpenChannel) -> None:
    """The liar has no stream; the payments arrive all the same."""
    channel = opened()
    before = channel.left_sat
    assert channel.pay_many(10, 5).left_sat == before - 50


@pytest.mark.parametrize("frame", [1, 2, 3])
@pytest.mark.parametrize("fate", ["lost", "busy"])
def test_a_stream_that_fails_is_completed_by_put(
    opened: OpenChannel, monkeypatch: pytest.MonkeyPatch, frame: int, fate: str
) -> None:
    """The newest signed payment pays all signed ones once, and the series continues: nothing is paid twice."""
    channel = opened(patience=Patience(attempts=2, first_pause_seconds=0.001))
    before = channel.left_sat

    def answers(number: int, payments: Any) -> bytes | None:
        if number < frame:  # the server behind the stream must book them, too
            request = pay_request(channel.record, payments[-1])
            assert httpx.put(request.url, content=request.body, verify=False).status_code == 200
            return yes(number, payments)
        return None if fate == "lost" else write_answers([Said(503, b'{"code": "chain_unavailable"}')] * len(payments))

    with Stream(answers) as stream:
        over(monkeypatch, stream)
        progress: list[int] = []
        receipt = channel.pay_many(10, 300, watcher=progress.append)
    assert (channel.left_sat, receipt.left_sat, progress[-1]) == (before - 3000, before - 3000, 300)
    assert channel.record.acknowledged_sat == before - 3000


@pytest.mark.parametrize(
    "lie",
    [
        lambda _, payments: write_answers([Taken(Sat(change + 1), Sat(10)) for change in payments.changes]),
        lambda _, payments: write_answers([Taken(Sat(change), Sat(9)) for change in payments.changes]),
        lambda _, payments: write_answers([Taken(Sat(change), Sat(10**6)) for change in payments.changes]),
        lambda _, payments: write_answers([Taken(Sat(change), Sat(10)) for change in payments.changes] * 3),
        lambda _, payments: write_answers([Said(200, b"[]")] * len(payments)),
        lambda _, payments: write_answers(
            [
                Said(
                    200,
                    b'{"channel_status": "closed", "channel_value_left": 1, "value_received": 10, "settlement_txid": null}',
                )
            ]
            * len(payments)
        ),
        lambda *_: b"\x02",
        lambda *_: "text",
    ],
)
def test_a_lie_on_a_stream_is_named(opened: OpenChannel, monkeypatch: pytest.MonkeyPatch, lie: Any) -> None:
    """An answer that contradicts the signed payments is rejected; the signed payments stay."""
    channel = opened()
    before = channel.left_sat
    with Stream(lie) as stream:
        over(monkeypatch, stream)
        with pytest.raises(ServerMisbehaved):
            channel.pay_many(10, 50)
    assert channel.record.signed_sat == before - 500
    assert channel.record.acknowledged_sat == before


def test_the_wallet_covers_payments_in_flight(
    opened: OpenChannel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The record is ahead of the stream: as a frame arrives, the wallet's file already holds its newest payment."""
    channel = opened()
    saved: list[bool] = []

    def answers(number: int, payments: Any) -> bytes:
        on_disk = Payer(wallet=tmp_path / "wallet").wallet.read(channel.name)
        saved.append(on_disk.signed_sat is not None and on_disk.signed_sat <= payments.changes[-1])
        return yes(number, payments)

    with Stream(answers) as stream:
        over(monkeypatch, stream)
        channel.pay_many(10, 1000)
    assert len(saved) > 10
    assert all(saved)


def test_the_secret_is_in_no_url(opened: OpenChannel) -> None:
    """Proxies log URLs, so a stream's URL has no query."""
    record = opened().record
    asked: Request = pay_request(record, record.sign(record.left_sat))
    assert record.secret in asked.url
    assert record.secret not in stream_url(record)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_pays_at_an_interval(channel: Channel, tmp_path: Path) -> None:
    """`--times` sets the number of payments, `--every` their interval; without `--every` there is no pause."""
    before = channel.left_sat
    channel.release()
    for words, paid in ((["2", "--times", "3", "--every", "0.05"], 6), (["1", "--times", "200"], 206)):
        result = CliRunner().invoke(app, ["pay", channel.name, *words, "--json", "--wallet", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["left_sat"] == before - paid
