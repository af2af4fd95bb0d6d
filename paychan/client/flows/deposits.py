"""Record the outputs at a channel's address: the funding, and further deposits.

Further deposits are a second payment to the address, a payment that is too small or late, the funding under another
txid after a fee bump, and the change that a settlement left there. The address is a script, so only a refund returns
them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from paychan.client.coins import MOST_DEPOSITS, Deposit, Source, parse_outpoint, proven_value, txid_of
from paychan.client.errors import FundingDiffers, FundingNotThere, FundingTooSmall, WrongState
from paychan.client.flows.refund import first_refund
from paychan.client.record import ChannelRecord, State
from paychan.client.transport.effects import Flow, Save
from paychan.protocol.errors import Malformed
from paychan.protocol.types import Sat

_replace = msgspec.structs.replace


def noted(record: ChannelRecord, funding: Deposit) -> ChannelRecord:
    """Record the output that funds the channel, with its signed refund. An earlier one becomes a further deposit.

    If the server refused the opening payment, that payment is forgotten together with its output, which may have been
    replaced. If both outputs exist, the server could also take the opening price from the first one.

    Raises:
        WrongState: the opening payment was signed for another output, and the server did not refuse it.
        FundingTooSmall: less than open price plus dust limit.
    """
    if record.state is not State.NEW:
        raise WrongState(name=record.name, state=record.state.value, need=State.NEW.value)
    elsewhere = funding.outpoint != record.funding_outpoint
    if record.signed_sat is not None and elsewhere and not record.refused:
        raise WrongState(name=record.name, state="signed for another output", need="a channel without payments")
    if funding.value_sat < record.min_funding_sat:
        raise FundingTooSmall(got_sat=funding.value_sat, need_sat=record.min_funding_sat)
    before = record.funding
    others = [each for each in record.deposits if each.outpoint != funding.outpoint]
    if before is not None and before.outpoint != funding.outpoint:
        others.append(before)
    if elsewhere:
        record = _replace(record, signed_sat=None, refused=False, secret="")
    record = _with_value(_replace(record, funding_outpoint=funding.outpoint, funding_sat=funding.value_sat), funding)
    return _with_refund(_replace(record, deposits=tuple(others)))


def agrees(record: ChannelRecord, found: Collection[Deposit], outpoint: str, value_sat: int, source: str) -> Deposit:
    """Return the output that a source shows at `outpoint`, if it holds the stated value.

    Raises:
        FundingNotThere: the source shows no such output.
        FundingDiffers: it holds another value.
    """
    for each in found:
        if each.outpoint == outpoint:
            if each.value_sat != value_sat:
                raise FundingDiffers(outpoint=outpoint, got_sat=value_sat, want_sat=each.value_sat, source=source)
            return each
    shown = ", ".join(f"{each.value_sat} sat in {each.outpoint}" for each in list(found)[:3]) or "nothing"
    raise FundingNotThere(outpoint=outpoint, address=record.funding_address, source=source, found=shown)


def server_shows(record: ChannelRecord, found: Sequence[Deposit]) -> Flow[ChannelRecord]:
    """Record further outputs that the server lists. Values from the payer's own chain are kept."""
    known = {each.outpoint: each for each in record.deposits if each.source is Source.CHAIN}
    listed = {each.outpoint: each for each in found if each.outpoint != record.funding_outpoint}
    deposits = tuple((listed | known).values())[:MOST_DEPOSITS]
    if set(deposits) != set(record.deposits):
        record = _replace(record, deposits=deposits)
        yield Save(record)
    return record


def with_chain(record: ChannelRecord, found: Sequence[Deposit], pending: Collection[str] = ()) -> ChannelRecord:
    """Return the record with all unspent outputs at the address, as the payer's node or Electrum server reports them.

    Their values replace earlier ones. If the channel is not open and its recorded funding is gone, the most valuable
    output becomes the funding. `pending` are outpoints that are spent, but not yet deep in the chain.
    """
    unspent = {each.outpoint: each for each in found}
    here = unspent.get(record.funding_outpoint)
    now = record
    if here is not None:
        now = _with_value(record, here)
        now = now if now.funding_sat == record.funding_sat else _with_refund(now)
    elif _may_fund_elsewhere(record) and record.funding_outpoint not in pending:
        best = max(found, key=lambda each: each.value_sat, default=None)
        if best is not None and best.value_sat >= record.min_funding_sat:
            now = noted(record, best)
    kept = {each.outpoint: each for each in record.deposits if each.outpoint in pending}
    others = kept | {key: each for key, each in unspent.items() if key != now.funding_outpoint}
    return _replace(now, deposits=tuple(others.values())[:MOST_DEPOSITS])


def chain_shows(record: ChannelRecord, found: Sequence[Deposit], pending: Collection[str] = ()) -> Flow[ChannelRecord]:
    """Save the record that `with_chain` returns."""
    now = with_chain(record, found, pending)
    if now != record:
        yield Save(now)
    return now


def prove(record: ChannelRecord, transaction: str) -> Flow[ChannelRecord]:
    """Take the values of recorded outputs from the transaction (hex) that holds them: its txid commits to them.

    Raises:
        Malformed: not a transaction, or it holds none of the recorded outputs.
    """
    txid = txid_of(transaction)
    now = record
    noted_there = [each for each in (record.funding, *record.deposits) if each is not None and txid in each.outpoint]
    if not noted_there:
        held = ", ".join(each.outpoint for each in (record.funding, *record.deposits) if each is not None) or "nothing"
        raise Malformed(field="transaction", reason=f"its id is {txid}, and the channel has {held}")
    for each in noted_there:
        value = proven_value(transaction, parse_outpoint(each.outpoint), record.terms.funding_script)
        proven = Deposit(each.outpoint, value, Source.TRANSACTION)
        if each.outpoint == record.funding_outpoint:
            now = _with_refund(_with_value(now, proven))
        else:
            others = tuple(proven if other.outpoint == each.outpoint else other for other in now.deposits)
            now = _replace(now, deposits=others)
    if now != record:
        yield Save(now)
    return now


def _may_fund_elsewhere(record: ChannelRecord) -> bool:
    return record.state is State.NEW and (record.signed_sat is None or record.refused)


def _with_value(record: ChannelRecord, funding: Deposit) -> ChannelRecord:
    """Take over the value of the funding output. Signed amounts stay, so an excess value counts as paid."""
    value = funding.value_sat

    def at_most(signed: Sat | None) -> Sat | None:
        return None if signed is None else min(signed, value)

    return _replace(
        record,
        funding_sat=value,
        funding_source=funding.source,
        signed_sat=at_most(record.signed_sat),
        acknowledged_sat=at_most(record.acknowledged_sat),
        closing_sat=at_most(record.closing_sat),
    )


def _with_refund(record: ChannelRecord) -> ChannelRecord:
    signed = first_refund(record)
    return _replace(record, refunds=(*(each for each in record.refunds if each not in signed), *signed))
