"""RBPCP §6.5: after a withdrawal a channel continues at another output; callers with its secret get the new URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest
from bitcoin.core import CTransaction

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT
from paychan.protocol.types import Network, OutPoint
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.both_paths import BOTH_PATHS
from tests.api.moving import OPENED_SAT, follow_move, open_movable, withdraw
from tests.lib.customer import wait_for
from tests.lib.rbpcp import V1, V2, Payer, path, refusal
from tests.lib.system import System

STATUS = {Dialect.S: 318, Dialect.A: 308}
LEFT_SAT = DEBUG_FUNDING_SAT - OPENED_SAT


@pytest.fixture
def movable(system: System, http: httpx.Client, dialect: Dialect) -> V2:
    """A channel of each dialect whose change address is its funding address."""
    return open_movable(system.url, http, dialect)


@BOTH_PATHS
@pytest.mark.parametrize("tail", ["", "/close"])
def test_requests_on_the_old_output_are_redirected_to_the_new_one(system: System, movable: V2, tail: str) -> None:
    """Dialect S gets 318, A gets 308, on both paths, with an absolute Location with the secret, and the proof."""
    old = movable.payer.outpoint
    moved_to = withdraw(system, old)["moved_to"]
    body = movable.body(movable.payer.payment(OPENED_SAT + 1000))
    answer = movable.http.put(movable.resource(tail), content=body)

    new = OutPoint.parse(moved_to.split(":")[0], 0)
    assert moved_to == str(new)
    assert refusal(answer) == (STATUS[movable.dialect], "channel_moved")
    assert answer.reason_phrase == f"channel continues at {new}, which holds {LEFT_SAT} sat"
    assert answer.headers["Location"] == f"{movable.url}{path(new)}?secret={movable.secret}"
    shown = answer.json()
    assert (shown["outpoint"], shown["funding_sat"]) == (str(new), LEFT_SAT)
    transaction = CTransaction.deserialize(bytes.fromhex(shown["transaction"]))
    assert (transaction.GetTxid(), transaction.vin[0].prevout.hash) == (new.txid, old.txid)
    assert transaction.vout[0].nValue == LEFT_SAT
    assert bytes(transaction.vout[0].scriptPubKey) == movable.payer.terms.funding_script
    names = {name for name in answer.headers if name not in ("date", "content-length")}
    other = movable.http.put(movable.resource(tail), content=b"{}")
    assert names - {"location"} == {name for name in other.headers if name not in ("date", "content-length")}


@BOTH_PATHS
def test_a_channel_moves_repeatedly(system: System, movable: V2) -> None:
    """Payments for the new output count from its value; a second withdrawal moves the channel again; then it closes."""
    payer, left = movable.payer, LEFT_SAT
    for _ in range(3):
        withdraw(system, payer.outpoint)
        shown = movable.pay(payer.payment_of_change(left - 1)).json()
        assert follow_move(movable, shown) == left
        left -= 50_000
        paid = movable.pay(payer.payment_of_change(left))
        assert (paid.status_code, paid.json()["value_received"]) == (200, 50_000)
        assert paid.json()["channel_value_left"] == left
    home = key_script(payer.public_key)
    closing = payer.payment_of_change(left - 700, home)
    closed = movable.close(closing, change_address=encode_address(home, Network.TEST))
    assert closed.status_code == 200
    info = system.channel(payer.outpoint)
    settlement = CTransaction.deserialize(bytes.fromhex(info["settlement_transaction"]))
    assert (settlement.vout[0].nValue, bytes(settlement.vout[0].scriptPubKey)) == (left - 700, home)


@BOTH_PATHS
@pytest.mark.parametrize("tail", ["", "/close"])
def test_a_caller_without_the_secret_learns_nothing_of_a_move(
    system: System, movable: V2, new_v2: Callable[[Dialect], V2], tail: str
) -> None:
    """A wrong or missing secret, v1, and the new output with a wrong secret: the same 404 as for an unknown channel."""
    payer = movable.payer
    body = movable.body(payer.payment(OPENED_SAT))
    new = withdraw(system, payer.outpoint)["moved_to"].replace(":", "/")
    stranger = new_v2(movable.dialect)
    unknown = movable.http.put(stranger.resource(tail, "ab" * 32), content=stranger.body(stranger.payer.payment(1000)))
    assert (unknown.status_code, unknown.content) == (404, b"")
    url = movable.resource(tail).partition("?")[0]
    for refused in (
        movable.http.put(url, content=body),
        movable.http.put(f"{url}?secret={'ab' * 32}", content=body),
        movable.http.put(f"{movable.url}/v2/channels/{new}{tail}?secret={'ab' * 32}", content=body),
    ):
        assert (refused.status_code, refused.content, "location" in refused.headers) == (404, b"", False)
    v1 = V1(movable.url, payer, movable.http)
    assert refusal(v1.pay(payer.payment(OPENED_SAT))) == (404, "unknown_channel")


@BOTH_PATHS
def test_a_malformed_payment_is_not_redirected(movable: V2, system: System) -> None:
    """A body that can't be read, or that names another output, is refused also after the move."""
    payer = movable.payer
    withdraw(system, payer.outpoint)
    assert refusal(movable.http.put(movable.resource(), content=b"{")) == (400, "malformed")
    body = movable.body(payer.payment(OPENED_SAT), funding_txid="ab" * 32, funding_vout=0)
    assert refusal(movable.http.put(movable.resource(), content=body)) == (400, "outpoint_mismatch")


