"""The payment stream over real sockets: the answers to frames, their order, and the end of a stream."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT
from paychan.protocol.payment import Payment
from paychan.protocol.wire.payment_frames import MAX_FRAME_PAYMENTS, Said, Taken, read_answers, write_payments
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.streams import answers, closed, code, masked, open_stream, pay_frame, stream_url
from tests.lib.rbpcp import V2, Payer
from tests.lib.system import System

LEFT = DEBUG_FUNDING_SAT - 100_000


def row(client: V2, count: int, start: int = 100_000) -> list[Payment]:
    """Make payments of 1 sat each."""
    return [client.payer.payment(start + n) for n in range(1, count + 1)]


def text(client: V2, payment: Payment, application_data: str = "") -> str:
    return client.body(payment, application_data).decode()


def test_binary_payments_are_answered_with_their_values(open_v2: V2) -> None:
    """Each payment of a frame has an answer: the change that is left, and the difference to the payment before."""
    with open_stream(open_v2) as stream:
        assert pay_frame(stream, row(open_v2, 3)) == [Taken(LEFT - n, 1) for n in (1, 2, 3)]
        assert pay_frame(stream, [open_v2.payer.payment(100_010)]) == [Taken(LEFT - 10, 7)]


def test_text_payments_are_answered_like_put(open_v2: V2) -> None:
    """The answer to one payment is an object, to a list a list; each object is the body of an answer to `PUT`."""
    with open_stream(open_v2) as stream:
        stream.send(text(open_v2, open_v2.payer.payment(100_005)))
        first = json.loads(stream.recv())
        stream.send("[" + ",".join(text(open_v2, each) for each in row(open_v2, 2, 100_005)) + "]")
        others = json.loads(stream.recv())
    put = open_v2.pay(open_v2.payer.payment(100_008)).json()
    assert first == put | {"channel_value_left": LEFT - 5, "value_received": 5}
    assert others == [put | {"channel_value_left": LEFT - n, "value_received": 1} for n in (6, 7)]


def test_a_bad_payment_does_not_affect_the_others(open_v2: V2) -> None:
    """Refused payments have the status and the code of `PUT`; the other payments of the frame are judged as usual."""
    bad = Payment(open_v2.payer.payment(100_002).change_sat, open_v2.payer.payment(5).signature, 0x83)
    sent = [open_v2.payer.payment(each) for each in (100_001, 99_999)] + [bad, open_v2.payer.payment(100_003)]
    with open_stream(open_v2) as stream:
        answered = pay_frame(stream, sent)
        assert answered[0] == Taken(LEFT - 1, 1)
        assert code(answered[1]) == (400, "value_backwards")
        assert code(answered[2]) == (400, "bad_signature")
        assert answered[3] == Taken(LEFT - 3, 2)
        stream.send("[" + text(open_v2, sent[3]) + ', {"no": "payment"}, 5]')
        listed = json.loads(stream.recv())
        stream.send('{"signature_data": ')
        lone = json.loads(stream.recv())
    assert [each.get("code") for each in listed] == [None, "missing", "malformed"]
    assert [each.get("status") for each in listed] == [None, 400, 400]
    assert lone["code"] == "malformed"


def test_fault_75_a_forged_payment_over_a_stream_reveals_no_number(open_v2: V2) -> None:
    """A forged payment that takes value back is refused as a bad signature; the payer's own shows both numbers."""
    good = open_v2.payer.payment(99_999)
    forged = Payment(good.change_sat, open_v2.payer.payment(5).signature, 0x83)
    with open_stream(open_v2) as stream:
        first, second = pay_frame(stream, [forged, good])
    assert code(first) == (400, "bad_signature")
    assert isinstance(second, Said)
    assert json.loads(second.body)["need_sat"] == LEFT


def test_answers_leave_in_the_order_of_the_payments(open_v2: V2) -> None:
    """Many frames in flight, text and binary, good and bad: the n-th answer belongs to the n-th payment."""
    with open_stream(open_v2) as stream:
        for n in range(1, 41):
            payment = open_v2.payer.payment(100_000 + n if n % 4 else 99_000 + n)
            stream.send(text(open_v2, payment) if n % 3 == 0 else write_payments([payment]))
        left: list[int] = []
        while len(left) < 40:
            frame = stream.recv(timeout=10)
            if isinstance(frame, str):
                answer = json.loads(frame)
                left.append(answer.get("channel_value_left") or answer["got_sat"])
            else:
                left += [
                    each.change_sat if isinstance(each, Taken) else json.loads(each.body)["got_sat"]
                    for each in read_answers(frame)
                ]
    assert left == [LEFT - n if n % 4 else LEFT + 1000 - n for n in range(1, 41)]


