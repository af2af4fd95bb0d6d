"""402 answers: both protocols, caching, CORS, pages, and the same bytes by both ways."""

from __future__ import annotations

import json
import re

import pytest
from msgspec.structs import replace

from paychan.client.paying.demands import read_demands
from paychan.gateway.asking import Facts, takes_mpp, wants_page
from paychan.gateway.offering import _MOST_PREPARED, CORS, SLOT_SECONDS, laid_out, preflight_answer, refusal
from paychan.gateway.prices import one_price
from paychan.protocol.errors import Malformed, NotForSale, PaymentPending, SignerUnavailable, UnknownChannel
from paychan.protocol.payment import Payment
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.unpaid import ChallengeExpired, PaymentUnsupported
from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.offers import ChannelState, Voucher
from paychan.protocol.wire.x402_json import read_required
from tests.gateway.offers import BROWSER, NOW, PRICES, SECRET, TERMS, Parsed, asked, make_offering, route_of
from tests.lib.looped import looped

STATE = ChannelState(
    OutPoint(bytes(range(32)), 1),
    Sat(100_000),
    Sat(75),
    Sat(50),
    UnixTime(1_796_500_000),
    Payment(Sat(99_925), b"0" * 70, 0x83),
)


def answered(request: Facts, *, now: float = NOW, problem=None, closes: bool = False) -> Parsed:
    return Parsed(make_offering().answer(request, route_of(request), now, problem, closes=closes))


def test_an_unpaid_request_gets_both_offers_and_the_price_in_words() -> None:
    """x402 and MPP read the same offer from one answer, which names the URL, the price and the place of the channel."""
    request = asked("/v1/tile/5?x=%22&y=1")
    answer = answered(request)
    required = read_required(answer.one("PAYMENT-REQUIRED"))
    ours, theirs = x402.offers(required), mpp.offers([answer.one("WWW-Authenticate")])
    problem = json.loads(answer.body)

    assert answer.status == 402
    assert ours[0].offer == theirs[0].offer == make_offering().offer(route_of(request), request)
    assert ours[0].offer.amount_sat == 25
    assert required.resource is not None
    assert required.resource.url == "http://api.example/v1/tile/5?x=%22&y=1"
    assert required.resource.mime_type == "image/png"
    assert answer.one("Content-Type") == "application/problem+json"
    assert (problem["status"], problem["priceSat"], problem["unit"]) == (402, 25, "request")
    assert (problem["isCeiling"], problem["payUrl"], problem["openPriceSat"]) == (False, "https://pay.example", 70_000)
    assert problem["challengeId"] == theirs[0].challenge.id
    assert int(answer.one("Content-Length")) == len(answer.body)


def test_the_payers_library_reads_both_offers() -> None:
    """The library finds one demand for each protocol, with the price, and the resource that it sends back."""
    request = asked("/v1/tile/5?x=1")
    demands = read_demands([*answered(request).headers])

    assert [demand.protocol for demand in demands] == ["x402", "mpp"]
    assert {demand.offer for demand in demands} == {make_offering().offer(route_of(request), request)}
    assert demands[0].resource is not None
    assert demands[0].resource.url == request.url


