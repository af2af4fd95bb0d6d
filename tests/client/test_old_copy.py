"""A wallet that is an old copy takes over the newest payment from the server, once its own signature proves it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from typer.testing import CliRunner

from paychan.cli.main import app
from paychan.client import (
    AsyncPayer,
    Channel,
    ChannelGone,
    CountedLess,
    Dialect,
    InsufficientFunds,
    Payer,
    PaymentRefused,
    ServerMisbehaved,
    State,
    WrongValue,
)
from paychan.client.record import ChannelRecord
from paychan.client.seed import seed_of_words
from paychan.client.transport.answers import check_result
from paychan.protocol.types import Sat
from paychan.protocol.wire.rbpcp import ChannelStatus, PaymentResult
from tests.client.conftest import DRAINS, IMPATIENT, OpenChannel
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, Liar, Lie
from tests.lib.customer import wait_for
from tests.lib.system import System

ELSEWHERE_SAT = 500
"""Paid by the newer copy since the older one was made."""

SPOKEN = pytest.mark.parametrize(
    ("version", "dialect"), [(1, Dialect.S), (2, Dialect.S), (2, Dialect.A)], ids=["v1", "v2-S", "v2-A"]
)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


@pytest.fixture
def copied(system: System, tmp_path: Path) -> Iterator[Callable[..., tuple[Channel, Channel]]]:
    """Make an open channel and a copy of its wallet; the first of both then pays `ELSEWHERE_SAT`."""
    payers: list[Payer] = []

    def make(version: int = 2, dialect: Dialect = Dialect.S, paid: int = ELSEWHERE_SAT) -> tuple[Channel, Channel]:
        payer = Payer(
            system.url, wallet=tmp_path / "new", version=2 if version == 2 else 1, dialect=dialect, limits=DRAINS
        )
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        channel.open()
        channel.pay(7)
        shutil.copytree(tmp_path / "new", tmp_path / "old")
        if paid:
            channel.pay(paid)
        copy = Payer(wallet=tmp_path / "old")
        payers.extend((payer, copy))
        return channel, copy.channel(channel.name)

    yield make
    for payer in payers:
        payer.close()


Copied = Callable[..., tuple[Channel, Channel]]


def stored(channel: Channel, directory: Path) -> ChannelRecord:
    """The record in the wallet's directory."""
    return Payer(wallet=directory).wallet.read(channel.name)


@SPOKEN
def test_fault_50_an_old_copy_pays_on_from_the_newest_payment(
    copied: Copied, tmp_path: Path, version: int, dialect: Dialect
) -> None:
    """The payment is made on top of those of the other copy, once; the receipt says what was taken over."""
    newer, older = copied(version, dialect)

    receipt = older.pay(20)

    assert (receipt.paid_sat, receipt.taken_over_sat, receipt.repeated) == (20, ELSEWHERE_SAT, False)
    assert receipt.total_paid_sat == newer.paid_sat + 20
    assert stored(older, tmp_path / "old").acknowledged_sat == newer.left_sat - 20
    again = newer.pay(5)  # now the other copy is the old one
    assert (again.total_paid_sat, again.taken_over_sat) == (older.paid_sat + 5, 20)
    assert older.pay(1).taken_over_sat == 5


@SPOKEN
def test_fault_50_the_status_of_an_old_copy_is_the_newest(copied: Copied, version: int, dialect: Dialect) -> None:
    """`status` takes over the newest payment; then nothing is unanswered, and the next payment needs no more."""
    newer, older = copied(version, dialect)

    assert older.status().paid_sat == newer.paid_sat
    assert not older.record.unacknowledged
    assert older.pay(1).taken_over_sat == 0


@SPOKEN
def test_fault_50_an_old_copy_resumes(copied: Copied, version: int, dialect: Dialect) -> None:
    """`resume` pays nothing more and takes over the newest payment."""
    newer, older = copied(version, dialect)

    receipt = older.resume()

    assert (receipt.paid_sat, receipt.taken_over_sat, receipt.total_paid_sat) == (0, ELSEWHERE_SAT, newer.paid_sat)


@SPOKEN
@pytest.mark.parametrize("fee", [0, 1000])
def test_fault_50_an_old_copy_closes(copied: Copied, version: int, dialect: Dialect, fee: int) -> None:
    """The server settles the newest payment, and the change is what that leaves."""
    newer, older = copied(version, dialect, 5000)
    offered = fee if version == 2 else 0

    settled = older.close(offered)

    assert settled.change_sat == newer.left_sat - offered
    assert settled.offered_fee_sat == offered
    assert older.record.state is State.CLOSED


