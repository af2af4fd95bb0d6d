"""The cashier: both ways to pay end in the same charge; each refusal changes nothing and says what the payer may know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from paychan.gateway.cashier import Asked, Cashier, Closed, Paid, Refusal, brings_payment, ends_channel, status_of
from paychan.gateway.charging import Charges
from paychan.protocol.charges import Release
from paychan.protocol.payment import Payment
from paychan.protocol.request_id import NO_BODY
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.mpp_challenge import challenge_header
from paychan.protocol.wire.mpp_outcomes import read_receipt
from paychan.protocol.wire.offers import CHAINS, Close, Offer, Voucher
from paychan.protocol.wire.x402_json import read_response
from paychan.protocol.wire.x402_outcomes import read_settled
from tests.lib.channels import NOW, Payer
from tests.lib.world import DebugPayer, Local, local

SECRET, OLD_SECRET = b"the present secret of 32 bytes..", b"the secret before it............"
URL = "http://shop.example/v1/tile/5"
OPENING_SAT = 10_000
OFFER = Offer(
    amount_sat=Sat(25),
    unit="request",
    chain=CHAINS["testnet"],
    identity=b"\x02" * 33,
    pay_url="http://pay.example",
    network="testnet",
    open_price_sat=Sat(10_000),
    min_confirmations=1,
    settlement_period_seconds=86_400,
    dust_sat=Sat(546),
    realm="shop.example",
)
PAYER = DebugPayer("cashier", movable=True)


class Counter:
    """A cashier over real actors and a real store, and a client of one channel."""

    def __init__(self, server: Local, funding_sat: int) -> None:
        self.server, self.funding_sat = server, Sat(funding_sat)
        self.cashier = Cashier(Charges(server.registry), (SECRET, OLD_SECRET), lambda: UnixTime(NOW))

    def voucher(self, paid_sat: int, payer: Payer = PAYER) -> Voucher:
        return Voucher.of(PAYER.outpoint, self.funding_sat, payment(paid_sat, payer))

    async def pay(
        self, headers: Sequence[tuple[str, str]], offer: Offer = OFFER, url: str = URL, body: bytes | None = NO_BODY
    ) -> Paid | Refusal | Closed:
        return await self.cashier.pay(Asked("GET", url, fields(headers), body), offer)

    async def credit(self) -> tuple[int, int]:
        record = await self.server.stored(PAYER)
        return record.accepted_sat, record.spent_sat


def payment(paid_sat: int, payer: Payer = PAYER) -> Payment:
    return payer.payment(PAYER.funding_sat - paid_sat)


def fields(headers: Sequence[tuple[str, str]]):
    return lambda name: [value for key, value in headers if key.lower() == name.lower()]


def by_x402(voucher: Voucher | Close, offer: Offer = OFFER, name: str = "") -> list[tuple[str, str]]:
    found = x402.Found(offer, x402.requirements(offer))
    return [("payment-signature", x402.payment_header(found, voucher, identifier=name))]


def by_mpp(
    voucher: Voucher | Close, offer: Offer = OFFER, secret: bytes = SECRET, expires: int = NOW + 300
) -> list[tuple[str, str]]:
    shown = mpp.challenge(offer, secret, UnixTime(expires))
    assert challenge_header(shown)
    return [("authorization", mpp.credential_header(shown, voucher))]


@asynccontextmanager
async def at_counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with local(tmp_path) as server:
        channel = await server.open(PAYER, OPENING_SAT)
        yield Counter(server, channel.funding_sat)


@pytest.mark.parametrize("way", [by_x402, by_mpp])
async def test_a_payment_is_charged_once(tmp_path: Path, way) -> None:
    """The request is charged the offer's amount; repeated after a lost answer, it is not charged again."""
    async with at_counter(tmp_path) as counter:
        headers = way(counter.voucher(OPENING_SAT + 25))
        for _ in range(2):
            paid = await counter.pay(headers)
            assert isinstance(paid, Paid), paid
            assert paid.charged.charged_sat == 25
        assert await counter.credit() == (OPENING_SAT + 25, OPENING_SAT + 25)
        assert brings_payment(fields(headers))


