"""RBPCP §13.1, threat 36: the server asks the application about every durable payment, and obeys its answer."""

from __future__ import annotations

import gzip
import json
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from paychan.protocol.payment import Payment, encode_v1
from paychan.protocol.wire.payment_frames import Said
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.streams import open_stream, pay_frame
from tests.api.wire import connect, read_all, statuses
from tests.lib.application import Application, Question, Reply, no, yes
from tests.lib.rbpcp import V1, V2, Payer, path, refusal
from tests.lib.system import System

FUNDING_SAT = 12_345_678_900_000
SHORT_SECONDS, LONG_SECONDS = 1.5, 10.0
"""Time-outs of the server: for tests in which the application's answer is missing, and for all others."""

GIVES_UP = pytest.mark.parametrize("running", [SHORT_SECONDS], indirect=True, ids=["gives up"])
"""The server of this test waits a short time for the application."""


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[System, Application]]:
    with Application() as application:
        settings = {
            "callback": f'url = "{application.url}"\ntimeout_seconds = {getattr(request, "param", LONG_SECONDS)}'
        }
        with System(tmp_path_factory.mktemp("asked"), sections=settings) as system:
            yield system, application


@pytest.fixture
def application(running: tuple[System, Application]) -> Application:
    running[1].forget()
    return running[1]


@pytest.fixture
def asking(running: tuple[System, Application]) -> System:
    """A server with a callback URL."""
    return running[0]


@pytest.fixture
def payer_v1(asking: System, http: httpx.Client) -> V1:
    """A v1 channel that has received 100,000 satoshi."""
    v1 = V1(asking.url, Payer(), http)
    assert v1.open(v1.payer.payment(100_000)).status_code == 201
    return v1


@pytest.fixture
def payer_v2(asking: System, http: httpx.Client, dialect: Dialect) -> V2:
    """The same in each dialect of v2."""
    v2 = V2(asking.url, Payer(), http, dialect)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    return v2


@pytest.fixture
def silence(application: Application) -> Iterator[threading.Event]:
    """The application does not answer until the event is set or the test ends."""
    over = threading.Event()

    def wait(_question: Question) -> Reply:
        over.wait(30)
        return yes("late")

    application.answer = wait
    yield over
    over.set()


def _received(system: System, payer: Payer) -> int:
    value: int = system.channel(payer.outpoint)["value_received"]
    return value


# --- questions to the application -----------------------------------------------------------------------------------


def test_the_application_gets_all_data_of_a_payment(application: Application, payer_v2: V2) -> None:
    """A question has the published keys, the whole payment in dialect A, the client's data, and an idempotency key."""
    payer, payment = payer_v2.payer, payer_v2.payer.payment(150_000)
    body = payer_v2.body(payment, "two coffees")
    assert payer_v2.http.put(payer_v2.resource(), content=body).status_code == 200
    [question] = application.questions
    key = question.idempotency_key
    assert key.startswith(f"{payer.outpoint}:2:")  # the second record of the channel holds the offered payment
    assert (question.path, question.headers["Content-Type"]) == ("/app/value_received", "application/json")
    assert question.body == {
        "value_received": 50_000,
        "chan_value_left": FUNDING_SAT - 150_000,
        "chan_total_capacity": FUNDING_SAT,
        "client_pubkey": payer.public_key.hex(),
        "full_payment": {
            "payment_data": {
                "redeem_script": payer.terms.redeem_script.hex(),
                "funding_txid": payer.outpoint.txid_hex,
                "funding_vout": payer.outpoint.vout,
                "signature_data": payment.signature.hex(),
                "change_value": payment.change_sat,
                "change_address": payer.change_address,
                "sighash_flag": "83",
            },
            "application_data": "two coffees",
        },
        "channel_id": str(payer.outpoint),
        "idempotency_key": key,
        "received_sat": 150_000,
        "restored": False,
        "version": 1,
        "type": "paid",
        "sequence": 2,
    }


def test_the_applications_text_reaches_the_payer(application: Application, payer_v2: V2) -> None:
    """`resp_app_data` becomes `application_data` of the result, for any text."""
    text = 'a "key" \\ \n \u20ac \U0001f511 <b>'
    application.answer = lambda _: yes(text)
    paid = payer_v2.pay(payer_v2.payer.payment(150_000))
    assert (paid.status_code, paid.json()["application_data"]) == (200, text)
    assert paid.json()["value_received"] == 50_000


