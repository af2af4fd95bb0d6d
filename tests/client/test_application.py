"""An application behind the real server that accepts, refuses, or does not answer: the payer's view of each."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from paychan.client import Channel, Patience, Payer, PaymentPending, PaymentRefused, State, WouldTakeBack
from tests.lib.application import Application as StandIn
from tests.lib.application import Question, Reply, yes
from tests.lib.system import System

HASTY = Patience(attempts=1)
LIMIT_SECONDS = 1.0 + 5.0 + 0.5
"""Time limit that ends during the second request: the first is answered after 1 s, with a Retry-After of 5 s."""


class Application:
    """Answers with `answer`; None closes the connection instead."""

    def __init__(self) -> None:
        self.answer: dict[str, object] | None = {"resp_app_data": "", "resp_app_error": None}
        self.asked_sat: list[int] = []
        application = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                application.asked_sat.append(question["value_received"])
                if application.answer is None:
                    return
                body = json.dumps(application.answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True


@pytest.fixture(scope="module")
def application() -> Iterator[Application]:
    """The application, listening."""
    running = Application()
    thread = threading.Thread(target=running.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.server.shutdown()
    thread.join()
    running.server.server_close()


@pytest.fixture(scope="module")
def system(application: Application, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server; the server asks the application."""
    url = f"http://127.0.0.1:{application.server.server_address[1]}"
    with System(tmp_path_factory.mktemp("system"), extra=f'[callback]\nurl = "{url}"\n') as running:
        yield running


@pytest.fixture
def channel(
    system: System, application: Application, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Channel]:
    """An open channel, in the version of the test."""
    application.answer = {"resp_app_data": "", "resp_app_error": None}
    application.asked_sat.clear()
    with Payer(system.url, wallet=tmp_path, version=request.param, patience=HASTY) as payer:
        channel = payer.new_channel(hours=100)
        channel.fund_debug()
        channel.open()
        yield channel


both_versions = pytest.mark.parametrize("channel", [1, 2], indirect=True)


@pytest.mark.parametrize("channel", [2], indirect=True)
def test_the_application_answers_the_payer(application: Application, channel: Channel) -> None:
    """The receipt holds the application's text."""
    application.answer = {"resp_app_data": "here is your article", "resp_app_error": None}

    assert channel.pay(100).application_data == "here is your article"


@both_versions
def test_a_refused_payment_stays_signed(application: Application, channel: Channel) -> None:
    """A refused payment stays signed: the same amount or a larger one can be paid, a smaller one cannot."""
    before = channel.paid_sat
    application.answer = {"resp_app_error": "sold out"}
    with pytest.raises(PaymentRefused, match="sold out") as caught:
        channel.pay(100)
    assert caught.value.code == "application_error"
    assert channel.paid_sat == before + 100
    with pytest.raises(WouldTakeBack):
        channel.pay(99)
    with pytest.raises(PaymentRefused):
        channel.resume()
    application.answer = {"resp_app_error": None}

    receipt = channel.resume()

    assert (receipt.paid_sat, receipt.repeated) == (100, False)
    assert application.asked_sat == [100, 100, 100]
    assert channel.pay(1).total_paid_sat == before + 101


@both_versions
def test_closing_after_a_refusal_pays_the_accepted_sum(application: Application, channel: Channel) -> None:
    """The settlement leaves out a payment that the application refused."""
    left = channel.left_sat
    application.answer = {"resp_app_error": "sold out"}
    with pytest.raises(PaymentRefused):
        channel.pay(100)

    assert channel.close().change_sat == left


@both_versions
def test_a_payment_without_an_answer_counts_once(application: Application, channel: Channel) -> None:
    """While the application does not answer, the payment is neither lost nor booked; sent again, it counts once."""
    before = channel.paid_sat
    application.answer = None
    with pytest.raises(PaymentPending, match="the payment of 100 sat is signed and kept") as caught:
        channel.pay(100)
    assert caught.value.fields["pending_sat"] == 100
    application.answer = {"resp_app_error": None}

    receipt = channel.resume()

    assert receipt.paid_sat == 100
    assert channel.status().paid_sat == before + 100
    assert set(application.asked_sat) == {100}


@both_versions
def test_fault_49_while_the_application_is_silent_the_payer_can_ask_and_leave(
    application: Application, channel: Channel
) -> None:
    """`status` names the pending payment, a new payment is not mixed with it, and closing gives it back."""
    before, left = channel.paid_sat, channel.left_sat
    application.answer = None
    with pytest.raises(PaymentPending):
        channel.pay(10)

    record = channel.status()
    assert (record.state, record.pending_sat, record.refused) == (State.OPEN, 10, False)
    with pytest.raises(PaymentPending, match="earlier payment of 10 sat"):
        channel.pay(20)
    assert set(application.asked_sat) == {10}
    assert channel.paid_sat == before + 10

    settled = channel.close()

    assert settled.change_sat == left
    assert channel.record.state is State.CLOSED


@both_versions
def test_fault_49_after_the_silence_each_payment_is_asked_about_by_itself(
    application: Application, channel: Channel
) -> None:
    """The pending payment of 10 sat is finished first and named; the application gets 10, then 20."""
    application.answer = None
    with pytest.raises(PaymentPending):
        channel.pay(10)
    application.answer = {"resp_app_data": "", "resp_app_error": None}
    application.asked_sat.clear()

    receipt = channel.pay(20)

    assert receipt.earlier is not None
    assert (receipt.earlier.paid_sat, receipt.paid_sat) == (10, 20)
    assert application.asked_sat == [10, 20]


@both_versions
def test_fault_49_a_no_to_the_earlier_payment_is_told_and_nothing_new_is_paid(
    application: Application, channel: Channel
) -> None:
    """The refusal names the earlier payment."""
    application.answer = None
    with pytest.raises(PaymentPending):
        channel.pay(10)
    application.answer = {"resp_app_error": "sold out"}

    with pytest.raises(PaymentRefused, match=r"earlier payment of 10 sat.*sold out") as caught:
        channel.pay(20)

    assert 20 not in application.asked_sat
    assert "no answer" not in str(caught.value)
    assert "refused the earlier payment" in str(caught.value)
    assert str(caught.value).endswith("It can be sent now, if it is at least 10 sat")
    application.answer = {"resp_app_data": "", "resp_app_error": None}
    assert channel.pay(20).paid_sat == 20


@pytest.mark.parametrize("version", [1, 2])
def test_an_application_that_hangs_is_a_pending_payment_at_the_time_limit(tmp_path: Path, version: int) -> None:
    """The limit ends while a repeated request waits: the answer before it counts, and says that the payment is kept."""
    over = threading.Event()

    def hang(_: Question) -> Reply:
        over.wait(30)
        return yes()

    with StandIn() as hanging:
        settings = f'[callback]\nurl = "{hanging.url}"\ntimeout_seconds = 1.0\n'
        with (
            System(tmp_path / "system", extra=settings) as system,
            Payer(system.url, wallet=tmp_path / "wallet", version=version, time_limit_seconds=LIMIT_SECONDS) as payer,
        ):
            channel = payer.new_channel(hours=100)
            channel.fund_debug()
            channel.open()
            hanging.answer = hang
            with pytest.raises(PaymentPending):
                channel.pay(100)
            assert len(hanging.questions) > 1
            over.set()
            assert channel.resume().paid_sat == 100
