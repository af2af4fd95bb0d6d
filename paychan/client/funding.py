"""Which outputs fund a channel: asked of the server, since a payer need not have a node.

The server's word is checked for what can be checked without one: that it speaks of our address, and in amounts that
exist. Whether an output is there, how deep and how large, it could lie about. One that is not there costs the server
alone, and one that is larger than told costs the payer the difference: hence nothing below `amount_sat`, which is what
the payer meant to send, is taken on the server's word, and nobody should send more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from paychan.client import paying, routes
from paychan.client.answers import printable, refusal
from paychan.client.errors import (
    ClientError,
    FundingMissing,
    FundingNotTold,
    ServerFailed,
    ServerMisbehaved,
    Unreachable,
)
from paychan.client.flow import Flow, Patience, Pause, ask
from paychan.client.record import ChannelRecord, parse_outpoint
from paychan.protocol.errors import Malformed
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat

_Count: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]


class _Output(Struct, frozen=True):
    funding_txid: str
    funding_vout: _Count
    value: Annotated[int, Meta(ge=1, le=MAX_MONEY_SAT)]
    confirmations: _Count
    confirmations_needed: _Count


class _Answer(Struct, frozen=True):
    funding_address: str
    outputs: tuple[_Output, ...]


class FundingOutput(Struct, frozen=True):
    """An unspent output that funds a channel, as the server tells: `txid:vout`, satoshi, depth, and depth wanted."""

    outpoint: str
    value_sat: Sat
    confirmations: int
    confirmations_needed: int

    @property
    def deep_enough(self) -> bool:
        return self.confirmations >= self.confirmations_needed


Watcher: TypeAlias = Callable[[tuple[FundingOutput, ...] | ClientError], None]
"""Told of every look at the funding: what the server says, or why it says nothing."""

_POLL_SECONDS = 1.0


def outputs(record: ChannelRecord, patience: Patience) -> Flow[tuple[FundingOutput, ...]]:
    """Ask which outputs fund a channel.

    Raises:
        FundingNotTold: the server knows no such question.
        ServerMisbehaved: it speaks of another address, or of outputs that can't be.
    """
    reply = yield from ask(routes.outputs_request(record), patience)
    if reply.response.status == 404:
        raise FundingNotTold(url=record.url)
    if reply.response.status != 200:
        raise refusal(reply.response)
    try:
        answer = msgspec.json.decode(reply.response.body, type=_Answer)
        found = [(OutPoint.parse(each.funding_txid, each.funding_vout), each) for each in answer.outputs]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, Malformed) as error:
        raise ServerMisbehaved(what="outputs", got=printable(error)[:120], want="the documented JSON object") from None
    if answer.funding_address != record.funding_address:
        got = printable(answer.funding_address)[:40]
        raise ServerMisbehaved(what="funding address", got=got, want=record.funding_address)
    return tuple(
        FundingOutput(str(outpoint), Sat(each.value), each.confirmations, each.confirmations_needed)
        for outpoint, each in found
    )


def wait(
    record: ChannelRecord, patience: Patience, timeout_seconds: float | None, watcher: Watcher | None
) -> Flow[FundingOutput]:
    """Wait until an output funds the channel deep enough; note it, with its refund, as soon as it is seen.

    A server that is busy or away is asked again. Another output may take the place of the one noted, if that is gone.

    Raises:
        FundingMissing: not after pauses of `timeout_seconds`; never with None.
        FundingNotTold, ServerMisbehaved: see `outputs`.
    """
    waited = 0.0
    while True:
        seen = yield from _look(record, patience)
        if watcher is not None:
            watcher(seen)
        found = () if isinstance(seen, ClientError) else seen
        best = choose(record, found)
        if best is not None:
            if best.outpoint != record.funding_outpoint:
                record = yield from paying.fund(record, parse_outpoint(best.outpoint), best.value_sat)
            if best.deep_enough:
                return best
        if timeout_seconds is not None and waited >= timeout_seconds:
            raise seen if isinstance(seen, ClientError) else missing(record, found)
        yield Pause(_POLL_SECONDS)
        waited += _POLL_SECONDS


def _look(record: ChannelRecord, patience: Patience) -> Flow[tuple[FundingOutput, ...] | ClientError]:
    try:
        return (yield from outputs(record, patience))
    except (ServerFailed, Unreachable) as error:
        return error


def choose(record: ChannelRecord, found: Collection[FundingOutput]) -> FundingOutput | None:
    """Choose the output to open with: of those that hold what the payer meant to send, the nearest to its depth."""
    enough = [output for output in found if output.value_sat >= record.amount_sat]
    return max(
        enough, key=lambda output: (output.confirmations - output.confirmations_needed, output.value_sat), default=None
    )


def missing(record: ChannelRecord, found: Collection[FundingOutput]) -> FundingMissing:
    """Say what is there instead of an output to open with."""
    seen = [
        f"{each.value_sat} sat, {each.confirmations} of {each.confirmations_needed} confirmations" for each in found
    ]
    return FundingMissing(name=record.name, got="; ".join(seen[:3]) or "nothing", need_sat=record.amount_sat)
