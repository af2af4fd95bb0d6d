"""Find the outputs that fund a channel. The server is asked, since a payer needs no node.

The answer is checked as far as possible without a node: it must name the channel's address and possible amounts. The
server may show the transaction of an output. Its txid commits to the value, so the value is proven; the server could
lie only about the transaction being in the chain, which would cost the server alone. Without the transaction, an output
that holds more than the server says costs the payer the difference. So an output below `amount_sat` is never accepted
on the server's claim. A caller that needs less than was planned may accept a smaller output whose value is proven.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct, structs

from paychan.client.amounts import satoshi, whole
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
from paychan.protocol.debug_funding import debug_outpoint
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
    """An unspent output that funds a channel, as the server reports it: `txid:vout`, satoshi, depth, required depth."""

    outpoint: str
    value_sat: Sat
    confirmations: int
    confirmations_needed: int
    source: Source = Source.SERVER
    """`TRANSACTION` if the server showed the funding transaction, `DEBUG` for the funding of debug mode, else `SERVER`.

    After `wait`, that of the record.
    """

    @property
    def deep_enough(self) -> bool:
        return self.confirmations >= self.confirmations_needed


Watcher: TypeAlias = Callable[[tuple[FundingOutput, ...] | ClientError], None]
"""Called after every poll: with the server's outputs, or with the error."""

_POLL_SECONDS = 1.0


def outputs(record: ChannelRecord, patience: Patience, *, proven: bool = False) -> Flow[tuple[FundingOutput, ...]]:
    """Ask which outputs fund a channel. `proven` asks for their transactions as well, which not every server shows.

    Raises:
        FundingNotTold: the server does not offer this request.
        ServerMisbehaved: another address, impossible outputs, or transactions that contradict the outputs.
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


def _output(record: ChannelRecord, outpoint: OutPoint, listed: _Output) -> FundingOutput:
    derived = debug_outpoint(record.terms.client_key, record.expiry)
    source = Source.DEBUG if outpoint == derived else Source.SERVER  # a hash of key and expiry: no chain has it
    if listed.transaction:
        try:
            value = proven_value(listed.transaction, outpoint, record.terms.funding_script)
        except Malformed as error:
            raise ServerMisbehaved(what=f"transaction of {outpoint}", got=error, want="the funding") from None
        if value != listed.value:
            raise ServerMisbehaved(what=f"value of {outpoint}", got=listed.value, want=value)
        source = Source.TRANSACTION
    return FundingOutput(str(outpoint), Sat(listed.value), listed.confirmations, listed.confirmations_needed, source)


class FundingClaim(Struct, frozen=True):
    """The payer's own statement about the funding output."""

    outpoint: str
    value_sat: int
    transaction: str = ""
    """The funding transaction (hex), which proves the value."""
    unchecked: bool = False
    """Accept the value without comparing it with the server's."""


def fund(record: ChannelRecord, claim: FundingClaim, patience: Patience) -> Flow[ChannelRecord]:
    """Record the output that funds the channel, after comparing its value with the transaction or the server's list.

    Raises:
        WrongNumber, TermsUnacceptable: the value is no amount that an output can hold.
        WrongState: a payment was already signed for the channel.
        FundingTooSmall: less than open price plus dust limit.
        FundingDiffers, FundingNotThere: transaction or server contradict the statement.
        FundingNotTold: the server lists no outputs to compare with.
        Malformed: not an outpoint, or a transaction without this output.
    """
    claim = structs.replace(claim, value_sat=satoshi(claim.value_sat, "value_sat"))
    outpoint = parse_outpoint(claim.outpoint)
    if claim.transaction:
        proven = proven_value(claim.transaction, outpoint, record.terms.funding_script)
        found = [Deposit(str(outpoint), proven, Source.TRANSACTION)]
        deposit = agrees(record, found, str(outpoint), claim.value_sat or proven, "its transaction")
    elif claim.unchecked:
        deposit = Deposit(str(outpoint), Sat(claim.value_sat), Source.TYPED)
    else:
        noted(record, Deposit(str(outpoint), Sat(claim.value_sat), Source.TYPED))  # decline before any request
        shown = yield from outputs(record, patience, proven=True)
        deposit = agrees(record, _deposits(shown), str(outpoint), claim.value_sat, "the server")
    record = noted(record, deposit)
    yield Save(record)
    return record