@pytest.mark.parametrize("times", [3, 200])
def test_fault_50_an_old_copy_pays_many_times(copied: Copied, times: int) -> None:
    """Payments of a stream that the other copy had made before are not counted: all of the series come on top."""
    newer, older = copied(2, Dialect.S, 90)

    receipt = older.pay_many(1, times)

    assert receipt.total_paid_sat == newer.paid_sat + times == older.paid_sat


def test_fault_50_an_old_copy_pays_many_times_over_one_request_each(copied: Copied) -> None:
    """The same without a stream."""
    newer, older = copied(1, Dialect.S, 90)

    assert older.pay_many(1, 30).total_paid_sat == newer.paid_sat + 30


def test_fault_50_a_copy_from_before_the_opening_opens(system: System, tmp_path: Path) -> None:
    """The copy knows the funding only; opening with the same amount takes over the channel as it is."""
    with Payer(system.url, wallet=tmp_path / "new") as payer, Payer(wallet=tmp_path / "old") as copy:
        newer = payer.new_channel(hours=100)
        newer.fund_debug()
        shutil.copytree(tmp_path / "new", tmp_path / "old", dirs_exist_ok=True)
        newer.open()
        newer.pay(ELSEWHERE_SAT)
        older = copy.channel(newer.name)

        receipt = older.open()

        assert (receipt.taken_over_sat, receipt.repeated) == (ELSEWHERE_SAT, True)
        assert older.pay(1).total_paid_sat == newer.paid_sat + 1


@pytest.mark.parametrize("version", [1, 2])
def test_a_channel_without_a_file_comes_back_from_the_seed(
    system: System, tmp_path: Path, version: Literal[1, 2]
) -> None:
    """Words, server, index and expiry suffice: the payments are taken over, and both wallets pay on the same channel."""
    with (
        Payer(system.url, wallet=tmp_path / "new", version=version) as payer,
        Payer(system.url, wallet=tmp_path / "old", version=version) as copy,
    ):
        payer.new_channel(hours=100).release()
        newer = payer.new_channel(hours=100)
        newer.fund_debug()
        newer.open()
        newer.pay(ELSEWHERE_SAT)
        copy.wallet.seed.put(seed_of_words(payer.wallet.seed.read().words, next_index=0))

        older = copy.restore_channel(newer.record.expiry, index=1)
        older.fund_debug()
        receipt = older.open()

        assert receipt.taken_over_sat == ELSEWHERE_SAT
        assert older.pay(1).total_paid_sat == newer.paid_sat + 1
        assert copy.wallet.seed.read().next_index == 2


def test_a_channel_comes_back_by_command(system: System, tmp_path: Path) -> None:
    """`paychan wallet restore --words-file --server --expires` and `paychan channel open` pay on."""
    old = str(tmp_path / "old")
    with Payer(system.url, wallet=tmp_path / "new") as payer:
        newer = payer.new_channel(hours=100)
        newer.fund_debug()
        newer.open()
        newer.pay(ELSEWHERE_SAT)
        (tmp_path / "words").write_text(" ".join(payer.wallet.seed.read().words))
    given = ["--words-file", str(tmp_path / "words"), "--server", system.url, "--expires", str(newer.record.expiry)]

    made = CliRunner().invoke(app, ["wallet", "restore", *given, "--debug", "--wallet", old])
    opened = CliRunner().invoke(app, ["channel", "open", newer.name, "--wallet", old, "--json"])

    assert made.exit_code == 0, made.output
    assert f"channel open {newer.name}" in made.stdout
    assert json.loads(opened.stdout)["taken_over_sat"] == ELSEWHERE_SAT
    assert CliRunner().invoke(app, ["wallet", "restore", "--server", system.url]).exit_code == 2


def test_a_channel_of_the_wallet_is_not_restored_over(system: System, tmp_path: Path) -> None:
    """The file stays as it is."""
    with Payer(system.url, wallet=tmp_path) as payer:
        channel = payer.new_channel(hours=100)
        channel.release()
        with pytest.raises(FileExistsError):
            payer.restore_channel(channel.record.expiry)
        with pytest.raises(WrongValue):
            payer.restore_channel(channel.record.expiry, index=-1)


def test_fault_50_what_does_not_fit_the_newest_payment_is_declined(
    liar: Liar, opened: OpenChannel, tmp_path: Path
) -> None:
    """A payment is declined if less is left than the old copy believes; the record is the newest all the same."""
    channel = opened()
    shutil.copytree(tmp_path / "wallet", tmp_path / "old")
    channel.pay(channel.left_sat - 1000)
    with Payer(wallet=tmp_path / "old", patience=IMPATIENT) as payer:
        older = payer.channel(channel.name)

        with pytest.raises(InsufficientFunds, match="want to pay 2,000 sat, 1,000 sat left"):
            older.pay(2000)

        assert (older.left_sat, older.record.unacknowledged) == (1000, False)
        assert older.pay(10).total_paid_sat == FUNDING_SAT - 990 == liar.received_sat