def test_only_payments_of_value_are_asked_about(application: Application, payer_v1: V1, asking: System) -> None:
    """The server asks nothing about opening, repeated payments, and closing."""
    for total in (100_000, 150_000, 150_000):
        assert payer_v1.pay(payer_v1.payer.payment(total)).status_code == 200
    assert payer_v1.close(payer_v1.payer.payment(150_000)).status_code == 202
    v2 = V2(asking.url, Payer(), payer_v1.http)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    assert v2.close(v2.payer.payment(150_000)).status_code == 200
    assert [question.body["value_received"] for question in application.questions] == [50_000]


def test_a_bad_payment_causes_no_question(application: Application, payer_v1: V1) -> None:
    """The server does not ask about payments that it refuses itself."""
    good, stranger = payer_v1.payer.payment(150_000), Payer()
    for bad in (stranger.payment(150_000), payer_v1.payer.payment_of_change(1), payer_v1.payer.payment(99_999)):
        assert refusal(payer_v1.pay(bad))[0] == 400
    assert application.questions == []
    assert payer_v1.pay(good).json()["value_received"] == 50_000


def test_a_drained_channel_is_settled_after_the_yes(application: Application, payer_v1: V1, asking: System) -> None:
    """The server asks about a payment that leaves no change, then settles in the same request."""
    drained = payer_v1.pay(payer_v1.payer.payment_of_change(0))
    assert (drained.status_code, len(drained.json()["settlement_txid"])) == (202, 64)
    assert application.questions[0].body["value_received"] == FUNDING_SAT - 100_000
    assert application.questions[0].body["full_payment"]["payment_data"]["sighash_flag"] == "82"
    assert asking.channel(payer_v1.payer.outpoint)["status"] == "closed"


# --- no -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [150_000, FUNDING_SAT])
def test_a_refused_payment_does_not_count(application: Application, payer_v2: V2, asking: System, total: int) -> None:
    """A no is 400 `application_error` with the application's reason, and the channel is unchanged."""
    before = asking.channel(payer_v2.payer.outpoint)
    application.answer = lambda _: no("sold <out>\r\nSet-Cookie: x=\u20ac")
    refused = payer_v2.pay(payer_v2.payer.payment(total))
    assert refusal(refused) == (400, "application_error")
    assert refused.json()["type"] == "application_error"
    assert refused.json()["message"].endswith("sold <out>\r\nSet-Cookie: x=\u20ac")
    assert refused.reason_phrase.endswith("sold ?out>??Set-Cookie: x=?")
    assert "Set-Cookie" not in refused.headers
    assert asking.channel(payer_v2.payer.outpoint) == before


def test_a_refused_payment_may_be_tried_again(application: Application, payer_v1: V1) -> None:
    """After a no the server asks again about the same payment, and about a smaller one."""
    application.answer = lambda question: no("too much") if question.body["value_received"] > 10_000 else yes()
    assert refusal(payer_v1.pay(payer_v1.payer.payment(150_000))) == (400, "application_error")
    assert refusal(payer_v1.pay(payer_v1.payer.payment(150_000))) == (400, "application_error")
    assert payer_v1.pay(payer_v1.payer.payment(110_000)).json()["value_received"] == 10_000
    assert [question.body["value_received"] for question in application.questions] == [50_000, 50_000, 10_000]


@pytest.mark.parametrize("reason", ["", "x" * 3000])
def test_a_no_needs_no_reason(application: Application, payer_v1: V1, reason: str) -> None:
    """An empty or a very long reason is still a no."""
    application.answer = lambda _: no(reason)
    assert refusal(payer_v1.pay(payer_v1.payer.payment(150_000))) == (400, "application_error")


# --- neither yes nor no ---------------------------------------------------------------------------------------------


@GIVES_UP
def test_a_silent_application_is_asked_again(
    application: Application, silence: threading.Event, payer_v1: V1, asking: System
) -> None:
    """After a time-out the payment stays marked as offered: sent again, it is delivered once more, and counts."""
    payment = payer_v1.payer.payment(150_000)
    assert refusal(payer_v1.pay(payment)) == (503, "payment_pending")
    assert _received(asking, payer_v1.payer) == 100_000
    silence.set()
    application.answer = lambda _: yes("at last")
    paid = payer_v1.pay(payment)
    assert (paid.status_code, paid.json()["value_received"]) == (200, 50_000)
    assert len(application.keys) == 2
    assert len(set(application.keys)) == 1
    assert payer_v1.pay(payment).json()["value_received"] == 0
    assert len(application.questions) == 2


