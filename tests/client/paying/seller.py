"""A small real HTTP server that sells for satoshi by the core's own rules, and lies on request.

Payments are real: `Charge` of the state machine verifies and books them, in the channel of a `Liar` or one that the test
gives. `lies` holds one entry per coming paid request: None for an honest answer, or a `Lie`, which changes the answer only.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal, Self

import msgspec
from msgspec import Struct

from paychan.protocol import request_id
from paychan.protocol.channel import Accepted, Channel, Rejected, Rules, View
from paychan.protocol.charges import Charge, Release
from paychan.protocol.errors import PaychanError, UnknownChannel
from paychan.protocol.payment import Payment
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire import mpp, mpp_challenge, x402, x402_json
from paychan.protocol.wire.mpp_outcomes import Receipt, receipt_header
from paychan.protocol.wire.offers import CHAINS, ChannelState, Offer, Settled, Voucher
from paychan.protocol.wire.x402_outcomes import settled_json
from tests.client.liar import Liar, _Server
from tests.lib.channels import private_key

RULES = Rules(
    dust_sat=Sat(700), min_confirmations=0, settlement_period_seconds=0, min_duration_seconds=0, fee_sat_per_vb=1
)
SECRET = b"secret of the seller's challenges"
IDENTITY = private_key("identity of the seller").public_key.format()


class Lie(Struct, frozen=True):
    """Differences of one answer to a paid request from the truth; several fields may be combined."""

    drop: Literal["", "before", "after"] = ""
    """Close the connection: before the payment is booked, or after it."""
    status: int = 0
    """Answer with this status, and without a word about the payment."""
    refuse: bool = False
    """Book the payment, and say 402 with the bare offer."""
    state: ChannelState | None = None
    """Answer 402 with this correction."""
    credit_sat: int | None = None
    """Claim this credit in the receipt."""
    release: bool = False
    """The upstream failed: give the price back as credit, and answer 502 with a receipt."""
    location: str = ""
    """Redirect to this URL, after booking."""


class Seller:
    """Listens on a free port of this machine while in use as a context manager. Each path but `/free` has the price."""

    def __init__(self, liar: Liar, price_sat: int = 25, protocols: tuple[str, ...] = ("x402", "mpp")) -> None:
        self.liar, self.price_sat, self.protocols = liar, price_sat, protocols
        self.pay_url, self.identity = liar.url, IDENTITY
        self.lies: deque[Lie | None] = deque()
        self.identifier = True
        """Offer x402's extension `payment-identifier`."""
        self.paid: list[str] = []
        """Method and path of each request that was delivered for."""
        self.seen: list[dict[str, str]] = []
        """Headers of all requests, names in lower case."""
        self.bodies: list[bytes] = []
        self.redirect = ""
        """Answer unpaid requests with a redirect to this URL."""
        self.seconds = 0.0
        """Delay of each paid answer."""
        self._booking = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://{self.host}/"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def channel(self) -> Channel:
        assert self.liar.channel is not None
        return self.liar.channel

    @property
    def signed_sat(self) -> int:
        """Sum of all payments of the channel after its opening, as the seller could settle them."""
        return self.channel.funding_sat - self.channel.payment.change_sat - 10_000

    @property
    def offer(self) -> Offer:
        return Offer(
            amount_sat=Sat(self.price_sat),
            unit="request",
            chain=CHAINS["testnet"],
            identity=self.identity,
            pay_url=self.pay_url,
            network="testnet",
            open_price_sat=Sat(10_000),
            min_confirmations=0,
            settlement_period_seconds=21_600,
            dust_sat=Sat(700),
            realm="seller",
        )

    def state(self, proof: Payment | None = None, **differences: Any) -> ChannelState:
        """Return the channel as a correction shows it; with another newest payment, or other members, it lies."""
        channel = self.channel
        proof = proof or channel.payment
        accepted = channel.funding_sat - proof.change_sat
        true = ChannelState(
            channel=channel.outpoint,
            capacity_sat=channel.funding_sat,
            accepted_sat=Sat(accepted),
            spent_sat=Sat(accepted - channel.credit_sat),
            expiry=UnixTime(channel.terms.expiry.lock_time),
            newest=proof,
        )
        return msgspec.structs.replace(true, **differences)

    # --- answers ------------------------------------------------------------------------------------------------------

    def unpaid(self, url: str, error: PaychanError | None = None, state: ChannelState | None = None) -> Reply:
        headers = [("Cache-Control", "no-store"), ("WWW-Authenticate", 'Bearer realm="x"')]
        if "x402" in self.protocols:
            required = x402.payment_required(self.offer, url, error=error, state=state)
            if not self.identifier:
                required = msgspec.structs.replace(required, extensions=None)
            headers.append((x402_json.REQUIRED_HEADER, x402_json.encode_header(required)))
        if "mpp" in self.protocols:
            challenge = mpp.challenge(self.offer, SECRET, UnixTime(int(time.time()) + 300), state=state)
            headers.append(("WWW-Authenticate", mpp_challenge.challenge_header(challenge)))
        body = {"title": "Payment required", "detail": str(error or "pay")} | ({"code": error.code} if error else {})
        return Reply(402, headers, json.dumps(body).encode())

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Reply | None:
        """Answer a request; None drops the connection."""
        url = self.url.rstrip("/") + target
        if target == "/free":
            return Reply(200, [], b"free")
        read = self._payment(headers)
        if read is None:
            return Reply(307, [("Location", self.redirect)], b"") if self.redirect else self.unpaid(url)
        voucher, name, wire = read
        lie = (self.lies.popleft() if self.lies else None) or Lie()
        time.sleep(self.seconds)
        if lie.drop == "before":
            return None
        if lie.state is not None:
            return self.unpaid(url, state=lie.state)
        with self._booking:
            settled = self._charge(voucher, name or f"{method} {url} {body!r} {voucher.change_sat}")
        if isinstance(settled, PaychanError):
            known = voucher.channel == self.channel.outpoint
            return self.unpaid(url, settled, self.state() if known else None)
        if lie.drop == "after":
            return None
        if lie.refuse:
            return self.unpaid(url)
        if lie.status:
            return Reply(lie.status, [], b"")
        if lie.release:
            settled = self._release(voucher, name)
        self.paid.append(f"{method} {target}")
        receipt = self._receipt(settled, wire, lie)
        if lie.location:
            return Reply(302, [receipt, ("Location", lie.location)], b"")
        return Reply(502 if lie.release else 200, [receipt, ("Cache-Control", "private")], b"goods")

    def _payment(self, headers: dict[str, str]) -> tuple[Voucher, str, str] | None:
        if "payment-signature" in headers:
            payload = x402_json.read_payment(headers["payment-signature"])
            assert x402.mismatch(payload.accepted, self.offer) is None
            action, name = x402.action_of(payload.payload), x402.identifier_of(payload)
            assert isinstance(action, Voucher)
            return action, name or headers.get("idempotency-key", ""), "x402"
        credential = mpp.read_credential(headers.get("payment-authorization") or headers.get("authorization", ""))
        if credential is None:
            return None
        assert mpp.challenge_problem(credential, self.offer, [SECRET], UnixTime(int(time.time()))) is None
        action = mpp.action_of(credential.payload)
        assert isinstance(action, Voucher)
        return action, headers.get("idempotency-key", ""), "mpp"

    def _charge(self, voucher: Voucher, name: str) -> Settled | PaychanError:
        if voucher.channel != self.channel.outpoint:
            return UnknownChannel()
        if (problem := voucher.mismatch(self.channel.funding_sat)) is not None:
            return problem
        before = self.channel
        command = Charge(request_id.named_id(voucher.channel, name), Sat(self.price_sat), voucher.payment)
        outcome = apply(before, command, View(UnixTime(int(time.time())), RULES))
        if isinstance(outcome, Rejected):
            return outcome.error
        assert isinstance(outcome, Accepted)
        self.liar.channel = outcome.channel
        return Settled(self.state(), Sat(outcome.channel.spent_sat - before.spent_sat))

    def _release(self, voucher: Voucher, name: str) -> Settled:
        command = Release(request_id.named_id(voucher.channel, name))
        outcome = apply(self.channel, command, View(UnixTime(int(time.time())), RULES))
        assert isinstance(outcome, Accepted)
        self.liar.channel = outcome.channel
        return Settled(self.state(), Sat(0))

    def _receipt(self, settled: Settled, wire: str, lie: Lie) -> tuple[str, str]:
        state = msgspec.structs.replace(settled.state, newest=None)
        if lie.credit_sat is not None:
            state = msgspec.structs.replace(state, carried_sat=Sat(lie.credit_sat - state.credit_sat))
        settled = msgspec.structs.replace(settled, state=state)
        if wire == "mpp":
            return "Payment-Receipt", receipt_header(Receipt(settled, "id", UnixTime(int(time.time()))))
        return "PAYMENT-RESPONSE", x402_json.encode_header(settled_json(settled, self.offer.chain))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        seller = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_any(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.read()
                seller.seen.append(headers)
                seller.bodies.append(body)
                reply = seller.answer(self.command, self.path, headers, body)
                if reply is None:
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for name, value in (*reply.headers, ("Content-Length", str(len(reply.body)))):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)

            do_GET = do_POST = do_PUT = do_any  # noqa: N815 - http.server's names

            def read(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def log_message(self, *_: object) -> None:
                pass

        return Handler


class Reply(Struct, frozen=True):
    """The response to send."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
