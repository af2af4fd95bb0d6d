"""The adapters for requests and aiohttp pay as the one for httpx: the same core, other ways to send."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paychan.client import Budget, Purse, errors
from paychan.client.paying.errors import IdentityChanged
from paychan.client.wallet import Wallet
from tests.client.conftest import OpenChannel
from tests.client.liar import Liar
from tests.client.paying.seller import Lie, Seller
from tests.lib.channels import private_key

if TYPE_CHECKING:
    import aiohttp
    import requests


@pytest.fixture
def seller(liar: Liar) -> Iterator[Seller]:
    with Seller(liar) as server:
        yield server


@pytest.fixture
def wallet(opened: OpenChannel, tmp_path: Path) -> Path:
    opened().release()
    return tmp_path / "wallet"


@pytest.fixture
def session(seller: Seller, wallet: Path) -> Iterator[requests.Session]:
    """A session of requests that pays the seller alone, at most 25 sat for a request."""
    import requests

    from paychan.client.paying.requests import PaidAdapter

    adapter = PaidAdapter(Purse(Budget(per_request=25, hosts=[seller.host]), wallet), buffer_bytes=100)
    with requests.Session() as session:
        session.mount("http://", adapter)
        yield session


@pytest.fixture
async def loop_session(seller: Seller, wallet: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A session of aiohttp that pays the seller alone, at most 25 sat for a request."""
    import aiohttp

    from paychan.client.paying.aiohttp import PaidMiddleware

    middleware = PaidMiddleware(Purse(Budget(per_request=25, hosts=[seller.host]), wallet), buffer_bytes=100)
    async with aiohttp.ClientSession(middlewares=[middleware]) as session:
        yield session


@pytest.mark.parametrize("protocol", ["x402", "mpp"])
def test_requests_pays(seller: Seller, session: requests.Session, protocol: str) -> None:
    """A session pays, sends a body twice, and shows the program its own request."""
    seller.protocols = (protocol,)
    answer = session.post(seller.url, data={"a": "b"})

    assert (answer.status_code, answer.content) == (200, b"goods")
    assert seller.bodies == [b"a=b"] * 2
    assert not {"PAYMENT-SIGNATURE", "Authorization"} & set(answer.request.headers)
    assert session.get(seller.url).status_code == 200
    assert seller.signed_sat == 50


@pytest.mark.parametrize(("size", "bodies"), [(100, 2), (101, 1)])
def test_requests_buffers_files_and_iterators(
    seller: Seller, session: requests.Session, size: int, bodies: int
) -> None:
    """A file and an iterator up to the limit are paid for; longer ones are refused and arrive whole once."""
    for body in (io.BytesIO(b"x" * size), iter([b"x" * 60, b"x" * (size - 60)])):
        seller.bodies.clear()
        if bodies == 2:
            assert session.post(seller.url, data=body).status_code == 200
        else:
            with pytest.raises(errors.BodyNotRepeatable):
                session.post(seller.url, data=body)
        assert seller.bodies == [b"x" * size] * bodies


def test_requests_judges_redirects_anew(seller: Seller, session: requests.Session, liar: Liar) -> None:
    """The host that a paid answer redirects to gets neither payment nor headers of it."""
    with Seller(liar) as other:
        seller.lies = deque([Lie(location=other.url + "y")])
        with pytest.raises(errors.HostNotAllowed):
            session.get(seller.url)

        assert other.seen
        assert all("payment-signature" not in headers for headers in other.seen)


def test_requests_pays_a_lost_answer_once(seller: Seller, session: requests.Session) -> None:
    """The session's own error reaches the program, and the next call pays with the same payment."""
    import requests

    seller.lies.extend([Lie(drop="after"), Lie(refuse=True)])
    with pytest.raises(requests.ConnectionError):
        session.get(seller.url)
    with pytest.raises(errors.StillUnpaid, match="pay"):
        session.get(seller.url)

    assert session.get(seller.url).status_code == 200
    assert seller.signed_sat == 25


@pytest.mark.parametrize("protocol", ["x402", "mpp"])
async def test_aiohttp_pays(seller: Seller, loop_session: aiohttp.ClientSession, protocol: str) -> None:
    """A session pays for bodies of bytes, texts, forms and JSON, and keeps the program's own headers."""
    seller.protocols = (protocol,)
    for body in ({"json": {"a": 1}}, {"data": {"a": "b"}}, {"data": b"x"}, {"data": io.BytesIO(b"file")}, {}):
        async with loop_session.post(seller.url, headers={"Authorization": "Bearer x"}, **body) as answer:
            assert (answer.status, await answer.read()) == (200, b"goods")
        assert seller.bodies[-1] == seller.bodies[-2]
        assert seller.seen[-1]["authorization"] == "Bearer x"
    assert seller.signed_sat == 5 * 25


async def test_aiohttp_refuses_a_stream(seller: Seller, loop_session: aiohttp.ClientSession) -> None:
    """A body of unknown size can't be sent again, so nothing is paid."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"x"

    with pytest.raises(errors.BodyNotRepeatable):
        await loop_session.post(seller.url, data=parts())
    assert seller.signed_sat == 0


async def test_aiohttp_judges_redirects_anew(seller: Seller, loop_session: aiohttp.ClientSession, liar: Liar) -> None:
    """The host that a paid answer redirects to gets neither payment nor headers of it."""
    with Seller(liar) as other:
        seller.lies = deque([Lie(location=other.url + "y")])
        with pytest.raises(errors.HostNotAllowed):
            await loop_session.get(seller.url)

        assert other.seen
        assert all("payment-signature" not in headers for headers in other.seen)


async def test_aiohttp_pays_a_lost_answer_once(seller: Seller, loop_session: aiohttp.ClientSession) -> None:
    """A repetition by the session, or the program's, pays with the same payment."""
    import aiohttp

    seller.lies.extend([Lie(drop="after"), Lie(drop="before")])
    for _ in range(2):
        with pytest.raises(aiohttp.ClientError):
            async with loop_session.post(seller.url):
                pass
    async with loop_session.post(seller.url) as answer:
        assert answer.status == 200

    assert seller.signed_sat == 25


# --- the server's identity --------------------------------------------------------------------------------------------


def test_two_names_of_one_server_are_one(seller: Seller, session: requests.Session) -> None:
    """A channel whose record knows the server's identity key pays offers of another pay URL with the same key."""
    assert session.get(seller.url).status_code == 200
    seller.pay_url = "https://other.example"

    assert session.get(seller.url).status_code == 200
    assert seller.signed_sat == 50


def test_another_identity_of_a_server_is_refused(seller: Seller, session: requests.Session, wallet: Path) -> None:
    """The error names both keys; nothing is signed, and the record keeps the key that it learnt."""
    assert session.get(seller.url).status_code == 200
    learnt = seller.identity
    seller.identity = private_key("another identity").public_key.format()

    with pytest.raises(IdentityChanged) as caught:
        session.get(seller.url)

    assert (caught.value.fields["want"], caught.value.fields["got"]) == (learnt.hex(), seller.identity.hex())
    assert seller.signed_sat == 25
    assert Wallet(wallet).read_all()[0][0].identity == learnt.hex()


def test_an_identity_without_a_receipt_is_not_learnt(seller: Seller, session: requests.Session, wallet: Path) -> None:
    """A seller that takes a payment and shows no receipt teaches the wallet nothing."""
    seller.lies.append(Lie(status=200))
    assert session.get(seller.url).status_code == 200

    assert Wallet(wallet).read_all()[0][0].identity == ""