@GIVES_UP
@pytest.mark.usefixtures("silence")
def test_fault_49_silence_is_503_with_retry_after_at_every_door(payer_v1: V1, payer_v2: V2) -> None:
    """v1, v2 and both kinds of frames of a stream name the pending payment, and the time after which to ask again."""
    for payer in (payer_v1, payer_v2):
        change_sat = FUNDING_SAT - 150_000
        refused = payer.pay(payer.payer.payment(150_000))
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        shown = refused.json()
        assert (shown["code"], shown["change_sat"], shown["retry_after"]) == ("payment_pending", change_sat, 5)
    later = payer_v2.payer.payment(160_000)
    with open_stream(payer_v2) as stream:
        stream.send(payer_v2.body(later).decode())
        text = json.loads(stream.recv(timeout=30))
        [answer] = pay_frame(stream, [later])
    assert isinstance(answer, Said)
    assert (text.pop("status"), answer.status) == (503, 503)
    assert text == json.loads(answer.body) == shown


@GIVES_UP
@pytest.mark.usefixtures("silence")
def test_another_payment_waits_for_the_one_that_was_offered(
    application: Application, payer_v1: V1, asking: System
) -> None:
    """While a payment has no answer, a larger one makes the server ask about it again first.

    Without an answer it is 503.
    """
    first, second = payer_v1.payer.payment(150_000), payer_v1.payer.payment(170_000)
    assert refusal(payer_v1.pay(first)) == (503, "payment_pending")
    assert refusal(payer_v1.pay(second)) == (503, "payment_pending")
    application.answer = lambda _: yes()
    assert payer_v1.pay(second).json()["value_received"] == 20_000
    a, b = application.keys[0], application.keys[-1]
    assert a != b
    assert application.keys == [a, a, a, b]
    assert _received(asking, payer_v1.payer) == 170_000


@GIVES_UP
@pytest.mark.usefixtures("silence")
def test_a_late_no_takes_only_the_offered_payment_back(application: Application, payer_v1: V1) -> None:
    """If the application refuses the unanswered payment later, the next one counts from the value before it."""
    first, second = payer_v1.payer.payment(150_000), payer_v1.payer.payment(170_000)
    assert refusal(payer_v1.pay(first)) == (503, "payment_pending")
    application.answer = lambda question: no("no") if question.body["value_received"] == 50_000 else yes()
    assert payer_v1.pay(second).json()["value_received"] == 70_000


JUNK = {
    "connection closed": Reply(0, b""),
    "500": Reply(500, b'{"resp_app_data":"yes"}'),
    "202": Reply(202, b'{"resp_app_data":"yes"}'),
    "redirect": Reply(302, b"", (("Location", "/elsewhere"),)),
    "empty": Reply(200, b""),
    "text": Reply(200, b"OK"),
    "list": Reply(200, b"[]"),
    "number as data": Reply(200, b'{"resp_app_data":1}'),
    "true as error": Reply(200, b'{"resp_app_data":"","resp_app_error":true}'),
    "not UTF-8": Reply(200, b'{"resp_app_data":"\xff"}'),
    "too long": Reply(200, b'{"resp_app_data":"' + b"x" * 4096 + b'"}'),
    "no known key": Reply(200, b'{"error":"not authorized"}'),
    "no key": Reply(200, b"{}"),
    "broken gzip": Reply(200, b"\x1f\x8bxx", (("Content-Encoding", "gzip"),)),
    "truncated gzip": Reply(200, gzip.compress(b'{"resp_app_data":"yes"}')[:-3], (("Content-Encoding", "gzip"),)),
    "gzip that says identity": Reply(200, gzip.compress(b'{"resp_app_data":"yes"}')),
    "gzip of too much": Reply(
        200, gzip.compress(b'{"resp_app_data":"' + b"x" * 3_000_000 + b'"}'), (("Content-Encoding", "gzip"),)
    ),
    "gzip twice": Reply(
        200, gzip.compress(gzip.compress(b'{"resp_app_data":"yes"}')), (("Content-Encoding", "gzip, gzip"),)
    ),
    "brotli": Reply(200, b'{"resp_app_data":"yes"}', (("Content-Encoding", "br"),)),
    "split header": Reply(200, b'{"resp_app_data":"yes"}', (("Content-Encoding", "\x00"),)),
}


