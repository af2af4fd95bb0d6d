"""Build the client's requests: one function per request, in the channel's version and dialect (RBPCP §5, §6).

Every request goes to the base URL that the payer chose. Only path and query of a `Location` are used: a server behind a
proxy may name the wrong scheme, port or host (D12), and a payment or a secret must not be sent to another server.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlencode, urljoin, urlsplit

from paychan.client.record import ChannelRecord
from paychan.client.transport.effects import Request, Response
from paychan.protocol.payment import Payment, encode_v1
from paychan.protocol.wire.rbpcp import Dialect, encode_json, opening_secret, payment_data


def info_path(version: int, dialect: Dialect, client_key: bytes, expiry: int) -> str:
    """Return the path of the server's terms for this key and expiry."""
    if version == 1:
        return "/v1/fundingInfo?" + urlencode({"client_pubkey": client_key.hex(), "exp_time": expiry})
    if dialect is Dialect.S:
        return f"/v2/funding/{expiry}/{client_key.hex()}/info"
    return f"/v2/funding/{client_key.hex()}/{expiry}/info"


def outputs_request(record: ChannelRecord, *, proven: bool = False) -> Request:
    """Ask for the outputs that fund the channel, with `proven` also for their transactions; in both versions."""
    client_key = record.key.public_key.format().hex()
    return Request(
        "GET", f"{record.url}/v2/funding/{record.expiry}/{client_key}/outputs{'?transactions=1' if proven else ''}"
    )


def opening_path(response: Response, url: str, version: int, client_key: bytes, expiry: int) -> str:
    """Return the path for opening: v1's `Location`, or else the documented path; "" for v2, which uses the outpoint."""
    if version == 2:
        return ""
    return located(response, url) or _new_path(client_key, expiry)


def new_path(record: ChannelRecord) -> str:
    """Return the documented path for opening a v1 channel; "" for v2, which uses the outpoint."""
    return _new_path(record.key.public_key.format(), record.expiry) if record.version == 1 else ""


def _new_path(client_key: bytes, expiry: int) -> str:
    return "/v1/channels/new?" + urlencode({"client_pubkey": client_key.hex(), "exp_time": expiry})


def located(response: Response, url: str) -> str:
    """Return path and query of `Location` below the base URL; "" without one."""
    location = response.headers.get("location", "")
    if not location:
        return ""
    target = urlsplit(urljoin(url + "/", location))
    path = target.path.removeprefix(urlsplit(url).path)
    return quote(path, safe="/%") + (f"?{target.query}" if target.query else "")


def resource(record: ChannelRecord, response: Response) -> str:
    """Return the path of a v1 channel: its `Location`, or else the documented path; "" for v2, which derives it."""
    return (located(response, record.url) or channel_path(record)) if record.version == 1 else ""


def channel_path(record: ChannelRecord) -> str:
    """Return the documented path of a channel; dialect A writes the txid in internal byte order (RBPCP §6.2)."""
    internal = record.version == 2 and record.dialect is Dialect.A
    txid = record.outpoint.txid.hex() if internal else record.outpoint.txid_hex
    return f"/v{record.version}/channels/{txid}/{record.outpoint.vout}"


def stream_url(record: ChannelRecord) -> str:
    """Return the URL of a v2 channel's payment stream; the secret goes into a header."""
    scheme, _, rest = record.url.partition("://")
    return f"{'wss' if scheme == 'https' else 'ws'}://{rest}{channel_path(record)}/stream"


def secret_of(record: ChannelRecord, opening: Payment) -> str:
    """Return the secret that this opening payment gives a v2 channel; "" for v1."""
    return opening_secret(opening).hex() if record.version == 2 else ""


def open_request(record: ChannelRecord, opening: Payment) -> Request:
    """Open the channel with its first payment."""
    if record.version == 1:
        return _v1(record, "POST", opening, change_address=record.change_address)
    facts = _facts(record, record.change_address)
    data = payment_data(opening, record.dialect, **facts)
    if record.dialect is Dialect.S:
        return _v2(record, "POST", "", data)
    return _v2(record, "POST", "", {"payment_data": data, "application_data": ""})


def pay_request(record: ChannelRecord, payment: Payment) -> Request:
    """Send a payment."""
    if record.version == 1:
        return _v1(record, "PUT", payment)
    facts = _facts(record, record.change_address) if record.dialect is Dialect.A else {}
    data = payment_data(payment, record.dialect, **facts)
    return _v2(record, "PUT", "", {"payment_data": data, "application_data": record.application_data})


def close_request(record: ChannelRecord, payment: Payment) -> Request:
    """Close: v1 sends the newest payment again, v2 a closing payment, which may name another change address."""
    if record.version == 1:
        return _v1(record, "DELETE", payment)
    address = record.closing_address or record.change_address
    facts = {"change_address": address} if record.dialect is Dialect.S else _facts(record, address)
    data = payment_data(payment, record.dialect, **facts)
    body = {"payment_data": data, "application_data": ""}
    return _v2(record, "PUT", "/close", body, transaction="1")


def _facts(record: ChannelRecord, change_address: str) -> dict[str, Any]:
    """Return the fields of an opening payment beside the payment itself."""
    return {
        "redeem_script": record.terms.redeem_script.hex(),
        "funding_txid": record.outpoint.txid_hex,
        "funding_vout": record.outpoint.vout,
        "change_address": change_address,
    }


def _v1(record: ChannelRecord, method: str, payment: Payment, **parameters: str) -> Request:
    query = urlencode(parameters | {"payment": encode_v1(payment)})
    return Request(method, record.url + record.location + ("&" if "?" in record.location else "?") + query)


def _v2(record: ChannelRecord, method: str, suffix: str, body: Any, **more: str) -> Request:
    """Build a v2 request. Dialect A sends the secret as JSON text, in quotes."""
    secret = record.secret if record.dialect is Dialect.S else f'"{record.secret}"'
    url = f"{record.url}{channel_path(record)}{suffix}?{urlencode({'secret': secret} | more)}"
    return Request(method, url, encode_json(body))