@pytest.mark.parametrize("way", ["header", "message", "query"])
def test_the_secret_may_come_in_three_ways(open_v2: V2, way: str) -> None:
    """A client may send the secret in `Authorization`, in the first message, or in the query."""
    bare = stream_url(open_v2).partition("?")[0]
    headers = {"Authorization": f"Bearer {open_v2.secret}"} if way == "header" else {}
    url = stream_url(open_v2) if way == "query" else bare
    with connect(url, proxy=None, additional_headers=headers) as stream:
        if way == "message":
            stream.send(json.dumps({"secret": open_v2.secret}))
        assert pay_frame(stream, row(open_v2, 1)) == [Taken(LEFT - 1, 1)]


def test_a_wrong_secret_is_an_unknown_channel(open_v2: V2, new_v2: Callable[[Dialect], V2]) -> None:
    """Answers and close codes are the same for a wrong secret and for an unknown channel."""
    unknown = new_v2(open_v2.dialect)
    unknown.secret = open_v2.secret
    refusals = []
    for client in (open_v2, unknown):
        with pytest.raises(InvalidStatus) as refused:
            connect(stream_url(client, "11" * 32), proxy=None)
        refusals.append((refused.value.response.status_code, bytes(refused.value.response.body or b"")))
        for first in ('{"secret": "' + "11" * 32 + '"}', b"\x01" + bytes(72), "[]", '{"secret": 5}'):
            with connect(stream_url(client).partition("?")[0], proxy=None) as stream:
                stream.send(first)
                refusals.append(closed(stream))
    assert set(refusals) == {(404, b""), (4404, "unknown_channel")}


@pytest.mark.parametrize(
    ("frame", "end"),
    [
        (b"\x02" + bytes(72), (4400, "malformed")),
        (b"\x01" + bytes(71), (4400, "malformed")),
        ("[{", (4400, "malformed")),
        (b"\x01" + bytes(72 * (MAX_FRAME_PAYMENTS + 1)), (4413, "too_many_payments")),
    ],
)
def test_a_frame_without_readable_payments_ends_the_stream(
    open_v2: V2, frame: bytes | str, end: tuple[int, str]
) -> None:
    """Earlier frames are answered, later frames are not read, and the close code gives the reason."""
    with open_stream(open_v2) as stream:
        stream.send(write_payments(row(open_v2, 1)))
        stream.send(frame)
        with suppress(ConnectionClosed):  # the server may have closed already
            stream.send(write_payments(row(open_v2, 1, 100_001)))
        assert answers(stream, 1) == [Taken(LEFT - 1, 1)]
        assert closed(stream) == end
    assert open_v2.pay(open_v2.payer.payment(100_002)).json()["value_received"] == 1


def test_a_payment_that_gives_everything_ends_the_stream(open_v2: V2) -> None:
    """The draining payment is answered with the settlement, later payments are refused, then the stream closes."""
    with open_stream(open_v2) as stream:
        drain = open_v2.payer.payment_of_change(0)
        first, second, third = pay_frame(stream, [*row(open_v2, 1), drain, drain])
        assert first == Taken(LEFT - 1, 1)
        assert isinstance(second, Said)
        result = json.loads(second.body)
        assert (result["channel_status"], result["value_received"]) == ("closed", LEFT - 1)
        assert len(result["settlement_txid"]) == 64
        assert code(third)[0] == 410
        assert closed(stream) == (1000, "channel closed")


def test_a_stream_of_a_settled_channel_is_refused_and_closed(open_v2: V2) -> None:
    """A stream of a settled channel answers its payments with 410 and closes with 4410."""
    with open_stream(open_v2) as stream:
        assert open_v2.close(open_v2.payer.payment(100_000)).status_code == 200
        assert code(pay_frame(stream, row(open_v2, 1))[0]) == (410, "channel_closed")
        assert closed(stream) == (4410, "channel_closed")


def test_a_client_that_reads_no_answers_is_not_read_without_limit(open_v2: V2) -> None:
    """Payments in flight are limited: sending blocks on the client's socket, and continues when the client reads.

    Each payment has a value: payments of no value would be delayed.
    """
    count = 20 * MAX_FRAME_PAYMENTS
    payments = row(open_v2, count)
    with open_stream(open_v2, max_queue=1) as stream:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for begin in range(0, count, MAX_FRAME_PAYMENTS):
            stream.send(write_payments(payments[begin : begin + MAX_FRAME_PAYMENTS]))
        assert answers(stream, count) == [Taken(LEFT - n, 1) for n in range(1, count + 1)]


