"""Paid requests with httpx against a real seller that verifies by the core: honest, out of step, lossy and lying."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from paychan.client import Payer, State, errors
from paychan.client.paying.account import Answered, Corrected, Declination, Paid, Unpaid
from paychan.client.paying.budget import Budget, Question
from paychan.client.paying.clients import paid_async_client, paid_client
from paychan.client.paying.exchange import Need, Purse
from paychan.protocol.types import Sat
from tests.client.conftest import OpenChannel
from tests.client.liar import Liar
from tests.client.paying.seller import Lie, Seller
from tests.lib.channels import private_key


@pytest.fixture
def seller(liar: Liar) -> Iterator[Seller]:
    with Seller(liar) as server:
        yield server


@pytest.fixture
def wallet(opened: OpenChannel, tmp_path: Path) -> Path:
    """A wallet with one channel of 1,000,000 sat to the seller, opened with 10,000 sat."""
    opened().release()
    return tmp_path / "wallet"


def purse_of(wallet: Path, budget: Budget | None = None, **settings: Any) -> Purse:
    return Purse(budget or Budget(total=1000), wallet, **settings)


@pytest.mark.parametrize("protocol", ["x402", "mpp"])
@pytest.mark.parametrize("identifier", [True, False])
def test_a_get_is_paid(seller: Seller, wallet: Path, protocol: str, identifier: bool) -> None:
    """`client.get` pays by the one protocol that is offered; three requests cost three times the price."""
    seller.protocols, seller.identifier = (protocol,), identifier
    purse = purse_of(wallet)
    with paid_client(purse) as client:
        answers = [client.get(seller.url + "tile") for _ in range(3)]

    assert [(answer.status_code, answer.content) for answer in answers] == [(200, b"goods")] * 3
    assert [answer.extensions["paychan"].left_sat for answer in answers] == [989_975, 989_950, 989_925]
    assert seller.paid == ["GET /tile"] * 3
    assert seller.signed_sat == 75
    assert seller.channel.credit_sat == 0
    assert purse.log.account().by_host == {seller.host: 75}
    assert not purse.log.account().open
    assert [line.receipt != "" for line in purse.log.lines() if isinstance(line, Answered)] == [True] * 3


def test_both_offers_are_understood_and_one_is_answered(seller: Seller, wallet: Path) -> None:
    """A request never has two payments; the program may prefer MPP."""
    for prefer, header in (("x402", "payment-signature"), ("mpp", "authorization")):
        with paid_client(purse_of(wallet, prefer=prefer)) as client:
            assert client.get(seller.url).status_code == 200
        assert {"payment-signature", "authorization"} & set(seller.seen[-1]) == {header}


def test_an_authorization_of_the_program_stays(seller: Seller, wallet: Path) -> None:
    """MPP's credential goes into its other header, and the program's key of idempotency is not replaced."""
    seller.protocols = ("mpp",)
    with paid_client(purse_of(wallet)) as client:
        client.get(seller.url, headers={"Authorization": "Bearer x", "Idempotency-Key": '"own"'}).raise_for_status()

    assert seller.seen[-1]["authorization"] == "Bearer x"
    assert seller.seen[-1]["payment-authorization"].startswith("Payment ")
    assert seller.seen[-1]["idempotency-key"] == '"own"'


def test_an_answer_without_a_price_costs_nothing(seller: Seller, wallet: Path) -> None:
    """A free page is one request, and the log stays empty."""
    purse = purse_of(wallet)
    with paid_client(purse) as client:
        assert client.get(seller.url + "free").content == b"free"

    assert not list(purse.log.lines())


def test_a_402_of_other_kinds_is_left_to_the_program(seller: Seller, wallet: Path) -> None:
    """Without an offer of this library's kind, the program gets the 402 with its body."""
    seller.protocols = ()
    with paid_client(purse_of(wallet)) as client:
        answer = client.get(seller.url)

    assert answer.status_code == 402
    assert answer.json()["title"] == "Payment required"