def test_the_old_output_opens_nothing_again(movable: V2, system: System) -> None:
    """An opening payment that is sent again after the move is a conflict."""
    opening = movable.payer.payment(OPENED_SAT)
    withdraw(system, movable.payer.outpoint)
    assert refusal(movable.open(opening)) == (409, "outpoint_used")


def test_a_payment_for_the_old_output_is_invalid_at_the_new_one(movable: V2, system: System) -> None:
    """A signature is valid only for the output that it spends."""
    payment = movable.payer.payment(OPENED_SAT + 5000)
    withdraw(system, movable.payer.outpoint)
    follow_move(movable, movable.pay(payment).json())
    assert refusal(movable.pay(payment)) == (400, "bad_signature")


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "handlers"])
def test_the_location_is_where_clients_reach_the_server(
    tmp_path_factory: pytest.TempPathFactory, http: httpx.Client, fast: bool
) -> None:
    """As in every Location, a trusted proxy sets scheme and host, and an invalid host is not repeated."""
    settings = {"http": f"trust_forwarded = true\nfast_lane = {str(fast).lower()}"}
    with System(tmp_path_factory.mktemp("proxied"), sections=settings) as running:
        v2 = open_movable(running.url, http, Dialect.S)
        withdraw(running, v2.payer.outpoint)
        body = v2.body(v2.payer.payment(OPENED_SAT))
        for headers, base in (
            ({"X-Forwarded-Proto": "https", "X-Forwarded-Host": "pay.example"}, "https://pay.example"),
            ({"Host": "inside:8000", "X-Forwarded-Host": "<x>"}, "http://inside:8000"),
            ({"Host": "(x)"}, running.url),
        ):
            answer = http.put(v2.resource(), content=body, headers=headers)
            assert answer.headers["Location"].startswith(f"{base}/v2/channels/")
        assert running.restart_server() is None
        again = http.put(v2.resource().replace(v2.url, running.url), content=body)
        assert (again.status_code, again.json()["code"]) == (318, "channel_moved"), "also after a restart"


@pytest.fixture
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server only for this module, whose signer may stop."""
    with System(tmp_path_factory.mktemp("slow"), sections={"watcher": "interval_seconds = 0.2"}) as running:
        yield running


def test_a_moving_channel_answers_retry_later(slow: System, http: httpx.Client, dialect: Dialect) -> None:
    """Until the settlement has its confirmations, payments get 503 with Retry-After; then they succeed."""
    v2 = open_movable(slow.url, http, dialect)
    assert slow.signer is not None
    slow.signer.stop()
    named = path(v2.payer.outpoint).removeprefix("/v2")
    assert slow.manage("POST", f"{named}/withdraw").status_code == 503
    for answer in (v2.pay(v2.payer.payment(OPENED_SAT + 1)), v2.close(v2.payer.payment(OPENED_SAT + 1))):
        assert refusal(answer) == (503, "channel_moving")
        assert answer.headers["Retry-After"] == "5"
    seen = slow.channel(v2.payer.outpoint)
    assert (seen["status"], seen["close_reason"], seen["moving"], seen["moved_to"]) == (
        "closing",
        "withdraw",
        True,
        None,
    )
    slow.start_signer()
    wait_for(lambda: v2.pay(v2.payer.payment(OPENED_SAT + 1)).status_code == STATUS[dialect], "moved")
    assert slow.channel(v2.payer.outpoint)["moving"] is False


def test_other_channels_do_not_move(system: System, open_v2: V2, open_v1: V1) -> None:
    """A channel whose change pays to the client's key, and a channel of v1, can't continue."""
    for payer in (open_v2.payer, open_v1.payer):
        named = path(payer.outpoint).removeprefix("/v2")
        assert refusal(system.manage("POST", f"{named}/withdraw")) == (400, "not_withdrawable")
    assert open_v2.pay(open_v2.payer.payment(OPENED_SAT + 1)).status_code == 200
    unknown = path(Payer().outpoint).removeprefix("/v2")
    assert refusal(system.manage("POST", f"{unknown}/withdraw")) == (404, "unknown_channel")