def test_frames_may_arrive_in_any_pieces(open_v2: V2) -> None:
    """Payments are read that arrive byte by byte, several at once, and as fragments with a ping between them."""
    payments = row(open_v2, 6)
    with open_stream(open_v2) as stream:
        frames = [masked(0x82, write_payments([each])) for each in payments[:4]]
        for byte in frames[0]:
            stream.socket.sendall(bytes([byte]))
        stream.socket.sendall(frames[1] + frames[2] + frames[3][:40])
        assert answers(stream, 3) == [Taken(LEFT - n, 1) for n in (1, 2, 3)]
        stream.socket.sendall(frames[3][40:])
        rest = write_payments(payments[4:])
        stream.socket.sendall(masked(0x02, rest[:70]) + masked(0x89, b"there?") + masked(0x80, rest[70:]))
        assert answers(stream, 3) == [Taken(LEFT - n, 1) for n in (4, 5, 6)]
        big = masked(0x82, write_payments([payments[5]] * 100))
        stream.socket.sendall(big + masked(0x81, text(open_v2, payments[5]).encode()))
        assert answers(stream, 100) == [Taken(LEFT - 6, 0)] * 100
        assert json.loads(stream.recv(timeout=10))["value_received"] == 0


@pytest.mark.parametrize(
    "broken",
    [b"\xc2\x81abcd!", b"\x82\x01!", b"\x83\x81abcd!", b"\x80\x81abcd!", b"\x89\xfe\x00\x80" + bytes(132)],
    ids=["reserved bit", "no mask", "unknown opcode", "nothing to continue", "long ping"],
)
def test_a_violation_of_the_websocket_protocol_ends_the_connection(open_v2: V2, broken: bytes) -> None:
    """No byte of a broken frame is read as a payment, and the server continues."""
    with open_stream(open_v2) as stream:
        stream.socket.sendall(broken + masked(0x82, write_payments(row(open_v2, 1))))
        with pytest.raises(ConnectionClosed):
            stream.recv(timeout=10)
    assert open_v2.pay(open_v2.payer.payment(100_002)).status_code == 200


def test_bad_signatures_delay_a_stream_and_end_it(open_v2: V2) -> None:
    """Each bad signature costs the server a full check: after twenty no payment of this stream is checked."""
    bad = Payment(open_v2.payer.payment(100_002).change_sat, open_v2.payer.payment(5).signature, 0x83)
    with open_stream(open_v2) as stream:
        begun = time.monotonic()
        assert [code(each)[1] for each in pay_frame(stream, [bad] * 3)] == ["bad_signature"] * 3
        assert time.monotonic() - begun >= 0.07
        stream.send(write_payments([bad] * 17))
        assert closed(stream) == (4429, "too_many_bad_signatures")


def test_no_upgrade_is_a_bad_request(open_v2: V2) -> None:
    """The answer to a plain GET names the missing header."""
    response = httpx.get(stream_url(open_v2).replace("ws", "http", 1), verify=False)
    assert (response.status_code, response.json()["code"]) == (400, "malformed")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[System]:
    """A server with one slot for streams, frequent pings, and a check of each payment."""
    stream = "max_streams = 1\nping_seconds = 0.2\ncoalesce = false"
    with System(tmp_path, sections={"stream": stream, "http": "body_seconds = 1"}) as running:
        yield running


def opened(system: System, http: httpx.Client) -> V2:
    client = V2(system.url, Payer(), http)
    assert client.open(client.payer.payment(100_000)).status_code == 201
    return client


def test_streams_are_bounded_and_pinged(small: System, http: httpx.Client) -> None:
    """A stream above the limit gets 503; a stream without pongs, or without a secret, is closed."""
    client = opened(small, http)
    with open_stream(client) as stream:
        assert len(pay_frame(stream, row(client, 16))) == 16
        with pytest.raises(InvalidStatus) as refused:
            open_stream(client)
        assert refused.value.response.status_code == 503
    with connect(stream_url(client).partition("?")[0], proxy=None) as silent:
        assert closed(silent) == (4404, "unknown_channel")


def test_a_server_that_stops_closes_its_streams(small: System, http: httpx.Client) -> None:
    """The close code of the streams is 1001."""
    client = opened(small, http)
    with open_stream(client) as stream:
        assert len(pay_frame(stream, row(client, 1))) == 1
        assert small.server is not None
        small.server.stop()
        assert closed(stream) == (1001, "server stops")