async def test_the_asynchronous_client_pays_the_same(seller: Seller, wallet: Path) -> None:
    """Several tasks at once take turns on the channel; each is paid once."""
    import asyncio

    asked: list[Question] = []

    async def approve(question: Question) -> bool:
        asked.append(question)
        return True

    purse = purse_of(wallet, Budget(total=1000, approve=approve, approve_above=10))
    async with paid_async_client(purse) as client:
        answers = await asyncio.gather(*(client.get(seller.url + f"{number}") for number in range(8)))

    assert {answer.status_code for answer in answers} == {200}
    assert sorted(question.url for question in asked) == sorted(seller.url + f"{number}" for number in range(8))
    assert seller.signed_sat == 8 * 25


# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        (Budget(per_request=24), errors.OverBudget),
        (Budget(total=1000, hosts=["127.0.0.1:1"]), errors.HostNotAllowed),
        (Budget(total=1000, approve=lambda _: False), errors.NotApproved),
        (Budget(total=1000, approve=lambda _: "yes"), errors.NotApproved),  # type: ignore[arg-type, return-value]
    ],
)
def test_a_refusal_of_the_budget_signs_nothing_and_is_logged(
    seller: Seller, wallet: Path, budget: Budget, error: type[errors.Declined]
) -> None:
    """The program gets an error with both numbers; the log has the refusal."""
    purse = purse_of(wallet, budget)
    with paid_client(purse) as client, pytest.raises(error):
        client.get(seller.url)

    assert seller.signed_sat == 0
    assert len(seller.seen) == 1
    lines = list(purse.log.lines())
    assert [type(line) for line in lines] == [Declination]
    assert lines[0].code == error.code  # type: ignore[union-attr]


def test_the_budget_ends_payments_across_restarts(seller: Seller, wallet: Path) -> None:
    """Four of five requests fit 100 sat, with a new client for each."""
    results = []
    for number in range(5):
        with paid_client(Budget(total=100), wallet) as client:
            try:
                results.append(client.get(seller.url + f"{number}").status_code)
            except errors.OverBudget as error:
                results.append(error.fields["limit"])

    assert results == [200] * 4 + ["total"]
    assert seller.signed_sat == 100


def test_a_redirect_is_judged_by_its_own_host(seller: Seller, liar: Liar, wallet: Path) -> None:
    """The budget allows the first host only, so the second one, to which it redirects, gets nothing."""
    with Seller(liar) as other:
        seller.redirect = other.url + "x"
        budget = Budget(total=1000, hosts=[seller.host])
        with paid_client(budget, wallet, follow_redirects=True) as client, pytest.raises(errors.HostNotAllowed):
            client.get(seller.url)

        seller.redirect, seller.lies = "", type(seller.lies)([Lie(location=other.url + "y")])
        with paid_client(budget, wallet, follow_redirects=True) as client, pytest.raises(errors.HostNotAllowed):
            client.get(seller.url)
        assert all("payment-signature" not in headers for headers in other.seen)


# --- channels ---------------------------------------------------------------------------------------------------------


def test_no_channel_is_opened_without_being_told(seller: Seller, liar: Liar, tmp_path: Path) -> None:
    """An empty wallet gives an error that names where to open; with `open_channel` the program opens one."""
    with paid_client(Budget(total=100), tmp_path / "w") as client, pytest.raises(errors.NoChannel, match=liar.url):
        client.get(seller.url)
    assert liar.requests == []

    def open_channel(need: Need) -> None:
        with Payer(need.pay_url, wallet=tmp_path / "w") as payer:
            payer.channel_for(room_sat=need.room_sat)

    with paid_client(Purse(Budget(total=100), tmp_path / "w", open_channel=open_channel)) as client:
        assert client.get(seller.url).status_code == 200
    assert seller.signed_sat == 25