@SPOKEN
@pytest.mark.parametrize("amount", [20, 35])
def test_fault_50_a_payment_that_includes_the_other_copy_s_says_so(
    copied: Copied, version: int, dialect: Dialect, amount: int
) -> None:
    """The server counts only the rest as new, which the error says; then both agree, and nothing was paid twice."""
    newer, older = copied(version, dialect, 20)

    with pytest.raises(CountedLess, match=f"only {amount - 20} sat of its {amount} sat as new") as error:
        older.pay(amount)

    total = older.status().paid_sat
    assert total == newer.paid_sat + amount - 20
    assert f"the payment counted, but only {amount - 20} sat" in str(error.value)
    assert f"In all {total:,} sat are paid now" in str(error.value)
    assert "Don't repeat the payment" in str(error.value)
    assert error.value.fields["total_sat"] == total
    newer.status()
    assert older.pay(1).total_paid_sat == newer.paid_sat + 1


@pytest.mark.parametrize("times", [2, 200])
def test_a_series_that_includes_the_other_copy_s_payment_says_so(copied: Copied, times: int) -> None:
    """The same over a stream: the sum counts all that was signed and sent, and both copies agree afterwards."""
    newer, older = copied(2, Dialect.S, 20)

    with pytest.raises(CountedLess, match="the payment counted, but only 15 sat of its 35 sat as new") as error:
        older.pay_many(35, times)

    assert error.value.fields["total_sat"] == older.status().paid_sat == newer.status().paid_sat


@pytest.mark.parametrize("address", ["", "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY"])
def test_fault_50_an_old_copy_of_a_closed_channel_takes_over_the_settlement(copied: Copied, address: str) -> None:
    """The settlement that the server shows holds the payer's own signature over less change."""
    newer, older = copied()
    settled = newer.close(change_address=address)

    again = older.close()

    assert (again.settlement_txid, again.change_sat) == (settled.settlement_txid, settled.change_sat)
    assert again.change_address == settled.change_address
    assert (older.left_sat, again.offered_fee_sat) == (newer.left_sat, 0)


def test_fault_50_an_old_copy_of_a_drained_channel(copied: Copied) -> None:
    """A channel that the other copy drained is closed without change."""
    newer, older = copied()
    newer.pay(drain=True)

    assert older.close().change_sat == 0
    assert older.left_sat == 0


def test_fault_50_paying_from_an_old_copy_of_a_closed_channel_is_refused(copied: Copied) -> None:
    """The channel is gone; nothing is lost."""
    newer, older = copied()
    newer.close()

    with pytest.raises(ChannelGone):
        older.pay(20)
    assert older.record.state is State.CLOSED


@SPOKEN
@pytest.mark.parametrize("way", ["status", "close", "pay, then close", "pay, then status"])
def test_fault_50_an_old_copy_of_a_closed_channel_knows_its_change(
    copied: Copied, version: int, dialect: Dialect, way: str
) -> None:
    """Whichever command asks first: the change is that of the settlement, not what the old copy had left."""
    newer, older = copied(version, dialect)
    settled = newer.close()
    for step in way.split(", then "):
        if step == "pay":
            with pytest.raises(ChannelGone):
                older.pay(20)
        elif step == "status":
            older.status()
    again = older.close()

    assert (again.settlement_txid, again.change_sat) == (settled.settlement_txid, settled.change_sat)
    assert (older.record.state, older.left_sat) == (State.CLOSED, newer.left_sat)
    assert older.record.offered_fee_sat == 0


def test_fault_50_an_old_copy_of_a_channel_that_the_server_closed(copied: Copied, system: System) -> None:
    """The operator closed the channel: the settlement holds the payer's signature over the newest change."""
    newer, older = copied()
    assert (
        system.manage("POST", f"/channels/{newer.record.funding_outpoint.replace(':', '/')}/close").status_code == 200
    )

    wait_for(lambda: older.status().state is State.CLOSED, "closed")

    assert older.left_sat == newer.left_sat


async def test_fault_50_asyncio_takes_over_too(copied: Copied, tmp_path: Path) -> None:
    newer, older = copied()
    older.release()
    async with AsyncPayer(wallet=tmp_path / "old") as payer:
        channel = payer.channel(newer.name)
        assert (await channel.pay(20)).total_paid_sat == newer.paid_sat + 20


