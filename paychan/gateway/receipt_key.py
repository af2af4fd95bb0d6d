"""The key that signs receipts: drawn by this process, certified by the signer's identity key, and kept in memory alone.

A certificate lasts a week and is renewed, with another key, each day: while the signer is away receipts go on for six
days, and then there are none. No payment waits for a receipt, or fails for lack of one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

import structlog
from coincurve import PrivateKey
from msgspec import Struct

from paychan.protocol.certificate import Certificate
from paychan.protocol.receipts import Paid, sign_receipt
from paychan.protocol.types import UnixTime
from paychan.signer_client.base import Signer, SignerAbsent, SignerRefused
from paychan.supervisor import Supervised

LIFE_SECONDS = 7 * 24 * 3600
RENEWED_SECONDS = 24 * 3600
EARLIER_SECONDS = 600
"""A certificate begins this time before it is asked for: a clock that is set back a little leaves no receipt out."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 120.0
"""Pauses between tries while the signer certifies nothing, each twice the previous one: it certifies 60 keys an hour."""

log = structlog.get_logger("gateway")


class _Held(Struct, frozen=True):
    """A certified key."""

    certificate: Certificate
    key: PrivateKey


class ReceiptKey:
    """Signs receipts with the newest certified key. One `run` keeps it certified."""

    def __init__(self, signer: Signer, clock: Callable[[], UnixTime]) -> None:
        self._signer = signer
        self._clock = clock
        self._held: _Held | None = None
        self._problem = ""

    @property
    def certificate(self) -> Certificate | None:
        """The newest certificate, with the server's identity key; None before the signer has given one."""
        return None if self._held is None else self._held.certificate

    def sign(self, paid: Paid) -> bytes | None:
        """Return the signed receipt of a paid request; None if no key is certified at its time, or none can be written.

        It waits for nothing and raises nothing.
        """
        held = self._held
        if held is None or not held.certificate.not_before <= paid.time <= held.certificate.not_after:
            return None
        try:
            return sign_receipt(paid, held.certificate, held.key)
        except ValueError:  # the URL has other characters, or is too long
            return None

    async def run(self, task: Supervised) -> NoReturn:
        """Have a key certified, and another one each day. An absent signer is no failure of this task."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            if await self.renew():
                pause = FIRST_PAUSE_SECONDS
                task.succeeded()
                await asyncio.sleep(RENEWED_SECONDS)
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def renew(self) -> bool:
        """Draw a key and have it certified; False: the signer did not, and the key before goes on."""
        key, now = PrivateKey(), self._clock()
        begin, end = UnixTime(now - EARLIER_SECONDS), UnixTime(now + LIFE_SECONDS)
        try:
            certificate = await self._signer.certify(key.public_key.format(), begin, end)
        except (SignerAbsent, SignerRefused) as error:
            self._tell(str(error))
            return False
        self._held = _Held(certificate, key)
        self._tell("")
        log.info("receipt key certified", identity=certificate.identity.hex(), not_after=certificate.not_after)
        return True

    def _tell(self, problem: str) -> None:
        """Log why no key is certified, once for each reason."""
        if problem and problem != self._problem:
            held = self._held
            until = held.certificate.not_after if held is not None else 0
            log.warning(
                "receipt key not certified: without one, answers have no signed receipt", reason=problem, until=until
            )
        self._problem = problem