def test_a_channel_of_another_server_pays_nothing(seller: Seller, wallet: Path) -> None:
    """A channel belongs to its server's pay URL."""
    seller.pay_url = "http://127.0.0.1:1"
    with paid_client(Budget(total=100), wallet) as client, pytest.raises(errors.NoChannel):
        client.get(seller.url)


def test_a_channel_in_use_is_waited_for(seller: Seller, wallet: Path) -> None:
    """A program that holds the channel ends the wait with a clear error after the time limit."""
    purse = purse_of(wallet, time_limit_seconds=0.05)
    name = purse.wallet.names()[0]
    file, _ = purse.wallet.open(name)
    with paid_client(purse) as client:
        with pytest.raises(errors.ChannelInUse, match=name):
            client.get(seller.url)
        file.release()
        assert client.get(seller.url).status_code == 200


def test_a_price_above_the_channel_is_declined(seller: Seller, wallet: Path) -> None:
    """The error has both numbers, and nothing is signed."""
    seller.price_sat = 995_000
    with paid_client(Budget(total=10**7), wallet) as client, pytest.raises(errors.InsufficientFunds):
        client.get(seller.url)
    seller.price_sat = 989_500
    with paid_client(Budget(total=10**7), wallet) as client, pytest.raises(errors.WouldLeaveDust):
        client.get(seller.url)
    assert seller.signed_sat == 0


# --- lost answers, loops and lies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", ["before", "after"])
def test_a_lost_answer_is_paid_once(seller: Seller, wallet: Path, drop: Any) -> None:
    """The same request, also of another program, sends the equal change value and the same name again."""
    seller.lies.append(Lie(drop=drop))
    with paid_client(Budget(total=1000), wallet) as client, pytest.raises(httpx.TransportError):
        client.get(seller.url + "tile")
    with paid_client(Budget(total=1000), wallet) as client:
        assert client.get(seller.url + "tile").status_code == 200

    assert seller.signed_sat == 25
    purse = purse_of(wallet)
    assert purse.log.account().total_sat == 25
    assert len({line.request for line in purse.log.lines() if isinstance(line, Paid)}) == 1


def test_another_request_after_a_lost_answer_is_paid_by_itself(seller: Seller, wallet: Path) -> None:
    """The payment of the lost request stays reserved for it, whether the seller got it or not."""
    seller.lies.extend([Lie(drop="before"), None, Lie(drop="after")])
    with paid_client(Budget(total=1000), wallet) as client:
        for path, lost in (("one", True), ("two", False), ("three", True), ("four", False)):
            if lost:
                with pytest.raises(httpx.TransportError):
                    client.get(seller.url + path)
            else:
                assert client.get(seller.url + path).status_code == 200
        for path in ("one", "three"):
            assert client.get(seller.url + path).status_code == 200

    assert seller.signed_sat == 4 * 25
    assert seller.channel.credit_sat == 0


def test_a_402_loop_does_not_raise_the_signed_sum(seller: Seller, wallet: Path) -> None:
    """A seller that books and says 402 again and again gets one price, and takes no more of the budget."""
    purse = purse_of(wallet)
    seller.lies.extend([Lie(refuse=True)] * 10)
    with paid_client(purse) as client:
        for _ in range(10):
            with pytest.raises(errors.StillUnpaid, match="pay"):
                client.get(seller.url)

    assert seller.signed_sat == 25
    assert purse.log.account().total_sat == 25
    assert sum(isinstance(line, Unpaid) for line in purse.log.lines()) == 10