@pytest.mark.parametrize("kind", JUNK)
def test_threat_36_a_malformed_answer_is_no_answer(
    application: Application, payer_v1: V1, asking: System, kind: str
) -> None:
    """An answer that is neither a clear yes nor a clear no counts as no answer: 503, and the server asks again."""
    payment = payer_v1.payer.payment(150_000)
    application.answer = lambda _: JUNK[kind]
    assert refusal(payer_v1.pay(payment)) == (503, "payment_pending")
    assert _received(asking, payer_v1.payer) == 100_000
    application.answer = lambda _: yes()
    assert payer_v1.pay(payment).json()["value_received"] == 50_000
    assert len(set(application.keys)) == 1
    assert {question.path for question in application.questions} == {"/app/value_received"}


def test_threat_26_a_deep_answer_is_no_answer(application: Application, payer_v1: V1) -> None:
    """Threat 26 holds for the answers of the application, too."""
    application.answer = lambda _: Reply(200, b'{"x":' + b"[" * 2000 + b"]" * 2000 + b"}")
    assert refusal(payer_v1.pay(payer_v1.payer.payment(150_000))) == (503, "payment_pending")


@GIVES_UP
def test_an_answer_that_trickles_in_is_no_answer(application: Application, payer_v1: V1) -> None:
    """The time-out applies to the whole answer, as its setting says: the client waits less than the answer takes."""
    reply = yes("0" * 400)
    application.answer = lambda _: Reply(*reply[:2], pause_seconds=SHORT_SECONDS / 8)
    began = time.monotonic()
    assert refusal(payer_v1.pay(payer_v1.payer.payment(150_000))) == (503, "payment_pending")
    assert time.monotonic() - began < len(reply.content) * SHORT_SECONDS / 8


_YES, _GZIP = b'{"resp_app_data":"here"}', (("Content-Encoding", "gzip"),)

CLEAR = {
    "gzip": Reply(200, gzip.compress(_YES), _GZIP),
    "gzip in two members": Reply(200, gzip.compress(_YES[:9]) + gzip.compress(_YES[9:]), _GZIP),
    "x-gzip": Reply(200, gzip.compress(_YES), (("Content-Encoding", "X-Gzip"),)),
    "deflate": Reply(200, zlib.compress(_YES), (("Content-Encoding", "deflate"),)),
    "deflate without zlib": Reply(200, zlib.compress(_YES)[2:-4], (("Content-Encoding", "deflate"),)),
    "identity": Reply(200, _YES, (("Content-Encoding", "identity"),)),
    "201": Reply(201, _YES),
    "204": Reply(204, b""),
    "text/plain": Reply(200, _YES, (("Content-Type", "text/plain; charset=utf-8"),)),
    "no type": Reply(200, b"\xef\xbb\xbf \r\n" + _YES + b"\n"),
    "null in both": Reply(200, b'{"resp_app_data":null,"resp_app_error":null}'),
    "null as data": Reply(200, b'{"resp_app_data":null}'),
    "null as error": Reply(200, b'{"resp_app_error":null}'),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_fault_34_a_clear_yes_in_any_usual_form_is_a_yes(application: Application, payer_v1: V1, kind: str) -> None:
    """The server asks for no compression, and reads gzip and deflate all the same; 201, 204 and null are answers."""
    application.answer = lambda _: CLEAR[kind]
    assert payer_v1.pay(payer_v1.payer.payment(150_000)).json()["value_received"] == 50_000
    assert application.questions[0].headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [200, 201])
def test_fault_48_null_as_data_of_a_refusal_is_a_refusal(application: Application, payer_v1: V1, status: int) -> None:
    """`resp_app_data: null` beside an error text is a no, compressed or not."""
    content = b'{"resp_app_data": null, "resp_app_error": "sold out"}'
    for reply in (Reply(status, content), Reply(status, gzip.compress(content), _GZIP)):
        application.answer = lambda _, reply=reply: reply
        refused = payer_v1.pay(payer_v1.payer.payment(150_000))
        assert refusal(refused) == (400, "application_error")
        assert refused.json()["message"].endswith("sold out")


# --- proof of the sender ----------------------------------------------------------------------------------------------


