"""Numbers that a program gives the library: a wrong one is refused before anything is written or sent."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from paychan.client import (
    AsyncPayer,
    Channel,
    ClientError,
    Limits,
    Payer,
    RecordNotWritten,
    TermsUnacceptable,
    WrongNumber,
)
from paychan.protocol.types import MAX_MONEY_SAT
from tests.client.conftest import IMPATIENT, OpenChannel
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, TXID, Liar
from tests.lib.looped import looped

NO_NUMBERS = [3.0, 1.5, float("nan"), float("inf"), True, "3", Decimal(3), Fraction(3), None]

CALLS: dict[str, Callable[[Channel, Any], object]] = {
    "pay": lambda channel, value: channel.pay(value),
    "pay_many": lambda channel, value: channel.pay_many(value, 2),
    "pay_many, one": lambda channel, value: channel.pay_many(value, 1),
    "pay_many, times": lambda channel, value: channel.pay_many(1, value),
    "close": lambda channel, value: channel.close(value),
    "coins_at": lambda channel, value: channel.coins_at(f"{TXID}:0", value),
    "refund": lambda channel, value: channel.refund(value, unchecked=True),
}
OPTIONAL: dict[str, Callable[[Channel, Any], object]] = {
    "max_fee_sat": lambda channel, value: channel.close(1, max_fee_sat=value),
    "refund, max_fee_sat": lambda channel, value: channel.refund(max_fee_sat=value, unchecked=True),
    "bip21": lambda channel, value: channel.bip21(value),
}


class Index:
    """A whole number of another library, such as numpy's int64."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __index__(self) -> int:
        return self._value

    def __repr__(self) -> str:  # names tests: the same in each worker
        return f"Index({self._value})"


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("call", [*CALLS, *OPTIONAL])
def test_a_wrong_number_changes_nothing(opened: OpenChannel, tmp_path: Path, call: str, value: object) -> None:
    """The error has a code and is a TypeError; the file, which stays readable, and the server know nothing of it."""
    if value is None and call in OPTIONAL:
        return
    channel = opened()
    path = tmp_path / "wallet" / f"{channel.name}.json"
    before = path.read_bytes()

    with pytest.raises(WrongNumber, match="want a whole number") as error:
        (CALLS | OPTIONAL)[call](channel, value)

    assert isinstance(error.value, TypeError)
    assert error.value.code == "wrong_number"
    assert path.read_bytes() == before
    assert channel.pay(1).total_paid_sat == OPEN_PRICE_SAT + 1


@pytest.mark.parametrize("value", [3.0, True, "3", Decimal(3)], ids=repr)
def test_a_wrong_number_opens_and_funds_nothing(funded: OpenChannel, tmp_path: Path, value: Any) -> None:
    channel = funded()
    before = (tmp_path / "wallet" / f"{channel.name}.json").read_bytes()
    for call in (
        lambda: channel.open(value),
        lambda: channel.fund(f"{TXID}:0", value, unchecked=True),
        lambda: channel.wait_funded(0, enough_sat=value),
    ):
        with pytest.raises(WrongNumber):
            call()
    with pytest.raises(TermsUnacceptable, match="value_sat in satoshi"):
        channel.fund(f"{TXID}:0", MAX_MONEY_SAT + 1, unchecked=True)
    assert (tmp_path / "wallet" / f"{channel.name}.json").read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        {"hours": "3"},
        {"hours": True},
        {"hours": Decimal(100)},
        {"hours": None},
        {"hours": float("nan")},
        {"hours": 10**400},
        {"amount_sat": 500_000.0},
        {"amount_sat": None},
        {"amount_sat": True},
        {"amount_sat": MAX_MONEY_SAT + 1},
        {"amount_sat": -1},
        {"expires": 2_000_000_000.5},
        {"expires": True},
        {"room_sat": 1.5},
        {"room_sat": "5"},
        {"room_sat": None},
        {"room_sat": True},
        {"room_sat": MAX_MONEY_SAT + 1},
        {"room_sat": MAX_MONEY_SAT},
    ],
    ids=repr,
)
def test_a_wrong_number_makes_no_channel(liar: Liar, tmp_path: Path, words: dict[str, Any]) -> None:
    """Neither a key nor a file is made for an amount that no output can hold, or for a value of the wrong type."""
    with Payer(liar.url, wallet=tmp_path, patience=IMPATIENT) as payer:
        calls = [payer.channel_for] if "room_sat" in words else [payer.new_channel]
        if "hours" in words or "amount_sat" in words:
            calls.append(payer.channel_for)
        for call in calls:
            with pytest.raises((WrongNumber, TermsUnacceptable)):
                call(**words)
        assert payer.records() == []
    if words != {"room_sat": MAX_MONEY_SAT}:  # open price and dust limit come on top, which the server tells
        assert not list(tmp_path.glob("wallet.seed"))


@looped("name", Limits.__struct_fields__)
@looped("value", NO_NUMBERS)
def test_limits_are_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(WrongNumber, match=name):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_whole_numbers_of_other_libraries_count(funded: OpenChannel) -> None:
    """Python takes such a value as an index; the record holds an int."""
    channel = funded(limits=Limits(payment_sat=Index(FUNDING_SAT)))  # type: ignore[arg-type]
    channel.open(Index(OPEN_PRICE_SAT))  # type: ignore[arg-type]
    channel.pay(Index(7))  # type: ignore[arg-type]
    channel.pay_many(Index(2), Index(3))  # type: ignore[arg-type]
    assert channel.paid_sat == OPEN_PRICE_SAT + 13
    assert type(channel.record.signed_sat) is int
    assert channel.close(Index(0)).change_sat == FUNDING_SAT - OPEN_PRICE_SAT - 13  # type: ignore[arg-type]


async def test_asyncio_refuses_wrong_numbers_too(opened: OpenChannel, tmp_path: Path) -> None:
    channel = opened()
    channel.release()
    async with AsyncPayer(wallet=tmp_path / "wallet", patience=IMPATIENT) as payer:
        same = payer.channel(channel.name)
        for call in (same.pay(1.5), same.pay_many(1.5, 2), same.close(1.5)):  # type: ignore[arg-type]
            with pytest.raises(WrongNumber):
                await call
        assert (await same.pay(1)).paid_sat == 1


@pytest.mark.parametrize(
    "changed",
    [{"signed_sat": 3.5}, {"signed_sat": 10**9}, {"earlier_paid_sat": -1}, {"expiry": Index(5)}, {"state": "other"}],
    ids=repr,
)
def test_a_record_that_cannot_be_read_is_not_written(
    opened: OpenChannel, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """The second line of defence: the file on disk stays as it was."""
    channel = opened()
    path = tmp_path / "wallet" / f"{channel.name}.json"
    before = path.read_bytes()

    with pytest.raises(RecordNotWritten, match="stays as it was") as error:
        channel._keep(structs.replace(channel.record, **changed))

    assert isinstance(error.value, ClientError)
    assert path.read_bytes() == before
    assert channel.pay(1).paid_sat == 1