def test_a_correction_that_uses_up_the_payment_gets_no_second_one(seller: Seller, wallet: Path) -> None:
    """A seller that shows the payment as proof and claims that it is spent gets nothing more."""
    purse = purse_of(wallet)
    with paid_client(purse) as client:
        client.get(seller.url + "one").raise_for_status()
        mine = purse.wallet.read(purse.wallet.names()[0])
        next_payment = mine.sign(Sat(mine.left_sat - 25))
        lie = seller.state(next_payment)
        seller.lies.extend([Lie(state=_spent(lie))] * 5)
        for _ in range(5):
            with pytest.raises(errors.StillUnpaid):
                client.get(seller.url + "two")
        mine = purse.wallet.read(mine.name)

    assert mine.funding_sat - mine.left_sat - 10_000 == 25 + 25
    assert purse.log.account().total_sat == 50


def _spent(state: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(state, spent_sat=state.accepted_sat)


def test_a_false_proof_is_fraud(seller: Seller, wallet: Path) -> None:
    """A correction by a payment of another key changes nothing in the wallet, and its error says so."""
    purse = purse_of(wallet)
    record = purse.wallet.read(purse.wallet.names()[0])
    forged = record.signer()
    forged._key = private_key("forger")
    seller.lies.append(Lie(state=seller.state(forged.payment(Sat(record.left_sat - 5000)))))
    with paid_client(purse) as client, pytest.raises(errors.FalseProof, match="not by this wallet's key"):
        client.get(seller.url)

    after = purse.wallet.read(record.name)
    assert after.left_sat == record.left_sat - 25
    assert seller.signed_sat == 0


def test_an_old_copy_of_the_wallet_catches_up(seller: Seller, wallet: Path) -> None:
    """A wallet that lost its newest payments pays after one correction, and its budget counts the price alone."""
    purse = purse_of(wallet)
    old = purse.wallet.read(purse.wallet.names()[0])
    with paid_client(purse) as client:
        for number in range(3):
            client.get(seller.url + f"{number}").raise_for_status()
    file, _ = purse.wallet.open(old.name)
    file.save(old)
    file.release()
    purse.log.path.unlink()
    purse = purse_of(wallet)
    with paid_client(purse) as client:
        assert client.get(seller.url + "after").status_code == 200

    assert seller.signed_sat == 100
    assert seller.channel.credit_sat == 0
    assert purse.log.account().total_sat == 25


def test_credit_is_used_before_anything_is_signed(seller: Seller, wallet: Path) -> None:
    """The seller gave the price back, since its upstream failed: the next request signs nothing more."""
    purse = purse_of(wallet)
    seller.lies.append(Lie(release=True))
    with paid_client(purse) as client:
        assert client.get(seller.url + "one").status_code == 502
        assert seller.channel.credit_sat == 25
        assert client.get(seller.url + "two").status_code == 200

    assert seller.signed_sat == 25
    assert purse.log.account().total_sat == 50, "a seller's answer gives no budget back"


@pytest.mark.parametrize("claim_sat", [10_000, 0])
def test_a_false_claim_of_credit_costs_nothing(seller: Seller, wallet: Path, claim_sat: int) -> None:
    """A seller that claims too much credit corrects itself; one that claims too little gets the price at most."""
    seller.lies.append(Lie(credit_sat=claim_sat))
    with paid_client(purse_of(wallet)) as client:
        for number in range(3):
            assert client.get(seller.url + f"{number}").status_code == 200

    assert seller.signed_sat == 75


def test_a_failure_without_a_word_leaves_the_request_open(seller: Seller, wallet: Path) -> None:
    """After a 500 that says nothing about the payment, the same request pays with the same payment."""
    seller.lies.append(Lie(status=500))
    with paid_client(purse_of(wallet)) as client:
        assert client.get(seller.url).status_code == 500
        assert client.get(seller.url).status_code == 200

    assert seller.signed_sat == 25


def test_a_price_that_rises_is_agreed_on_anew(seller: Seller, wallet: Path) -> None:
    """After a lost answer and a higher price, the sum of both is the higher price, and the budget has it."""
    purse = purse_of(wallet, Budget(per_request=40))
    seller.lies.append(Lie(drop="before"))
    with paid_client(purse) as client:
        with pytest.raises(httpx.TransportError):
            client.get(seller.url)
        seller.price_sat = 41
        with pytest.raises(errors.OverBudget):
            client.get(seller.url)
        seller.price_sat = 40
        assert client.get(seller.url).status_code == 200

    assert seller.signed_sat == 40
    assert purse.log.account().total_sat == 40


def test_a_state_without_proof_corrects_the_charges_alone(seller: Seller, wallet: Path) -> None:
    """A v1 channel is corrected without a proof: the one further try raises the payment by no more than the price."""
    purse = purse_of(wallet)
    with paid_client(purse) as client:
        client.get(seller.url + "one").raise_for_status()
        purse.log.note(Corrected(str(seller.channel.outpoint), purse.now, spent_sat=10_000))  # 25 sat too little
        seller.lies.append(Lie(state=seller.state(newest=None)))
        client.get(seller.url + "two").raise_for_status()
        assert seller.signed_sat == 50

        seller.lies.append(Lie(state=_newer(seller.state())))
        with pytest.raises(errors.StillUnpaid):
            client.get(seller.url + "three")
    assert seller.signed_sat == 50
    assert purse.log.account().total_sat == 75


def _newer(state: Any) -> Any:
    """Claim a newer payment, and show none."""
    import msgspec

    accepted = state.accepted_sat + 500
    return msgspec.structs.replace(state, accepted_sat=accepted, spent_sat=accepted, newest=None)


def test_a_channel_that_has_ended_pays_no_more(seller: Seller, liar: Liar, wallet: Path) -> None:
    """After the seller says so, the wallet asks the channel's own server, and the next request takes another channel."""
    opened: list[Need] = []

    def open_channel(need: Need) -> None:
        opened.append(need)
        with Payer(need.pay_url, wallet=wallet) as payer:
            payer.channel_for(room_sat=need.room_sat)

    with Payer(wallet=wallet) as payer:
        name = payer.wallet.names()[0]
        before = payer.wallet.read(name)
        channel = payer.channel(name)
        channel.close()
        channel.release()
        file = payer.wallet.lock(name)
        file.save(before)  # an old copy, which does not know of the end
        file.release()
    purse = purse_of(wallet, open_channel=open_channel)
    with paid_client(purse) as client:
        with pytest.raises(errors.StillUnpaid, match="clos"):
            client.get(seller.url)
        assert purse.wallet.read(name).state is not State.OPEN
        liar.channel = None  # the server forgets a channel that is settled
        assert client.get(seller.url).status_code == 200

    assert len(opened) == 1
    assert seller.signed_sat == 25


# --- bodies -----------------------------------------------------------------------------------------------------------


def test_a_body_is_sent_twice(seller: Seller, wallet: Path) -> None:
    """Bytes, and a stream up to the limit, arrive whole with the payment."""
    with paid_client(Budget(total=1000), wallet, buffer_bytes=100) as client:
        client.post(seller.url, content=b"abc").raise_for_status()
        client.post(seller.url, content=iter([b"x" * 60, b"y" * 40])).raise_for_status()

    assert seller.bodies == [b"abc"] * 2 + [b"x" * 60 + b"y" * 40] * 2
    assert seller.signed_sat == 50


def test_a_longer_stream_is_not_paid_for(seller: Seller, wallet: Path) -> None:
    """It is refused before anything is signed; where nothing costs, it arrives whole."""
    with paid_client(Budget(total=1000), wallet, buffer_bytes=100) as client:
        client.post(seller.url + "free", content=iter([b"x" * 60, b"y" * 60, b"z"])).raise_for_status()
        with pytest.raises(errors.BodyNotRepeatable, match="100 bytes"):
            client.post(seller.url, content=iter([b"x" * 60, b"y" * 60]))

    assert seller.bodies[0] == b"x" * 60 + b"y" * 60 + b"z"
    assert seller.signed_sat == 0