def _verified(key: str, question: Question) -> object:
    return Webhook(key).verify(question.raw, {name.lower(): value for name, value in question.headers.items()})


def test_fault_48_every_question_is_signed(application: Application, payer_v1: V1, asking: System) -> None:
    """A library of the Standard Webhooks scheme verifies id, time and body with the drawn key, and refuses a changed body."""
    key_file = asking.state / "callback.key"
    assert payer_v1.pay(payer_v1.payer.payment(150_000)).status_code == 200
    [question] = application.questions
    key = key_file.read_text().strip()
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert _verified(key, question) == question.body
    assert question.headers["webhook-id"] == question.idempotency_key == question.body["idempotency_key"]
    for forged in (
        question._replace(raw=question.raw.replace(b"50000", b"90000")),
        question._replace(headers=question.headers | {"webhook-id": "another"}),
        question._replace(headers=question.headers | {"webhook-timestamp": "1700000000"}),
    ):
        with pytest.raises(WebhookVerificationError):
            _verified(key, forged)


# --- at the same time -----------------------------------------------------------------------------------------------


def test_threat_36_duplicates_at_the_same_time_are_one_question(
    application: Application, silence: threading.Event, payer_v1: V1, asking: System
) -> None:
    """Ten copies of a payment are delivered once, and each copy gets its value.

    The application answers after the server has read all copies: it reads them before a request that comes later.
    """
    copy = pay_request(payer_v1, payer_v1.payer.payment(150_000))
    connections = [connect(asking.url) for _ in range(10)]
    for connection in connections:
        connection.sendall(copy)
    assert payer_v1.funding_info().status_code == 200
    silence.set()

    answers = [read_all(connection) for connection in connections]

    assert [statuses(answer) for answer in answers] == [[200]] * 10
    assert all(b'"value_received":50000' in answer for answer in answers)
    assert len(application.questions) == 1
    assert _received(asking, payer_v1.payer) == 150_000


def pay_request(client: V1, payment: Payment) -> bytes:
    """A payment as the only request of its connection."""
    where = urlsplit(f"{client.resource}?payment={encode_v1(payment)}")
    return f"PUT {where.path}?{where.query} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n\r\n".encode()


def test_payments_at_the_same_time_are_questions_one_by_one(
    application: Application, payer_v1: V1, asking: System
) -> None:
    """In any order, the values of accepted payments, and those of the questions, add up to the received value."""
    payments = [payer_v1.payer.payment(100_000 + 1_000 * paid) for paid in range(1, 13)]
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(payer_v1.pay, payments))
    accepted = [answer.json()["value_received"] for answer in answers if answer.status_code == 200]
    assert {answer.status_code for answer in answers} <= {200, 400}
    assert sum(accepted) == sum(question.body["value_received"] for question in application.questions) == 12_000
    assert _received(asking, payer_v1.payer) == 112_000


def _offered(
    application: Application, pay: Callable[[], httpx.Response], threads: ThreadPoolExecutor
) -> Future[httpx.Response]:
    """Send a payment in a thread, and return when the application has received the question about it."""
    answer = threads.submit(pay)
    deadline = time.monotonic() + 10
    while not application.questions:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return answer


def test_a_close_waits_for_the_answer_about_a_payment(
    application: Application, silence: threading.Event, payer_v1: V1, asking: System
) -> None:
    """After a yes a DELETE with the payment before the offered one is refused; a DELETE with the offered one closes."""
    old, new = payer_v1.payer.payment(100_000), payer_v1.payer.payment(150_000)
    with ThreadPoolExecutor(2) as threads:
        paid = _offered(application, lambda: payer_v1.pay(new), threads)
        closed = threads.submit(payer_v1.close, old)
        silence.set()
        assert paid.result().status_code == 200
        assert refusal(closed.result()) == (400, "not_newest_payment")
    assert payer_v1.close(new).status_code == 202
    assert asking.channel(payer_v1.payer.outpoint)["value_left"] == FUNDING_SAT - 150_000


@GIVES_UP
@pytest.mark.usefixtures("silence")
def test_fault_14_a_client_closes_although_the_application_is_silent(payer_v1: V1, asking: System) -> None:
    """A close at the value before the offered payment waits for one more question, and succeeds without an answer."""
    old, new = payer_v1.payer.payment(100_000), payer_v1.payer.payment(150_000)
    assert refusal(payer_v1.pay(new)) == (503, "payment_pending")
    assert payer_v1.close(old).status_code == 202
    closed = asking.channel(payer_v1.payer.outpoint)
    assert (closed["status"], closed["value_left"]) == ("closed", FUNDING_SAT - 100_000)


