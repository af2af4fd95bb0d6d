"""Newest payments that the server shows at intervals, so that a watermark exists before a break-in. Pure.

A server under an attacker's control, with a client that colludes, could settle an older payment than the newest, unless
the signer knows the newest. So each payment is checked as in a settlement, and the claim is recorded: later settlements
give the client no more than this claim does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint
from signer.judge.validation import output_problem, terms_problem
from signer.keys.ring import SigningKey
from signer.ledger.entries import Entries, Output


class Judged(Struct, frozen=True):
    """The claims to record, and the indices of the others."""

    kept: dict[OutPoint, Claim]
    unshown: tuple[int, ...]
    refused: tuple[int, ...]


def judge(
    claims: Sequence[Claim],
    keys: Sequence[SigningKey | None],
    outputs: Mapping[OutPoint, Output],
    earlier: Entries,
    newest: Mapping[OutPoint, Claim],
    *,
    debug: bool,
) -> Judged:
    """Judge claims one by one: a wrong one stops no other. A known claim is neither recorded again nor refused."""
    kept: dict[OutPoint, Claim] = {}
    unshown, refused = [], []
    for index, (claim, key) in enumerate(zip(claims, keys, strict=True)):
        outpoint = claim.outpoint
        if outpoint not in outputs and not debug:
            unshown.append(index)
        elif _is_wrong(claim, key, outputs) or _is_older(claim, earlier, {**newest, **kept}):
            refused.append(index)
        elif outpoint not in newest or claim.payment.change_sat < newest[outpoint].payment.change_sat:
            kept[outpoint] = claim
    return Judged(kept, tuple(unshown), tuple(refused))


def _is_wrong(claim: Claim, key: SigningKey | None, outputs: Mapping[OutPoint, Output]) -> bool:
    if terms_problem(claim, key) or output_problem(claim, outputs) or claim.problem():
        return True
    shown = outputs.get(claim.outpoint)
    return shown is not None and shown.value_sat != claim.funding_sat


def _is_older(claim: Claim, earlier: Entries, newest: Mapping[OutPoint, Claim]) -> bool:
    signed, shown = earlier.get(claim.outpoint), newest.get(claim.outpoint)
    known = [signed.change_sat] if signed else []
    known += [shown.payment.change_sat] if shown else []
    return any(claim.payment.change_sat > change_sat for change_sat in known)