@pytest.mark.parametrize(("value", "error"), [(5, CountedLess), (10**13, ServerMisbehaved), (100, None)])
def test_a_wide_range_of_values_is_compared_at_once(value: int, error: type[Exception] | None) -> None:
    """The values that may have been received are a range of up to all the coins of a channel; no step counts through."""
    result = PaymentResult(ChannelStatus.OPEN, Sat(7), Sat(value), None)
    compared = partial(check_result, result, ChannelStatus.OPEN, {7}, range(10, 10**13), 10**13 - 1)
    if error is None:
        compared()
    else:
        with pytest.raises(error):
            compared()


# --- a server that lies ---------------------------------------------------------------------------------------------


def refusal_of(record: ChannelRecord, newest: object, proof: object, code: str = "value_backwards") -> Lie:
    """A refusal that claims a newest payment; the request is ignored."""
    body = {"code": code, "error": "payment takes value back", "got_sat": record.left_sat, "need_sat": newest}
    more = {} if proof is None else {"newest_sha256": proof}
    return Lie(status=400, body=msgspec.json.encode(body | more), deaf=True)


def claims(record: ChannelRecord) -> dict[str, tuple[object, object]]:
    """Claims of a payment that the payer never made, by name."""
    agreed = record.acknowledged_sat or 0
    never = record.sign(record.acknowledged_sat or record.funding_sat)
    known = hashlib.sha256(never.signature).hexdigest()
    return {
        "a number alone": (agreed - 5000, None),
        "the hash of a payment that the server has": (agreed - 5000, known),
        "nothing hashed": (agreed - 5000, hashlib.sha256(b"").hexdigest()),
        "no text": (agreed - 5000, 5),
        "all": (0, known),
        "below zero": (-1, known),
        "more than funded": (FUNDING_SAT + 1, known),
        "a fraction": (agreed - 0.5, known),
        "a truth value": (True, known),
        "text": (str(agreed - 1), known),
        "a list": ([agreed - 1], [known]),
        "too large": (10**30, known),
    }


@pytest.mark.parametrize("code", ["value_backwards", "not_newest_payment"])
@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("way", ["pay", "status", "resume", "close"])
def test_fault_50_no_number_is_taken_over_without_the_payer_s_signature(
    liar: Liar, opened: OpenChannel, number: int, way: str, code: str
) -> None:
    """A claim without the hash of a signature that this key made changes no amount; the next payment is not larger."""
    channel = opened()
    before = channel.record
    claim = list(claims(before).values())[number]
    liar.lies.append(refusal_of(before, *claim, code=code))
    act = {"pay": lambda: channel.pay(50), "status": channel.status, "resume": channel.resume, "close": channel.close}

    with pytest.raises(PaymentRefused):
        act[way]()

    assert channel.record.acknowledged_sat == before.acknowledged_sat
    assert channel.left_sat == before.left_sat - (50 if way == "pay" else 0)
    assert channel.pay(60).total_paid_sat == OPEN_PRICE_SAT + 60 == liar.received_sat


def test_a_proof_is_taken_over_once_for_each_request(liar: Liar, opened: OpenChannel) -> None:
    """A server that proves one payment after the other does not keep the client busy, and gets nothing more."""
    channel = opened()
    for _ in range(5):
        channel.pay(10)
    copy = msgspec.structs.replace(
        channel.record, signed_sat=FUNDING_SAT - 10_000, acknowledged_sat=FUNDING_SAT - 10_000
    )
    channel._keep(copy)
    left = [FUNDING_SAT - 10_010, FUNDING_SAT - 10_020, FUNDING_SAT - 10_030]
    liar.lies.extend(refusal_of(copy, newest, copy.sign(newest).proof) for newest in left)

    with pytest.raises(PaymentRefused):
        channel.status()

    assert channel.record.acknowledged_sat == left[0]
    assert len(liar.lies) == 1
    liar.lies.clear()
    assert channel.status().acknowledged_sat == FUNDING_SAT - 10_050


def test_a_server_without_proofs_refuses_as_before(liar: Liar, opened: OpenChannel, tmp_path: Path) -> None:
    """Without the proof, the refusal reaches the caller with both numbers."""
    channel = opened()
    shutil.copytree(tmp_path / "wallet", tmp_path / "old")
    channel.pay(100)
    with Payer(wallet=tmp_path / "old", patience=IMPATIENT) as payer:
        older = payer.channel(channel.name)
        liar.lies.append(Lie(change={"newest_sha256": ...}))
        with pytest.raises(PaymentRefused) as caught:
            older.pay(20)
        assert caught.value.fields["need_sat"] == channel.left_sat
        assert older.pay(30).total_paid_sat == channel.paid_sat + 30