def fund_debug(record: ChannelRecord, outpoint: OutPoint, value_sat: Sat) -> Flow[ChannelRecord]:
    """Record the funding that follows from key and expiry; it is in no chain."""
    record = noted(record, Deposit(str(outpoint), value_sat, Source.DEBUG))
    yield Save(record)
    return record


def look_for_others(record: ChannelRecord) -> Flow[ChannelRecord]:
    """Record all further outputs at the address that the server lists; ignore a failure."""
    try:
        shown = yield from outputs(record, Patience(attempts=1), proven=True)
    except (FundingNotTold, Refused, Unreachable, ServerMisbehaved):
        return record
    return (yield from server_shows(record, _deposits(shown)))


def _deposits(found: Collection[FundingOutput]) -> list[Deposit]:
    return [Deposit(each.outpoint, each.value_sat, each.source) for each in found]


def wait(
    record: ChannelRecord,
    patience: Patience,
    timeout_seconds: float | None,
    watcher: Watcher | None,
    enough_sat: int | None = None,
) -> Flow[FundingOutput]:
    """Poll until an output funds the channel deep enough; record it, with its refund, as soon as it is seen.

    A busy or silent server is asked again. Another output may replace the recorded one if that is gone. An output of
    `enough_sat`, if less was planned than `amount_sat`, is recorded only if its value is proven.

    Raises:
        FundingMissing: not within pauses of `timeout_seconds` in sum; never with None.
        FundingNotTold, ServerMisbehaved: see `outputs`.
    """
    waited = 0.0
    enough_sat = None if enough_sat is None else whole(enough_sat, "enough_sat")
    while True:
        seen = yield from _look(record, patience)
        if watcher is not None:
            watcher(seen)
        found = () if isinstance(seen, ClientError) else seen
        best = choose(record, found, enough_sat)
        if best is not None and (best.outpoint != record.funding_outpoint or _contradicts(record, best)):
            best = yield from _proven(record, best, patience)
            if best.value_sat < record.amount_sat and not best.source.checked:
                best = None
            else:
                record = noted(record, Deposit(best.outpoint, best.value_sat, best.source))
                yield Save(record)
        if best is not None and best.deep_enough:
            yield from server_shows(record, _deposits(found))
            return structs.replace(best, source=record.funding_source)
        if not isinstance(seen, ClientError):
            record = yield from server_shows(record, _deposits(found))
        if timeout_seconds is not None and waited >= timeout_seconds:
            raise seen if isinstance(seen, ClientError) else missing(record, found, enough_sat)
        yield Pause(_POLL_SECONDS)
        waited += _POLL_SECONDS


def _contradicts(record: ChannelRecord, best: FundingOutput) -> bool:
    """Say whether the server reports another value than an unchecked one in the record."""
    return best.value_sat != record.funding_sat and not record.funding_source.checked


def _proven(record: ChannelRecord, best: FundingOutput, patience: Patience) -> Flow[FundingOutput]:
    """Ask once for the transaction of an output before it is recorded; if there is none, the server's claim counts."""
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


def choose(
    record: ChannelRecord, found: Collection[FundingOutput], enough_sat: int | None = None
) -> FundingOutput | None:
    """Choose the output to open with: first those that hold the planned amount, then the one nearest to its depth.

    Enough is the planned amount, or `enough_sat` if that is less; debug funding without `enough_sat` must only open.
    """
    least = record.amount_sat if enough_sat is None else min(enough_sat, record.amount_sat)
    debug = record.min_funding_sat if enough_sat is None else least
    enough = [each for each in found if each.value_sat >= (debug if each.source is Source.DEBUG else least)]

    def rank(each: FundingOutput) -> tuple[bool, int, int]:
        return each.value_sat >= record.amount_sat, each.confirmations - each.confirmations_needed, each.value_sat

    return max(enough, key=rank, default=None)


def missing(record: ChannelRecord, found: Collection[FundingOutput], enough_sat: int | None = None) -> FundingMissing:
    """Describe the outputs that exist instead of one to open with."""
    seen = [
        f"{each.value_sat} sat, {each.confirmations} of {each.confirmations_needed} confirmations" for each in found
    ]
    got = "; ".join(seen[:3]) or "nothing"
    need_sat = record.amount_sat if enough_sat is None else min(enough_sat, record.amount_sat)
    return FundingMissing(name=record.name, got=got, need_sat=need_sat, address=record.funding_address)