async def test_the_answer_says_what_was_charged(tmp_path: Path) -> None:
    """PAYMENT-RESPONSE and Payment-Receipt have the sums of the record."""
    async with at_counter(tmp_path) as counter:
        for way, name, read in (
            (by_x402, "PAYMENT-RESPONSE", lambda value: read_settled(read_response(value))),
            (by_mpp, "Payment-Receipt", lambda value: read_receipt(value).settled),
        ):
            accepted_sat = (await counter.credit())[0]
            paid = await counter.pay(way(counter.voucher(accepted_sat + 40)))
            assert isinstance(paid, Paid)
            header, value = counter.cashier.success_header(paid, paid.charged, OFFER)
            settled = read(value)
            assert header == name
            assert settled.charged_sat == 25
            assert settled.state.accepted_sat == accepted_sat + 40
            assert settled.state.credit_sat == paid.charged.channel.credit_sat


@pytest.mark.parametrize("way", [by_x402, by_mpp])
async def test_another_request_needs_another_payment(tmp_path: Path, way) -> None:
    """The same payment for another URL, and the payment of another sum, are refused with the channel's state and proof."""
    async with at_counter(tmp_path) as counter:
        first = way(counter.voucher(OPENING_SAT + 25))
        assert isinstance(await counter.pay(first), Paid)
        for headers, code in ((first, "credit_too_low"), (way(counter.voucher(OPENING_SAT + 10)), "value_backwards")):
            refused = await counter.pay(headers, url=URL + "?other")
            assert isinstance(refused, Refusal)
            assert (refused.error.code, status_of(refused.error)) == (code, 402)
            assert refused.state is not None
            assert refused.state.newest == payment(OPENING_SAT + 25)
            assert refused.state.credit_sat == 0
        assert await counter.credit() == (OPENING_SAT + 25, OPENING_SAT + 25)


async def test_a_name_makes_requests_with_one_payment_different(tmp_path: Path) -> None:
    """Credit pays several requests with one payment if they have names; one name for two requests is two requests."""
    async with at_counter(tmp_path) as counter:
        voucher = counter.voucher(OPENING_SAT + 75)
        names = ["first-request-id", "other-request-id"]
        for name in (*names, names[0]):
            assert isinstance(await counter.pay(by_x402(voucher, name=name)), Paid)
        assert (await counter.credit())[1] == OPENING_SAT + 50
        assert isinstance(await counter.pay(by_x402(voucher, name=names[0]), url=URL + "/other"), Paid)
        keyed = [*by_x402(voucher), ("Idempotency-Key", '"another"')]
        assert isinstance(await counter.pay(keyed), Refusal)


async def test_a_caller_without_the_clients_signature_learns_nothing(tmp_path: Path) -> None:
    """A forged payment is refused without the state of the channel, whatever its sum."""
    async with at_counter(tmp_path) as counter:
        other = Payer("another client", PAYER.terms.expiry.unix_time, PAYER.funding_sat)
        for paid_sat in (OPENING_SAT - 1, OPENING_SAT + 25):
            refused = await counter.pay(by_x402(counter.voucher(paid_sat, other)))
            assert isinstance(refused, Refusal)
            assert (refused.error.code, refused.state) == ("bad_signature", None)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"amount_sat": Sat(24)}, "offer_mismatch"),
        ({"pay_url": "http://elsewhere.example"}, "offer_mismatch"),
        ({"identity": b"\x03" * 33}, "offer_mismatch"),
    ],
)
@pytest.mark.parametrize("way", [by_x402, by_mpp])
async def test_a_payment_for_another_offer_is_refused(tmp_path: Path, way, change, code) -> None:
    """The price may have changed since the offer: the payer gets the new one and decides anew."""
    async with at_counter(tmp_path) as counter:
        refused = await counter.pay(way(counter.voucher(OPENING_SAT + 25), msgspec.structs.replace(OFFER, **change)))
        assert isinstance(refused, Refusal)
        assert (refused.error.code, status_of(refused.error)) == (code, 402)
        assert await counter.credit() == (OPENING_SAT, OPENING_SAT)


