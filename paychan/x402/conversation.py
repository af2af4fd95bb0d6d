"""One paid request of the SDK as an exchange of the wallet: which payment to send, and what its answer means.

`paychan.client.paying.exchange` decides. The SDK asks for a payment, sends it, and tells the answer: between the two the
channel stays locked. A request whose answer never comes is ended by `Conversation.end`, and stays open in the log.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from functools import partial
from typing import Any, TypeVar

from paychan.client.paying.demands import Headers
from paychan.client.paying.drive import perform, perform_async
from paychan.client.paying.exchange import Answer, Bill, Call, Pause, Purse, Try, Work, exchange
from paychan.client.paying.paying import Request
from paychan.protocol.wire.x402_json import (
    REQUIRED_HEADER,
    RESPONSE_HEADER,
    SIGNATURE_HEADER,
    PaymentPayload,
    PaymentRequired,
    SettleResponse,
    encode_header,
    read_payment,
)

T = TypeVar("T")
Steps = Generator[Work | Call | Pause, Any, T]


class Conversation:
    """The exchange of one request. `payment` is the payment to send next; None: there is none."""

    def __init__(self, purse: Purse, request: Request) -> None:
        self._flow = exchange(purse, request)
        self._busy = threading.Lock()
        self.payment: PaymentPayload | None = None
        self.bill: Bill | None = None

    def begin(self, required: PaymentRequired) -> Steps[None]:
        """Decide a payment for a 402. Raises what `exchange` raises, before anything is signed."""
        with self._busy:
            next(self._flow)
            yield from self._tell(Answer(402, ((REQUIRED_HEADER.lower(), encode_header(required)),)))

    def answered(self, answer: PaymentRequired | SettleResponse) -> Steps[bool]:
        """Take the answer to the payment; True: `payment` is a corrected one, which is to be sent once.

        Raises:
            StillUnpaid: the payment was refused, and there is nothing to correct.
            FalseProof: the server showed a payment that this wallet did not sign.
        """
        with self._busy:
            self.payment = None
            status = 200 if isinstance(answer, SettleResponse) and answer.success else 402
            name = RESPONSE_HEADER if isinstance(answer, SettleResponse) else REQUIRED_HEADER
            yield from self._tell(Answer(status, ((name.lower(), encode_header(answer)),)))
            return self.payment is not None

    def end(self) -> None:
        """Unlock the channel. A payment without an answer stays open in the log: the same request sends it again."""
        if self._busy.acquire(blocking=False):
            try:
                self._flow.close()
            finally:
                self._busy.release()

    def _tell(self, answer: Answer) -> Steps[None]:
        headers = yield from _until_try(self._flow, answer)
        if isinstance(headers, Bill):
            self.bill = headers
        elif headers:
            self.payment = read_payment(dict(headers)[SIGNATURE_HEADER])


def _until_try(flow: Generator[Any, Any, Bill | None], answer: Answer) -> Steps[Headers | Bill | None]:
    """Run an exchange up to its next try, and return the headers to send; or to its end, and return the bill."""
    step = partial(flow.send, answer)
    try:
        while True:
            effect = step()
            if isinstance(effect, Try):
                return effect.headers
            try:
                value = yield effect
            except BaseException as error:  # noqa: BLE001 - the exchange unlocks the channel, and raises it again
                step = partial(flow.throw, error)
            else:
                step = partial(flow.send, value)
    except StopIteration as done:
        bill: Bill | None = done.value
        return bill


def run(steps: Steps[T]) -> T:
    """Perform steps, blocking."""
    step = partial(next, steps)
    try:
        while True:
            effect = step()
            try:
                value = perform(effect)
            except BaseException as error:  # noqa: BLE001 - as above
                step = partial(steps.throw, error)
            else:
                step = partial(steps.send, value)
    except StopIteration as done:
        result: T = done.value
        return result


async def run_async(steps: Steps[T]) -> T:
    """Perform steps on the event loop."""
    step = partial(next, steps)
    try:
        while True:
            effect = step()
            try:
                value = await perform_async(effect)
            except BaseException as error:  # noqa: BLE001 - as above
                step = partial(steps.throw, error)
            else:
                step = partial(steps.send, value)
    except StopIteration as done:
        result: T = done.value
        return result