@looped("late", [0, SLOT_SECONDS - 1])
def test_the_challenge_holds_for_its_lifetime(late: int) -> None:
    """A challenge of the first and of the last second of a slot holds for the lifetime, is signed, and then expires."""
    request, now = asked(), (NOW // SLOT_SECONDS) * SLOT_SECONDS + late
    (found,) = mpp.offers([answered(request, now=now).one("WWW-Authenticate")])
    voucher = Voucher(STATE.channel, Sat(99_900), Sat(100), b"0" * 8 + b"\x83")
    credential = mpp.read_credential(mpp.credential_header(found.challenge, voucher))
    assert credential is not None

    def problem(at: float, secrets: tuple[bytes, ...] = (b"newer", SECRET)):
        return mpp.challenge_problem(credential, found.offer, secrets, UnixTime(int(at)))

    assert problem(now + mpp.LIFETIME_SECONDS) is None
    assert isinstance(problem(now + mpp.LIFETIME_SECONDS + SLOT_SECONDS + 1), ChallengeExpired)
    assert problem(now, (b"another",)) is not None


def test_the_answer_may_not_be_stored_and_may_be_read_by_pages() -> None:
    """no-store, Vary, nosniff; every origin may read the price's headers; each header is there once."""
    answer = answered(asked())

    assert answer.one("Cache-Control") == "no-store"
    assert answer.one("Vary") == "Accept, Accept-Payment"
    assert answer.one("X-Content-Type-Options") == "nosniff"
    assert answer.one("Access-Control-Allow-Origin") == "*"
    exposed = {name.strip() for name in answer.one("Access-Control-Expose-Headers").split(",")}
    assert exposed >= {"PAYMENT-REQUIRED", "PAYMENT-RESPONSE", "WWW-Authenticate", "Payment-Receipt"}
    assert "access-control-allow-credentials" not in answer.names()
    assert len(set(answer.names())) == len(answer.names())
    assert answer.one("Date") == "Mon, 30 Nov 2026 00:53:20 GMT"


def test_a_preflight_allows_the_headers_of_a_payment() -> None:
    """A page of another site may send a payment by either protocol; the asterisk does not cover Authorization."""
    answer = Parsed(preflight_answer(NOW))
    allowed = {name.strip().lower() for name in answer.one("Access-Control-Allow-Headers").split(",")}

    assert allowed >= {"*", "authorization", "payment-authorization", "payment-signature", "idempotency-key"}
    assert answer.one("Access-Control-Allow-Origin") == dict(CORS)["Access-Control-Allow-Origin"] == "*"
    assert "POST" in answer.one("Access-Control-Allow-Methods")
    assert (answer.status, answer.body) == (204, b"")
    assert not {"content-length", "content-type", "connection"} & set(answer.names())
    assert Parsed(preflight_answer(NOW, closes=True)).one("Connection") == "close"


@looped("accept", ["", BROWSER])
@looped("closes", [False, True])
def test_a_head_has_the_length_and_no_body(accept: str, closes: bool) -> None:
    """A HEAD gets the headers of the GET, and no byte behind them."""
    get, head = (answered(asked(method=method, accept=accept), closes=closes) for method in ("GET", "HEAD"))

    assert head.headers == get.headers
    assert (len(get.body), head.body) == (int(get.one("Content-Length")), b"")
    assert ("connection" in get.names()) is closes


@looped("accept", ["", "*/*", "application/json", BROWSER])
@looped("accept_payment", ["", "bitcoin/session;q=0"])
@looped("target", ["/v1/tile/5", "/v1/tile/6?a='\"<>", "/video/a"])
def test_the_prepared_bytes_are_those_of_the_answer_in_parts(accept: str, accept_payment: str, target: str) -> None:
    """The fast way and the slow way say the same, also for the second request of a route."""
    offering = make_offering()
    for method in ("GET", "HEAD"):
        request = asked(target, method, accept=accept, accept_payment=accept_payment)
        slow = Parsed(laid_out(offering.structured(request, route_of(request), NOW), NOW, is_head=method == "HEAD"))
        for _ in range(2):
            fast = Parsed(offering.answer(request, route_of(request), NOW))
            assert (fast.status, sorted(fast.headers), fast.body) == (slow.status, sorted(slow.headers), slow.body)


def test_an_answer_is_never_that_of_another_request() -> None:
    """Host, scheme, target, route, time, Accept and Accept-Payment each change the answer, in any order of requests."""
    offering = make_offering()
    variants = [
        (asked(), NOW), (asked("/v1/tile/6"), NOW), (asked(host="b.example"), NOW), (asked(scheme="https"), NOW),
        (asked("/video/x"), NOW), (asked(), NOW + SLOT_SECONDS), (asked(accept=BROWSER), NOW),
        (asked("/v1/tile/6", accept=BROWSER), NOW), (asked(accept_payment="bitcoin/session;q=0"), NOW),
    ]  # fmt: skip
    fresh = [make_offering().answer(request, route_of(request), now) for request, now in variants]

    assert len(set(fresh)) == len(variants)
    for order in (variants, variants[::-1], variants):
        assert {offering.answer(request, route_of(request), now) for request, now in order} == set(fresh)


def test_a_changed_price_list_and_changed_terms_count_at_once() -> None:
    """A route of a new list, and new terms, are not answered from what was prepared before."""
    offering, request = make_offering(), asked("/x")
    for price in (5, 6):
        route = one_price("http://h", Sat(price), "test").find("GET", "/x")
        assert json.loads(Parsed(offering.answer(request, route, NOW)).body)["priceSat"] == price
    offering.terms = replace(TERMS, min_confirmations=2)
    assert json.loads(Parsed(offering.answer(request, route, NOW)).body)["minConfirmations"] == 2


def test_the_memory_for_prepared_answers_is_bounded() -> None:
    """A stranger with a new Host header for each request, and each URL, grows nothing."""
    offering, route = make_offering(), one_price("http://h", Sat(5), "test").find("GET", "/x")
    for number in range(3 * _MOST_PREPARED):
        offering.answer(asked("/x", host=f"h{number}.example"), route, NOW)
    assert len(offering._prepared) <= _MOST_PREPARED
    before = len(offering._prepared)
    for number in range(100):
        offering.answer(asked(f"/x/{number}", host=f"h{3 * _MOST_PREPARED - 1}.example"), route, NOW)
    assert len(offering._prepared) == before


def test_without_a_realm_the_host_is_the_realm() -> None:
    """The first try needs no realm: payers see the host that they asked, each its own."""
    offering, route = make_offering(), one_price("http://h", Sat(5), "test").find("GET", "/x")
    for host in ("api.example", "b.example:8080", "api.example"):
        answer = Parsed(offering.answer(asked("/x", host=host), route, NOW))
        (found,) = mpp.offers([answer.one("WWW-Authenticate")])
        required = read_required(answer.one("PAYMENT-REQUIRED"))

        assert found.challenge.realm == host
        assert required.resource is not None
        assert required.resource.service_name == host


def test_a_corrective_answer_shows_the_channel_and_its_newest_payment() -> None:
    """Both protocols have the state with the proof; the answer is a 402 although the refusal's own status is 404."""
    request = asked(accept=BROWSER)
    answer = make_offering().structured(request, route_of(request), NOW, UnknownChannel(), STATE)
    headers = dict(answer.headers)
    (ours,), (theirs,) = (
        x402.offers(read_required(headers["PAYMENT-REQUIRED"])),
        mpp.offers([headers["WWW-Authenticate"]]),
    )

    assert answer.status == 402
    assert ours.state == theirs.state == STATE
    assert read_required(headers["PAYMENT-REQUIRED"]).error == "invalid_batch_settlement_bitcoin_channel_not_found"
    assert json.loads(answer.body)["code"] == "unknown_channel"  # a program that pays gets no page
    without = make_offering().structured(request, route_of(request), NOW, UnknownChannel())
    assert x402.offers(read_required(dict(without.headers)["PAYMENT-REQUIRED"]))[0].state is None


@looped(
    ("problem", "status"),
    [
        (PaymentUnsupported(field="binding", got="x", want="y"), 400),
        (Malformed(field="x", reason="y"), 400),
        (PaymentPending(change_sat=5), 503),
    ],
)
def test_a_request_that_no_payment_mends_gets_no_offer(problem, status: int) -> None:
    """400 and 503 ask for no money; 503 says when to come back; pages of other sites can read the reason."""
    answer = answered(asked(), problem=problem)

    assert answer.status == status
    assert not {"payment-required", "www-authenticate"} & set(answer.names())
    assert ("retry-after" in answer.names()) is (status == 503)
    assert answer.one("Access-Control-Allow-Origin") == "*"
    assert answer.one("Cache-Control") == "no-store"
    assert json.loads(answer.body)["code"] == problem.code
    assert json.loads(answer.body)["status"] == status
    assert "priceSat" not in json.loads(answer.body)


def test_a_reason_from_inside_the_server_stays_inside() -> None:
    """A stranger reads the public text of a refusal."""
    answer = Parsed(laid_out(refusal(SignerUnavailable(reason="/run/geheim")), NOW, is_head=False))

    assert answer.status == 503
    assert b"geheim" not in answer.body
    assert json.loads(answer.body)["detail"] == "the signer is not available"


def test_an_unlisted_path_gets_a_problem_without_an_offer() -> None:
    """The answer to what is not for sale: 404, by the same rules for caches and pages of other sites."""
    answer = Parsed(laid_out(refusal(NotForSale(path="/x")), NOW, is_head=False, closes=True))

    assert (answer.status, json.loads(answer.body)["code"]) == (404, "not_for_sale")
    assert answer.one("Cache-Control") == "no-store"
    assert answer.one("Connection") == "close"
    assert not {"payment-required", "www-authenticate", "retry-after", "allow"} & set(answer.names())


@looped(
    ("value", "expected"),
    [
        ("", True), ("bitcoin/session", True), ("bitcoin/session;q=0", False), ("bitcoin/session; q=0.000", False),
        ("bitcoin/session;q=0.001", True), ("*/session;q=0", False), ("bitcoin/*;q=0", False), ("*/*;q=0", False),
        ("*/*;q=0, bitcoin/session", True), ("bitcoin/*, */session;q=0", True), ("tempo/charge", True),
        ("BITCOIN/Session;Q=0", False), ("bitcoin/session;q=x", True), (";;,,=", True), ("*/*;q=0," * 500, True),
    ],
)  # fmt: skip
def test_accept_payment(value: str, expected: bool) -> None:
    """A weight of 0 leaves MPP out, the most special range counts, and other methods only say what is preferred."""
    answer = answered(asked(accept_payment=value))

    assert takes_mpp(value) is expected
    assert ("www-authenticate" in answer.names()) is expected
    assert "payment-required" in answer.names()
    assert ("challengeId" in json.loads(answer.body)) is expected


@looped(
    ("accept", "method", "expected"),
    [
        (BROWSER, "GET", True), (BROWSER, "HEAD", True), (BROWSER, "POST", False), ("text/html;q=0.5", "GET", True),
        ("text/html;q=0, */*", "GET", False), ("*/*", "GET", False), ("", "GET", False), ("text/html2", "GET", False),
        ("application/xhtml+xml", "GET", False), ("application/json, text/html;level=1", "GET", True),
        ("a," * 600 + "text/html", "GET", False),
    ],
)  # fmt: skip
def test_who_gets_a_page(accept: str, method: str, expected: bool) -> None:
    """A request that names text/html gets a page; programs name it seldom, and `*/*` is theirs."""
    request = asked(accept=accept, method=method)

    assert wants_page(request) is expected
    assert answered(request).one("Content-Type").startswith("text/html") is expected


@looped(
    "host",
    [
        "",
        "a b",
        "a\r\nX: y",
        "a/b",
        "a@b",
        "a?b",
        "a#b",
        "a%41",
        "h:999999",
        "[::1",
        "-a",
        "a:",
        "ä",
        "x" * 300,
        'a"b',
        "a\\b",
    ],
)
def test_a_host_that_no_url_has_is_refused(host: str) -> None:
    """A Host header becomes part of URLs and of the realm: no text leaves its place there."""
    with pytest.raises(Malformed):
        asked(host=host)


@looped("host", ["a", "api.example:8080", "127.0.0.1:1", "[::1]:8080", "[2001:db8::1]", "a_b.example."])
def test_hosts_of_urls(host: str) -> None:
    """Names and addresses with and without a port."""
    assert answered(asked(host=host)).status == 402


def test_a_long_url_keeps_the_head_small() -> None:
    """The query of a long URL is left out: clients limit a head to 8 KiB and less for a header."""
    request = asked("/v1/tile/5?" + "q" * 7000)
    required = read_required(answered(request).one("PAYMENT-REQUIRED"))
    raw = make_offering().answer(request, route_of(request), NOW)

    assert required.resource is not None
    assert required.resource.url == "http://api.example/v1/tile/5"
    assert len(raw.partition(b"\r\n\r\n")[0]) < 4096
    assert not re.search(rb"qqqq", raw)


def test_a_price_told_later_is_offered_as_a_ceiling() -> None:
    """The amount is the ceiling, and the body says so."""
    request = asked("/v1/chat", "POST")
    problem = json.loads(answered(request).body)

    assert (problem["priceSat"], problem["unit"], problem["isCeiling"]) == (500, "token", True)
    assert PRICES.find("POST", "/v1/chat").is_ceiling
