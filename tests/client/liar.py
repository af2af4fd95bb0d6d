"""A small real HTTP server that keeps one channel by the state machine's own rules, and lies on request.

`lies` holds one entry per coming request of a channel: None for an honest answer, or a `Lie`. A lie changes the answer
only; `channel` stays true.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import msgspec
from msgspec import Struct

from paychan.protocol.address import decode_address
from paychan.protocol.channel import (
    Accepted,
    Channel,
    CloseByPayment,
    CloseByProof,
    Command,
    Confirmed,
    Opening,
    Outcome,
    Pay,
    Published,
    Rejected,
    Rules,
    Signed,
    State,
    View,
)
from paychan.protocol.debug_funding import debug_outpoint
from paychan.protocol.ending import end_of
from paychan.protocol.errors import (
    ChannelClosing,
    ChannelExists,
    ChannelMoved,
    OutpointUsed,
    PaychanError,
    UnknownChannel,
)
from paychan.protocol.fees import Shortfall, plan_closing
from paychan.protocol.kinds.base import ChannelTerms, make_terms
from paychan.protocol.kinds.p2sh import parse_redeem_script
from paychan.protocol.opening import open_channel, successor
from paychan.protocol.payment import Payment, decode_v1
from paychan.protocol.settlement import sign_settlement
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from paychan.protocol.wire.rbpcp import Dialect, opening_secret, read_v2_body
from tests.lib.channels import SERVER_DESTINATION, private_key, withdrawn

SERVER_KEY = private_key("liar").public_key.format()
FUNDING_SAT = Sat(1_000_000)
OPEN_PRICE_SAT = Sat(10_000)
TXID = "5e" * 32
RULES = Rules(
    dust_sat=Sat(700), min_confirmations=0, settlement_period_seconds=0, min_duration_seconds=0, fee_sat_per_vb=1
)


class Lie(Struct, frozen=True):
    """Differences of one answer from the truth; several fields may be combined."""

    change: dict[str, Any] | None = None
    """Keys of the JSON body to set; `...` as value removes the key."""
    body: bytes | None = None
    status: int = 0
    headers: dict[str, str] = {}
    reason: str = ""
    deaf: bool = False
    """Ignore the request: nothing is booked."""
    drop: bool = False
    """Close the connection instead of answering."""
    seconds: float = 0.0
    """Delay of the answer, which ends when the server closes."""


class _Server(ThreadingHTTPServer):
    """Ignores broken connections, which tests cause on purpose."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Liar:
    """Listens on a free port of this machine while in use as a context manager."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.left: list[Channel] = []
        """Records of the outputs that the channel has left."""
        self.lies: deque[Lie | None] = deque()
        self.info_lie = Lie()
        self.requests: list[str] = []
        """Method and path of every request, except requests for outputs."""
        self.codes = True
        """Put the error text into a JSON body; otherwise only into the reason phrase, as the reference did."""
        self.public_url = ""
        """Base URL in `Location`, instead of the address that it listens on."""
        self.ended = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def received_sat(self) -> int:
        """Sum booked at this output and at outputs that the channel has left."""
        return sum(channel.received_sat for channel in (*self.left, *filter(None, [self.channel])))

    def wait_for(self, received_sat: int) -> None:
        """Wait until this sum is booked."""
        while self.received_sat < received_sat:
            time.sleep(0.01)

    def begin_withdrawal(self, payment: Payment | None = None) -> None:
        """Settle the received sum, by the newest payment or an earlier one; meanwhile the channel takes no payments."""
        if payment is not None:
            assert self.channel is not None
            self.channel = msgspec.structs.replace(self.channel, payment=payment)
        assert self.channel is not None
        self.channel = closing = withdrawn(self.channel)
        fee = plan_closing([closing], SERVER_DESTINATION, RULES)
        assert not isinstance(fee, Shortfall)
        key = private_key("liar")
        signed = sign_settlement(
            [closing.claim], SERVER_DESTINATION, fee, lambda _, digest: key.sign(digest, hasher=None)
        )
        self._step(Signed(signed))
        self._step(Published())

    def withdraw(self, payment: Payment | None = None) -> None:
        """Settle, with the settlement deep in the chain at once: the channel continues."""
        self.begin_withdrawal(payment)
        assert self.channel is not None
        assert self.channel.closing is not None
        assert self.channel.closing.settlement is not None
        self._step(Confirmed(self.channel.closing.settlement.txid))
        self.left.append(self.channel)
        self.channel = successor(self.channel, UnixTime(0))

    def _step(self, command: Command) -> None:
        assert self.channel is not None
        outcome = apply(self.channel, command, View(UnixTime(0), RULES))
        assert isinstance(outcome, Accepted), outcome
        self.channel = outcome.channel

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        liar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if "/outputs" not in self.path:
                    liar.requests.append(f"{self.command} {self.path}")
                info = "unding" in self.path
                lie = liar.info_lie if info else (liar.lies.popleft() if liar.lies else None) or Lie()
                answer = Answer() if lie.deaf else liar.truth(self.command, self.path, body)
                if lie.seconds:
                    liar.ended.wait(lie.seconds)
                if lie.drop:
                    self.close_connection = True
                    return
                self.write(answer.twisted(lie))

            do_GET = do_POST = do_PUT = do_DELETE = do_any  # noqa: N815 - http.server's names

            def write(self, answer: Answer) -> None:
                self.send_response(answer.status, answer.reason or None)
                for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    # --- the honest part ----------------------------------------------------------------------------------------------

    def truth(self, method: str, target: str, body: bytes) -> Answer:
        """Answer as the protocol requires."""
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        try:
            if parts.path == "/v1/fundingInfo":
                return self._info(query["client_pubkey"], int(query["exp_time"]), version=1)
            if parts.path.startswith("/v2/funding/"):
                expiry, key = sorted(parts.path.split("/")[3:5], key=len)
                if parts.path.endswith("/outputs"):
                    return self._outputs(make_terms(SERVER_KEY, bytes.fromhex(key), int(expiry)))
                return self._info(key, int(expiry), version=2)
            if method == "POST":
                return self._open(parts.path, query, body)
            return self._pay_or_close(method, parts.path, query, body)
        except ChannelMoved as error:
            return self._moved(error, read_v2_body(body).dialect)
        except PaychanError as error:
            headers = {"Location": self._location()} if isinstance(error, ChannelExists) else {}
            content = json.dumps({"code": error.code, "error": str(error), **error.fields}, default=str)
            return Answer(error.http_status, content.encode() if self.codes else b"", headers, str(error))

    def _info(self, key: str, expiry: int, version: int) -> Answer:
        terms = make_terms(SERVER_KEY, bytes.fromhex(key), expiry)
        facts: dict[str, Any] = {
            "server_pubkey": SERVER_KEY.hex(),
            "funding_address_copy": terms.funding_address(Network.TEST),
            "open_price": OPEN_PRICE_SAT,
            "funding_tx_min_conf": 0,
            "settlement_period_hours": 6,
        }
        if version == 2:
            return Answer(200, json.dumps(facts | {"dust_limit": 700, "min_duration_hours": 12}).encode())
        location = f"{self.public_url or self.url}/v1/channels/new?client_pubkey={key}&exp_time={expiry}"
        return Answer(200, json.dumps(facts).encode(), {"Location": location})

    def _outputs(self, terms: ChannelTerms) -> Answer:
        """Claim an output that funds any channel; no transaction has its txid."""
        outpoint = debug_outpoint(terms.client_key, terms.expiry.lock_time)
        output = {
            "funding_txid": outpoint.txid_hex,
            "funding_vout": outpoint.vout,
            "value": FUNDING_SAT,
            "confirmations": 0,
            "confirmations_needed": 0,
        }
        content = {"funding_address": terms.funding_address(Network.TEST), "outputs": [output]}
        return Answer(200, json.dumps(content).encode())

    def _open(self, path: str, query: dict[str, str], body: bytes) -> Answer:
        if path.startswith("/v1/"):
            terms = make_terms(SERVER_KEY, bytes.fromhex(query["client_pubkey"]), int(query["exp_time"]))
            payment, address, secret = decode_v1(query["payment"]), query["change_address"], b""
        else:
            read = read_v2_body(body)
            terms = parse_redeem_script(read.redeem_script or b"")
            payment, address, secret = read.payment, read.change_address or "", opening_secret(read.payment)
        outpoint = debug_outpoint(terms.client_key, terms.expiry.lock_time)
        if self.left:
            raise OutpointUsed(outpoint=str(outpoint))
        if self.channel is not None:
            raise ChannelExists(outpoint=str(outpoint))
        opening = opening_of(terms, outpoint, payment, address, secret)
        result = self._adopt(open_channel(opening, View(UnixTime(0), RULES)))
        return Answer(201, result, {"Location": self._location()})

    def _pay_or_close(self, method: str, path: str, query: dict[str, str], body: bytes) -> Answer:
        known = (*self.left, *filter(None, [self.channel]))
        channel = next((each for each in known if _names(path, each.outpoint)), None)
        if channel is None:
            raise UnknownChannel
        if path.startswith("/v1/"):
            payment = decode_v1(query["payment"])
            command = Pay(payment) if method == "PUT" else CloseByProof(payment)
        else:
            if query["secret"].strip('"') != channel.secret.hex():
                raise UnknownChannel
            read = read_v2_body(body)
            script = decode_address(read.change_address, Network.TEST) if read.change_address else None
            command = CloseByPayment(read.payment, script) if path.endswith("/close") else Pay(read.payment)
        if channel.moves:
            raise end_of(channel)
        if channel.state is not State.OPEN and isinstance(command, Pay):
            raise ChannelClosing
        if channel.state is not State.OPEN:
            return Answer(200, self._result(Sat(0)))
        return Answer(200, self._adopt(apply(channel, command, View(UnixTime(0), RULES))))

    def _adopt(self, outcome: Outcome) -> bytes:
        if isinstance(outcome, Rejected):
            raise outcome.error
        assert isinstance(outcome, Accepted)
        self.channel = outcome.channel
        return self._result(outcome.value_sat)

    def _result(self, value_sat: Sat) -> bytes:
        channel = self.channel
        assert channel is not None
        is_open = channel.state is State.OPEN
        result = {
            "channel_status": "open" if is_open else "closed",
            "channel_value_left": channel.payment.change_sat,
            "value_received": value_sat,
            "settlement_txid": None if is_open else TXID,
        }
        return json.dumps(result).encode()

    def _moved(self, error: ChannelMoved, dialect: Dialect) -> Answer:
        """Answer with the channel's new location, and with the last settlement as proof."""
        outpoint = str(error.fields["outpoint"])
        settlement = next(each.closing.settlement for each in self.left if each.closing and _to(each) == outpoint)
        assert settlement is not None
        content = {"code": error.code, "error": str(error), "transaction": settlement.transaction.hex(), **error.fields}
        location = f"{self.public_url or self.url}/v2/channels/{outpoint.replace(':', '/')}?secret=x"
        return Answer(318 if dialect is Dialect.S else 308, json.dumps(content).encode(), {"Location": location})

    def _location(self) -> str:
        channel = self.channel
        assert channel is not None
        version, secret = (2, f"?secret={channel.secret.hex()}") if channel.secret else (1, "")
        return f"{self.public_url or self.url}/v{version}/channels/{str(channel.outpoint).replace(':', '/')}{secret}"


def _names(path: str, outpoint: OutPoint) -> bool:
    return any(str(each).replace(":", "/") in path for each in (outpoint, outpoint.reversed))


def _to(channel: Channel) -> str:
    """Return the output that a channel moved to."""
    return str(OutPoint(channel.closing.spent_by, 0)) if channel.closing else ""


class Answer(Struct, frozen=True):
    """The response to send."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = {}
    reason: str = ""

    def twisted(self, lie: Lie) -> Answer:
        """Apply a lie to the answer."""
        body = self.body
        if lie.change is not None:
            fields = {**json.loads(body), **lie.change}
            body = json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()
        if lie.body is not None:
            body = lie.body
        return Answer(lie.status or self.status, body, {**self.headers, **lie.headers}, lie.reason or self.reason)


def opening_of(terms: ChannelTerms, outpoint: OutPoint, payment: Payment, address: str, secret: bytes) -> Opening:
    """Complete the opening with the server's own view of the chain."""
    return Opening(
        terms=terms,
        outpoint=outpoint,
        funding_sat=FUNDING_SAT,
        confirmations=0,
        change_script=decode_address(address, Network.TEST),
        payment=payment,
        price_sat=OPEN_PRICE_SAT,
        secret=secret,
    )