async def test_challenges_expire_and_have_this_servers_hmac(tmp_path: Path) -> None:
    """The secret before the present one is believed, another is not."""
    async with at_counter(tmp_path) as counter:
        voucher = counter.voucher(OPENING_SAT + 25)
        assert isinstance(await counter.pay(by_mpp(voucher, secret=OLD_SECRET)), Paid)
        for headers, code in (
            (by_mpp(voucher, secret=b"of another server"), "invalid_challenge"),
            (by_mpp(voucher, expires=NOW - 1), "challenge_expired"),
        ):
            refused = await counter.pay(headers)
            assert isinstance(refused, Refusal)
            assert refused.error.code == code


async def test_two_payments_and_unreadable_ones_are_refused(tmp_path: Path) -> None:
    """Both headers at once: 400. Garbage: 402, as the SDKs of x402 expect."""
    async with at_counter(tmp_path) as counter:
        voucher = counter.voucher(OPENING_SAT + 25)
        both = await counter.pay([*by_x402(voucher), *by_mpp(voucher)])
        twice = await counter.pay(by_x402(voucher) * 2)
        garbage = await counter.pay([("payment-signature", "????")])
        assert [status_of(each.error) for each in (both, twice, garbage) if isinstance(each, Refusal)] == [
            400,
            400,
            402,
        ]
        assert await counter.credit() == (OPENING_SAT, OPENING_SAT)


async def test_a_wrong_sum_shows_another_capacity(tmp_path: Path) -> None:
    """The payer has another channel in mind: nothing is booked."""
    async with at_counter(tmp_path) as counter:
        voucher = counter.voucher(OPENING_SAT + 25)
        wrong = Voucher(voucher.channel, voucher.change_sat, Sat(26), voucher.signature)
        refused = await counter.pay(by_x402(wrong))
        assert isinstance(refused, Refusal)
        assert (refused.error.code, refused.state) == ("cumulative_mismatch", None)


async def test_the_payer_closes_by_its_newest_payment(tmp_path: Path) -> None:
    """A close is no request for the upstream; afterwards the offer names no channel."""
    async with at_counter(tmp_path) as counter:
        newest = counter.voucher(OPENING_SAT + 25)
        assert isinstance(await counter.pay(by_x402(newest)), Paid)
        older = await counter.pay(by_mpp(Close(counter.voucher(OPENING_SAT))))
        assert isinstance(older, Refusal)
        assert isinstance(await counter.pay(by_mpp(Close(newest))), Closed)
        after = await counter.pay(by_x402(counter.voucher(OPENING_SAT + 50)))
        assert isinstance(after, Refusal)
        assert ends_channel(after.error)
        assert status_of(after.error) == 402


async def test_requests_with_bodies_that_were_not_read_are_never_repetitions(tmp_path: Path) -> None:
    """A large body may differ from the one before: each such request is charged."""
    async with at_counter(tmp_path) as counter:
        headers = by_x402(counter.voucher(OPENING_SAT + 50))
        for _ in range(2):
            assert isinstance(await counter.pay(headers, body=None), Paid)
        assert isinstance(await counter.pay(headers, body=None), Refusal)


async def test_parallel_requests_get_what_was_paid(tmp_path: Path) -> None:
    """Thirty requests at once on a channel with the payment for twelve."""
    async with at_counter(tmp_path) as counter:
        headers = by_x402(counter.voucher(OPENING_SAT + 300))
        results = await asyncio.gather(*(counter.pay(headers, url=f"{URL}?{number}") for number in range(30)))
        assert sum(isinstance(each, Paid) for each in results) == 12
        paid = next(each for each in results if isinstance(each, Paid))
        await counter.server.registry.ask(PAYER.outpoint, Release(paid.charged.request))
        assert isinstance(await counter.pay(headers, url=URL + "?last"), Paid)
