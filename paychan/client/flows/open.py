"""Which outputs fund a channel: asked of the server, since a payer need not have a node.

The server's word is checked for what can be checked without one: that it speaks of our address, and in amounts that
exist. With an output it may show the transaction, whose id commits to the value: then the value is certain, and whether
the transaction is in the chain is what a lie would be about; that costs the server alone. Without it, an output that is
larger than the server says costs the payer the difference: so nothing below `amount_sat` is taken on its word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from paychan.client.coins import Deposit, Source, parse_outpoint, proven_value
from paychan.client.errors import (
    ClientError,
    FundingMissing,
    FundingNotTold,
    Refused,
    ServerFailed,
    ServerMisbehaved,
    Unreachable,
)
from paychan.client.flows.deposits import agrees, noted, server_shows
from paychan.client.record import ChannelRecord
from paychan.client.transport import routes
from paychan.client.transport.answers import printable, refusal
from paychan.client.transport.effects import Flow, Patience, Pause, Save, ask
from paychan.protocol.errors import Malformed
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat

_Count: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]


class _Output(Struct, frozen=True):
    funding_txid: str
    funding_vout: _Count
    value: Annotated[int, Meta(ge=1, le=MAX_MONEY_SAT)]
    confirmations: _Count
    confirmations_needed: _Count
    transaction: str = ""


class _Answer(Struct, frozen=True):
    funding_address: str
    outputs: tuple[_Output, ...]


class FundingOutput(Struct, frozen=True):
    """An unspent output that funds a channel, as the server tells: `txid:vout`, satoshi, depth, and depth wanted."""

    outpoint: str
    value_sat: Sat
    confirmations: int
    confirmations_needed: int
    source: Source = Source.SERVER
    """`TRANSACTION` if the server showed the funding transaction, else its word alone."""

    @property
    def deep_enough(self) -> bool:
        return self.confirmations >= self.confirmations_needed


Watcher: TypeAlias = Callable[[tuple[FundingOutput, ...] | ClientError], None]
"""Told of every look at the funding: what the server says, or why it says nothing."""

_POLL_SECONDS = 1.0


def outputs(record: ChannelRecord, patience: Patience, *, proven: bool = False) -> Flow[tuple[FundingOutput, ...]]:
    """Ask which outputs fund a channel; `proven`: with their transactions, which not every server shows.

    Raises:
        FundingNotTold: the server knows no such question.
        ServerMisbehaved: it speaks of another address, of outputs that can't be, or its transactions say otherwise.
    """
    reply = yield from ask(routes.outputs_request(record, proven=proven), patience)
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
    return tuple(_output(record, outpoint, each) for outpoint, each in found)


def _output(record: ChannelRecord, outpoint: OutPoint, told: _Output) -> FundingOutput:
    source = Source.SERVER
    if told.transaction:
        try:
            value = proven_value(told.transaction, outpoint, record.terms.funding_script)
        except Malformed as error:
            raise ServerMisbehaved(what=f"transaction of {outpoint}", got=error, want="the funding") from None
        if value != told.value:
            raise ServerMisbehaved(what=f"value of {outpoint}", got=told.value, want=value)
        source = Source.TRANSACTION
    return FundingOutput(str(outpoint), Sat(told.value), told.confirmations, told.confirmations_needed, source)


class Said(Struct, frozen=True):
    """What the payer says about the funding output."""

    outpoint: str
    value_sat: int
    transaction: str = ""
    """The funding transaction (hex), which proves the value."""
    unchecked: bool = False
    """Take the value as it is said, whatever the server shows."""


def fund(record: ChannelRecord, said: Said, patience: Patience) -> Flow[ChannelRecord]:
    """Note which output funds the channel, once its value is compared with the transaction or with what the server shows.

    Raises:
        WrongState: something was signed for the channel already.
        FundingTooSmall: not enough to open and have change.
        FundingDiffers, FundingNotThere: what is shown contradicts what is said.
        FundingNotTold: there is nothing to compare with.
        Malformed: not an outpoint, or a transaction that does not pay there.
    """
    outpoint = parse_outpoint(said.outpoint)
    if said.transaction:
        proven = proven_value(said.transaction, outpoint, record.terms.funding_script)
        found = [Deposit(str(outpoint), proven, Source.TRANSACTION)]
        deposit = agrees(record, found, str(outpoint), said.value_sat or proven, "its transaction")
    elif said.unchecked:
        deposit = Deposit(str(outpoint), Sat(said.value_sat), Source.TYPED)
    else:
        noted(record, Deposit(str(outpoint), Sat(said.value_sat), Source.TYPED))  # refused before anything is asked
        shown = yield from outputs(record, patience, proven=True)
        deposit = agrees(record, _deposits(shown), str(outpoint), said.value_sat, "the server")
    record = noted(record, deposit)
    yield Save(record)
    return record


def fund_debug(record: ChannelRecord, outpoint: OutPoint, value_sat: Sat) -> Flow[ChannelRecord]:
    """Note the funding that follows from key and expiry; no chain has it."""
    record = noted(record, Deposit(str(outpoint), value_sat, Source.DEBUG))
    yield Save(record)
    return record


def look_for_others(record: ChannelRecord) -> Flow[ChannelRecord]:
    """Note all outputs at the address that the server lists, beside the funding; say nothing if it does not."""
    try:
        shown = yield from outputs(record, Patience(attempts=1), proven=True)
    except (FundingNotTold, Refused, Unreachable, ServerMisbehaved):
        return record
    return (yield from server_shows(record, _deposits(shown)))


def _deposits(found: Collection[FundingOutput]) -> list[Deposit]:
    return [Deposit(each.outpoint, each.value_sat, each.source) for each in found]


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
            if best.outpoint != record.funding_outpoint or _contradicts(record, best):
                best = yield from _proven(record, best, patience)
                record = noted(record, Deposit(best.outpoint, best.value_sat, best.source))
                yield Save(record)
            if best.deep_enough:
                yield from server_shows(record, _deposits(found))
                return best
        if not isinstance(seen, ClientError):
            record = yield from server_shows(record, _deposits(found))
        if timeout_seconds is not None and waited >= timeout_seconds:
            raise seen if isinstance(seen, ClientError) else missing(record, found)
        yield Pause(_POLL_SECONDS)
        waited += _POLL_SECONDS


def _contradicts(record: ChannelRecord, best: FundingOutput) -> bool:
    """Say whether the server tells another value than was noted without a check."""
    return best.value_sat != record.funding_sat and not record.funding_source.checked


def _proven(record: ChannelRecord, best: FundingOutput, patience: Patience) -> Flow[FundingOutput]:
    """Ask for the transaction of an output before it is noted, once; a server that shows none is taken at its word."""
    try:
        shown = yield from outputs(record, patience, proven=True)
    except (ServerFailed, Unreachable):
        return best
    return next((each for each in shown if each.outpoint == best.outpoint), best)


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
