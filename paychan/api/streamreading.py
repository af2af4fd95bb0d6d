"""Reading a WebSocket in as few steps as there are reads of its socket.

Tornado waits for each part of each frame by itself, which costs more than half a signature check. A whole frame of data
that has come is taken here at once; everything else (control frames, fragments, what breaks the protocol) is left to
Tornado, which then reads from the same bytes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.util import _websocket_mask
from tornado.websocket import WebSocketProtocol13

from paychan.api.streamtransport import take_over

_CHUNK_BYTES = 65536
_TEXT, _BINARY = 0x81, 0x82
"""First byte of a message in one frame."""


class BulkProtocol(WebSocketProtocol13):
    """Tornado's protocol with a shorter way for most messages."""

    _came = b""

    async def _receive_frame_loop(self) -> None:
        try:
            self.stream = await take_over(self.stream)
            while not self.client_terminated:
                message = self._whole_message()
                if message is not None:
                    handled = self._handle_message(*message)
                    if handled is not None:
                        await handled
                elif not self._is_plain():
                    await self._receive_frame()
                else:
                    await self._fill()
        except StreamClosedError:
            self._abort()
        finally:
            self.handler.on_ws_connection_close(self.close_code, self.close_reason)

    def _is_plain(self) -> bool:
        """Whether what has come may become a message of one frame that is small enough."""
        came = self._came
        if len(came) < 2:
            return not came or came[0] in (_TEXT, _BINARY)
        size, start = _size(came)
        plain = came[0] in (_TEXT, _BINARY) and came[1] & 0x80 and self._fragmented_message_buffer is None
        return bool(plain) and (start == 0 or size <= self.params.max_message_size)

    def _whole_message(self) -> tuple[int, bytes] | None:
        """Cut off the message at the beginning of what has come, if it is whole and plain."""
        came = self._came
        if len(came) < 6 or not self._is_plain():
            return None
        size, start = _size(came)
        if start == 0 or len(came) < start + 4 + size:
            return None
        end = start + 4 + size
        self._came = came[end:]
        return came[0] & 0x0F, _websocket_mask(came[start : start + 4], came[start + 4 : end])

    async def _read_bytes(self, n: int) -> bytes:
        """Give Tornado bytes, first those that were read already."""
        while len(self._came) < n:
            await self._fill()
        taken, self._came = self._came[:n], self._came[n:]
        return taken

    async def _fill(self) -> None:
        if self.stream is None:
            raise StreamClosedError
        reading: Any = self.stream.read_bytes(_CHUNK_BYTES, partial=True)  # a Future
        if reading.done():  # others get their turn, however fast this client sends
            await asyncio.sleep(0)
        self._came += await reading


def _size(came: bytes) -> tuple[int, int]:
    """Length of a frame's payload, and where its mask begins; (0, 0) while too little has come to tell."""
    size = came[1] & 0x7F
    if size < 126:
        return size, 2
    start = 4 if size == 126 else 10
    return (int.from_bytes(came[2:start]), start) if len(came) >= start else (0, 0)
