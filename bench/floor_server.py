"""The least that a Python process can do for a durable verified payment. `bench/floor.py` runs it beside the server.

    python bench/floor_server.py DIRECTORY

It has no refusals, no actors, no limits, no log and no settlement: httptools parses a request on an `asyncio.Protocol`,
coincurve verifies the signature, one thread writes all payments of a moment to LevelDB with one sync, and only then the
answers leave. It serves what the clients of `rest.py` need: terms, openings and payments of v1 and v2 in debug mode.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from base64 import urlsafe_b64decode
from collections import deque
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httptools
import msgspec
import plyvel
import uvloop
from coincurve import PrivateKey, PublicKey

from paychan.protocol.address import decode_address
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.kinds.base import PaymentPreimage, make_terms
from paychan.protocol.kinds.p2sh import parse_redeem_script
from paychan.protocol.types import Network, OutPoint

SERVER_KEY = PrivateKey(sha256(b"floor").digest()).public_key.format()
_STORE = {"write_buffer_size": 32 << 20, "bloom_filter_bits": 10, "compression": None, "max_file_size": 8 << 20}


class _Data(msgspec.Struct):
    signature_data: str
    change_value: int


class _Body(msgspec.Struct):
    payment_data: _Data


_decode = msgspec.json.Decoder(_Body).decode


class _Channel:
    """Change value of the newest payment in satoshi, and what the next one is verified with."""

    __slots__ = ("change_sat", "digest", "key", "name")

    def __init__(self, name: bytes, key: PublicKey, hasher: PaymentPreimage) -> None:
        self.name, self.key, self.digest, self.change_sat = name, key, hasher.digest, DEBUG_FUNDING_SAT


class Floor:
    """All channels, and the group that the next sync makes durable."""

    def __init__(self, directory: Path) -> None:
        self.channels = dict[bytes, _Channel]()
        self._loop = asyncio.get_running_loop()
        self._database = plyvel.DB(str(directory / "store"), create_if_missing=True, **_STORE)
        self._waiting: list[tuple[Connection, bytes, bytes, bytes]] = []
        self._groups = deque[Any]()
        self._is_writing = False
        self._wakeup_fd = os.eventfd(0)
        threading.Thread(target=self._write, daemon=True).start()

    def pay(self, connection: Connection, channel: _Channel, change_sat: int, signature: bytes) -> None:
        """Verify a payment and queue its answer behind the next sync."""
        digest = channel.digest(change_sat)  # type: ignore[arg-type]
        if change_sat >= channel.change_sat or not channel.key.verify(signature, digest, hasher=None):
            connection.answer(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\n{}\n")
            return
        channel.change_sat = change_sat  # type: ignore[assignment]
        body = b'{"channel_status":"open","channel_valueLeft":%d,"value_received":%d,"settlement_txid":null}\n' % (
            change_sat,
            DEBUG_FUNDING_SAT - change_sat,
        )
        record = change_sat.to_bytes(8, "little") + signature
        self._waiting.append((connection, channel.name, record, body))
        if not self._is_writing:
            self._is_writing = True
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        group, self._waiting = self._waiting, []
        self._groups.append(group)
        os.eventfd_write(self._wakeup_fd, 1)

    def _write(self) -> None:
        while True:
            os.eventfd_read(self._wakeup_fd)
            group = self._groups.popleft()
            with self._database.write_batch(sync=True) as batch:
                for _, name, record, _ in group:
                    batch.put(name, record)
            self._loop.call_soon_threadsafe(self._written, group)

    def _written(self, group: list[tuple[Connection, bytes, bytes, bytes]]) -> None:
        for connection, _, _, body in group:
            connection.answer(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
        if self._waiting:
            self._begin()
        else:
            self._is_writing = False

    def open(self, url: bytes, body: bytes) -> None:
        """Take a channel in, whatever the opening says."""
        path, _, query = url.decode().partition("?")
        if body:
            terms = parse_redeem_script(bytes.fromhex(msgspec.json.decode(body)["redeem_script"]))
            outpoint = OutPoint.parse(path.split("/")[3], int(path.split("/")[4]))
            script = terms.funding_script
        else:
            asked = {name: values[0] for name, values in parse_qs(query).items()}
            terms = make_terms(SERVER_KEY, bytes.fromhex(asked["client_pubkey"]), int(asked["exp_time"]))
            outpoint = debug_outpoint(terms.client_key, terms.expiry.lock_time)
            script = decode_address(asked["change_address"], Network.TEST)
        name = f"/{outpoint.txid_hex}/{outpoint.vout}".encode()
        hasher = terms.kind.payment_preimage(terms, outpoint, DEBUG_FUNDING_SAT, script)
        self.channels[name] = _Channel(name, PublicKey(terms.client_key), hasher)


class Connection(asyncio.Protocol):
    """One client: its bytes become requests, one after the other."""

    def __init__(self, floor: Floor) -> None:
        self._floor, self._url, self._body = floor, b"", b""
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.answer = transport.write  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        url, body, self._url, self._body = self._url, self._body, b"", b""
        method = self._parser.get_method()
        if method == b"PUT":
            path, _, query = url.partition(b"?")
            channel = self._floor.channels[path[12:]]  # /v1/channels/{txid}/{vout}
            if body:
                data = _decode(body).payment_data
                self._floor.pay(self, channel, data.change_value, bytes.fromhex(data.signature_data[:-2]))
            else:
                payload = urlsafe_b64decode(query[8:] + b"===")  # payment=…
                self._floor.pay(self, channel, int.from_bytes(payload[:8], "little"), payload[8:-1])
        elif method == b"POST":
            self._floor.open(url, body)
            self.answer(b"HTTP/1.1 201 Created\r\nContent-Length: 3\r\n\r\n{}\n")
        else:
            body = b'{"server_pubkey":"%b"}\n' % SERVER_KEY.hex().encode()
            self.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


async def main(directory: Path) -> None:
    """Serve on a free port, and print it."""
    floor = Floor(directory)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(floor), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
