"""RBPCP requests as clients send them, for tests: URLs and bodies from `paychan.protocol`, sent unchanged.

Every method returns the response, whatever its status. Channels have debug funding.
"""

from __future__ import annotations

import itertools
import os
import time
from hashlib import sha256
from typing import Any
from urllib.parse import urlencode

import httpx
import msgspec
from coincurve import PrivateKey

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import Payment, encode_v1, sign_payment
from paychan.protocol.types import Network, OutPoint, Sat
from paychan.protocol.wire.rbpcp import Dialect, opening_secret, payment_data
from tests.lib.system import DEBUG_SERVER_KEY

WEEK_SECONDS = 7 * 86_400

_numbers = itertools.count()


class Payer:
    """A client with its own key, and the one channel that debug mode funds for it."""

    def __init__(self, expiry: int | None = None) -> None:
        self.key = PrivateKey(sha256(f"payer {os.getpid()} {next(_numbers)}".encode()).digest())
        self.public_key = self.key.public_key.format()
        self.expiry = int(time.time()) + WEEK_SECONDS if expiry is None else expiry
        self.terms = make_terms(bytes.fromhex(DEBUG_SERVER_KEY), self.public_key, self.expiry)
        self.outpoint = debug_outpoint(self.public_key, self.terms.expiry.lock_time)
        self.funding_sat = DEBUG_FUNDING_SAT
        self.change_script = key_script(self.public_key)
        self.change_address = encode_address(self.change_script, Network.TEST)

    def payment(self, paid_sat: int, change_script: bytes | None = None) -> Payment:
        """Sign the payment that raises the server's sum to `paid_sat`."""
        return self.payment_of_change(DEBUG_FUNDING_SAT - paid_sat, change_script)

    def payment_of_change(self, change_sat: int, change_script: bytes | None = None) -> Payment:
        """Sign the payment that leaves `change_sat`; 0 pays everything."""
        script = change_script or self.change_script
        return sign_payment(self.key, self.terms, self.outpoint, DEBUG_FUNDING_SAT, script, Sat(change_sat))


class V1:
    """One payer's requests in version 1."""

    def __init__(self, url: str, payer: Payer, http: httpx.Client) -> None:
        self.url, self.payer, self.http = url, payer, http

    def funding_info(self, **changes: Any) -> httpx.Response:
        """Request the terms. `changes` replace parameters; None leaves one out."""
        terms = {"client_pubkey": self.payer.public_key.hex(), "exp_time": self.payer.expiry}
        return self.http.get(f"{self.url}/v1/fundingInfo?{_query(terms | changes)}")

    def open(self, payment: Payment, /, **changes: Any) -> httpx.Response:
        return self.http.post(self.opening_url(payment, **changes))

    def opening_url(self, payment: Payment, /, **changes: Any) -> str:
        terms = {
            "client_pubkey": self.payer.public_key.hex(),
            "exp_time": self.payer.expiry,
            "change_address": self.payer.change_address,
            "payment": encode_v1(payment),
        }
        return f"{self.url}/v1/channels/new?{_query(terms | changes)}"

    @property
    def resource(self) -> str:
        return f"{self.url}/v1/channels/{self.payer.outpoint.txid_hex}/{self.payer.outpoint.vout}"

    def pay(self, payment: Payment, tail: str = "", **more: Any) -> httpx.Response:
        return self.http.put(f"{self.resource}{tail}?{_query({'payment': encode_v1(payment)} | more)}")

    def close(self, payment: Payment) -> httpx.Response:
        return self.http.delete(f"{self.resource}?{_query({'payment': encode_v1(payment)})}")


class V2:
    """One payer's requests in version 2, in one of its dialects (RBPCP §4.2, §4.3, §6.2)."""

    def __init__(self, url: str, payer: Payer, http: httpx.Client, dialect: Dialect = Dialect.S) -> None:
        self.url, self.payer, self.http, self.dialect = url, payer, http, dialect
        self.secret = ""

    def open(self, payment: Payment, /, **changes: Any) -> httpx.Response:
        """Open with the right secret, and store it. `changes` replace keys of the payment object, None drops one."""
        self.secret = opening_secret(payment).hex()
        return self.http.post(self.resource(), content=self.opening_body(payment, **changes))

    def opening_body(self, payment: Payment, application_data: str = "", **changes: Any) -> bytes:
        """Build the opening body: dialect S sends the payment object bare, A wraps it."""
        data = self._data(payment, self._facts() | changes)
        if self.dialect is Dialect.S:
            return msgspec.json.encode(data)
        return msgspec.json.encode({"payment_data": data, "application_data": application_data})

    def body(self, payment: Payment, application_data: str = "", **changes: Any) -> bytes:
        """Build the body of a payment: compact in dialect S, with all seven fields in A."""
        facts = self._facts() if self.dialect is Dialect.A else {}
        data = self._data(payment, facts | changes)
        return msgspec.json.encode({"payment_data": data, "application_data": application_data})

    def pay(self, payment: Payment, **changes: Any) -> httpx.Response:
        return self.http.put(self.resource(), content=self.body(payment, **changes))

    def close(self, payment: Payment, **changes: Any) -> httpx.Response:
        return self.http.put(self.resource("/close"), content=self.body(payment, **changes))

    def resource(self, tail: str = "", secret: str | None = None) -> str:
        """Return the channel's URL: dialect A names the txid in internal order, and the secret in JSON quotes."""
        outpoint, text = self.payer.outpoint, self.secret if secret is None else secret
        if self.dialect is Dialect.A:
            outpoint, text = outpoint.reversed, f"%22{text}%22"
        return f"{self.url}{path(outpoint)}{tail}?secret={text}"

    def _facts(self) -> dict[str, Any]:
        outpoint = self.payer.outpoint
        return {
            "redeem_script": self.payer.terms.redeem_script.hex(),
            "funding_txid": outpoint.txid_hex,
            "funding_vout": outpoint.vout,
            "change_address": self.payer.change_address,
        }

    def _data(self, payment: Payment, facts: dict[str, Any]) -> dict[str, Any]:
        data: dict[str, Any] = msgspec.to_builtins(payment_data(payment, self.dialect)) | facts
        return {name: value for name, value in data.items() if value is not None}


def path(outpoint: OutPoint) -> str:
    """Return the path of a channel in version 2."""
    return f"/v2/channels/{outpoint.txid_hex}/{outpoint.vout}"


def _query(parameters: dict[str, Any]) -> str:
    return urlencode({name: value for name, value in parameters.items() if value is not None})


def refusal(response: httpx.Response) -> tuple[int, str]:
    """Return status and code of an error response; assert the common properties of all errors."""
    body = response.json()
    assert body["error"] == body["error_msg"] == body["message"]
    assert body["type"] in ("payment_error", "application_error")
    phrase = response.reason_phrase
    assert 0 < len(phrase) <= 200
    assert phrase.isascii()
    assert phrase.isprintable()
    return response.status_code, body["code"]