@GIVES_UP
@pytest.mark.usefixtures("silence")
def test_fault_14_a_close_with_the_offered_payment_pays_it(payer_v1: V1, asking: System) -> None:
    """A close with the offered payment as the newest closes the channel, and the payment counts."""
    new = payer_v1.payer.payment(150_000)
    assert refusal(payer_v1.pay(new)) == (503, "payment_pending")
    assert payer_v1.close(new).status_code == 202
    assert asking.channel(payer_v1.payer.outpoint)["value_left"] == FUNDING_SAT - 150_000


@GIVES_UP
@pytest.mark.usefixtures("silence")
def test_fault_14_a_client_closes_by_a_closing_payment(payer_v2: V2, asking: System) -> None:
    """The same holds for the close of v2."""
    assert refusal(payer_v2.pay(payer_v2.payer.payment(150_000))) == (503, "payment_pending")
    assert payer_v2.close(payer_v2.payer.payment(101_000)).status_code == 200
    assert asking.channel(payer_v2.payer.outpoint)["value_left"] == FUNDING_SAT - 101_000


@GIVES_UP
@pytest.mark.usefixtures("silence")
def test_fault_7_the_operator_closes_and_a_late_yes_is_settled(
    application: Application, payer_v1: V1, asking: System
) -> None:
    """A channel that the operator closes waits for the application's answer about the offered payment; a yes counts."""
    new = payer_v1.payer.payment(150_000)
    assert refusal(payer_v1.pay(new)) == (503, "payment_pending")
    where = path(payer_v1.payer.outpoint).removeprefix("/v2")
    assert asking.manage("POST", f"{where}/close").json()["status"] == "closing"
    application.answer = lambda _: yes()
    assert asking.manage("POST", f"{where}/close").json()["status"] == "closed"
    assert _received(asking, payer_v1.payer) == 150_000
    assert len(set(application.keys)) == 1
    assert refusal(payer_v1.pay(new)) == (410, "channel_closed")


def test_fault_15_another_order_of_the_same_value_has_another_key(application: Application, payer_v1: V1) -> None:
    """After a no, the same payment for another order has a new key, and so has a repeat for the same order."""
    payment = payer_v1.payer.payment(150_000)
    application.answer = lambda _: no("sold out")
    assert refusal(payer_v1.pay(payment)) == (400, "application_error")
    assert refusal(payer_v1.pay(payment)) == (400, "application_error")
    application.answer = lambda _: yes()
    assert payer_v1.pay(payment).status_code == 200
    assert len(set(application.keys)) == 3


# --- a crash while a question is open -------------------------------------------------------------------------------


@pytest.fixture
def crashed(application: Application, asking: System, payer_v1: V1) -> V1:
    """A channel whose server was killed during the question about a payment of 50,000 satoshi, and started again."""

    def kill(_question: Question) -> Reply:
        asking.kill_server()
        return yes()

    application.answer = kill
    with pytest.raises(httpx.TransportError):
        payer_v1.pay(payer_v1.payer.payment(150_000))
    application.answer = lambda _: yes()
    asking.start_server()
    payer_v1.url = asking.url
    return payer_v1


def test_threat_36_a_retry_after_a_crash_is_delivered_once_more(
    application: Application, asking: System, crashed: V1
) -> None:
    """The payment and its key were durable before the question: the retry has the same key, and counts once."""
    assert _received(asking, crashed.payer) == 100_000
    paid = crashed.pay(crashed.payer.payment(150_000))
    assert (paid.status_code, paid.json()["value_received"]) == (200, 50_000)
    assert len(application.keys) == 2
    assert len(set(application.keys)) == 1
    assert crashed.pay(crashed.payer.payment(150_000)).json()["value_received"] == 0


def test_threat_36_another_payment_after_a_crash_resolves_the_offered_one(
    application: Application, asking: System, crashed: V1
) -> None:
    """The application may have counted the offered payment, so the server asks about that one first."""
    assert crashed.pay(crashed.payer.payment(180_000)).json()["value_received"] == 30_000
    assert [question.body["value_received"] for question in application.questions] == [50_000, 50_000, 30_000]
    assert _received(asking, crashed.payer) == 180_000
