"""The settlement planner as a table of cases, for the server and for `settle --offline` (threats 8, 21 and 24)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import Struct

from paychan.protocol.channel import Channel, Close, CloseReason, Signed
from paychan.protocol.fees import ChainFees, Shortfall
from paychan.protocol.settlement import CHILD_BYTES, Coin, Settlement, settlement_size, sign_settlement
from paychan.protocol.settlement_plan import (
    Attempt,
    ChildPays,
    Conditions,
    FundFromReserve,
    Pinned,
    Sign,
    Spends,
    SuccessorPays,
    Unconfirmed,
    Wait,
    choose_coin,
    dearer_elsewhere,
    fitting,
    lowered,
    lowered_child,
    may_wait,
    plan,
    replacement_fee,
)
from paychan.protocol.types import OutPoint, Sat, UnixTime
from tests.lib.channels import DAY_SECONDS, NOW, RULES, SERVER_DESTINATION, Payer, private_key, step
from tests.lib.looped import looped

HOUR = 3600
WINDOW = 4 * HOUR
"""From the start of closing, `NOW`, to the deadline."""
rules = msgspec.structs.replace(
    RULES,
    fee_sat_per_vb=10,
    max_fee_sat_per_vb=200,
    fee_share_percent=50,
    deadline_margin_seconds=30 * DAY_SECONDS - WINDOW,
)
LATE, PAST = WINDOW - 60, WINDOW + HOUR
REFUND = b"\x99" * 32


def closing(received_sat: int = 500_000, reason: CloseReason = CloseReason.OPERATOR, seed: str = "plan") -> Channel:
    """A channel that begins to close now."""
    channel = Payer(seed).channel(received_sat)
    return channel if channel.closing else step(channel, Close(reason))


def too_small() -> Channel:
    """A closing channel that received less than dust; only a client's request closes such a channel."""
    return msgspec.structs.replace(closing(), payment=Payer("plan").payment(999_900))


def settled(members: list[Channel], fee_sat: int) -> Settlement:
    """The settlement of these channels for this fee, signed by the server's keys of the tests."""
    key = private_key("server plan")
    claims = [member.claim for member in members]
    return sign_settlement(claims, SERVER_DESTINATION, Sat(fee_sat), lambda _, digest: key.sign(digest, hasher=None))


SIZE = settlement_size([closing().claim], SERVER_DESTINATION)
TOO_DEAR_TO_EVICT = Sat(400_000)


class Case(Struct, frozen=True, kw_only=True):
    """One row: the facts, and the attempts that it plans. `paid_rate` 0: nothing is signed yet."""

    name: str
    received_sat: int = 500_000
    reason: CloseReason = CloseReason.OPERATOR
    after: int = 0
    fees: ChainFees = ChainFees()
    requested: int | None = None
    follows_curve: bool = True
    paid_rate: int = 0
    mempool: str = ""
    """`own`: the last settlement; `attached`: with a transaction that needs it; `refund`: another one instead of it."""
    child_sat: int = 0
    replaceable: bool = True
    void: bool = False
    built_upon: bool = False
    expected: tuple[Any, ...]


def fee(rate: int) -> Sat:
    return Sat(rate * SIZE)


def child_fee(rate: int, paid_rate: int) -> Sat:
    """Fee of the child that raises itself and its parent to a rate."""
    return Sat(rate * (size_of(paid_rate) + CHILD_BYTES) - fee(paid_rate))


def size_of(paid_rate: int) -> int:
    return settled([closing()], fee(paid_rate)).size


def bumped(rate: int, paid_rate: int) -> Sign:
    return Sign(fee(rate), Sat(fee(paid_rate) + 1))


CASES = [
    # nothing signed yet
    Case(name="the first settlement pays the operator's rate", expected=(Sign(fee(10)),)),
    Case(name="the chain's estimate replaces it", fees=ChainFees(30), expected=(Sign(fee(30)),)),
    Case(name="the relay minimum is a lower bound", fees=ChainFees(5, 40), expected=(Sign(fee(40)),)),
    Case(name="the cap is an upper bound", fees=ChainFees(900), expected=(Sign(fee(200)),)),
    Case(name="at the deadline the cap is paid", after=WINDOW, expected=(Sign(fee(200)),)),
    Case(name="a requested rate counts, beyond the cap", requested=250, expected=(Sign(fee(250)),)),
    Case(name="the share limits the fee", received_sat=6_500, fees=ChainFees(30), expected=(Sign(Sat(3_250)),)),
    Case(
        name="the reserve is tried first where the share allows the rate, but dust would remain",
        received_sat=1_000,
        fees=ChainFees(4),
        expected=(FundFromReserve(4), Sign(Sat(454))),
    ),
    Case(
        name="a channel of less than dust is not settled",
        received_sat=100,
        expected=(Shortfall(Sat(100), Sat(SIZE + 546)),),
    ),
    Case(
        name="a refund waits in the mempool: the first settlement evicts it",
        mempool="refund",
        expected=(Sign(fee(101), fee(101)),),
    ),
    # signed, and the rate suffices
    Case(name="a settlement at the rate stays", paid_rate=10, mempool="own", expected=(Wait(),)),
    Case(name="less than a quarter above it, it stays", paid_rate=10, fees=ChainFees(12), expected=(Wait(),)),
    Case(name="a requested rate that is paid changes nothing", paid_rate=30, requested=30, expected=(Wait(),)),
    Case(name="a child that suffices is not raised", paid_rate=10, mempool="own", child_sat=999, expected=(Wait(),)),
    # a higher fee
    Case(
        name="a quarter above it, it is replaced",
        paid_rate=10,
        mempool="own",
        fees=ChainFees(13),
        expected=(Sign(fee(13), fee(11)),),
    ),
    Case(name="one that left the mempool is replaced", paid_rate=10, fees=ChainFees(13), expected=(bumped(13, 10),)),
    Case(
        name="below the relay minimum it is replaced at once",
        paid_rate=10,
        fees=ChainFees(None, 11),
        expected=(bumped(11, 10),),
    ),
    Case(name="a requested rate needs no step of a quarter", paid_rate=30, requested=31, expected=(bumped(31, 30),)),
    Case(
        name="without a request a command replaces none",
        paid_rate=10,
        after=LATE,
        follows_curve=False,
        expected=(Wait(),),
    ),
    Case(
        name="a command replaces one below the relay minimum",
        paid_rate=10,
        fees=ChainFees(None, 11),
        follows_curve=False,
        expected=(bumped(11, 10),),
    ),
    Case(
        name="a refund in its place is evicted before the curve has risen",
        paid_rate=10,
        mempool="refund",
        expected=(Sign(fee(101), fee(101)),),
    ),
    Case(
        name="a void one is replaced, at a lower rate if that is the rate now",
        paid_rate=100,
        void=True,
        expected=(Wait(),),
    ),
    Case(
        name="past the deadline the needed rate exceeds the share",
        received_sat=10_000,
        after=PAST,
        paid_rate=10,
        fees=ChainFees(20),
        expected=(bumped(20, 10),),
    ),
    Case(
        name="one that pays its whole budget, and left the mempool, is funded from the reserve",
        received_sat=20 * SIZE,
        paid_rate=10,
        after=LATE,
        expected=(FundFromReserve(198), Wait()),
    ),
    Case(
        name="one that pays its whole budget stays in the mempool",
        received_sat=20 * SIZE,
        paid_rate=10,
        after=LATE,
        mempool="own",
        expected=(Wait(),),
    ),
    # no replacement
    Case(
        name="the node does not replace it: a child pays",
        paid_rate=10,
        mempool="own",
        fees=ChainFees(40),
        replaceable=False,
        expected=(ChildPays(child_fee(40, 10)), Pinned("it does not signal replaceability")),
    ),
    Case(
        name="the node does not replace it, but does not have it either: it is replaced",
        paid_rate=10,
        fees=ChainFees(40),
        replaceable=False,
        expected=(bumped(40, 10),),
    ),
    Case(
        name="the child that was broadcast stays until the fee has risen by a step",
        paid_rate=10,
        mempool="own",
        fees=ChainFees(40),
        child_sat=child_fee(39, 10),
        replaceable=False,
        expected=(ChildPays(child_fee(39, 10)), Pinned("it does not signal replaceability")),
    ),
    Case(
        name="transactions attached to it cost more than the budget: a child pays, else it is pinned",
        paid_rate=10,
        mempool="attached",
        fees=ChainFees(40),
        expected=(ChildPays(child_fee(40, 10)), Pinned("the budget is")),
    ),
    Case(
        name="a refund costs more than the budget: it is pinned, and no child helps",
        received_sat=100_000,
        paid_rate=10,
        mempool="dear refund",
        expected=(Pinned("the budget is"),),
    ),
    Case(
        name="payments depend on the withdrawal: a child pays, or the continued channel's settlement",
        paid_rate=10,
        fees=ChainFees(40),
        built_upon=True,
        expected=(ChildPays(child_fee(40, 10)), SuccessorPays(), Pinned("payments depend on it")),
    ),
    Case(
        name="payments depend on the withdrawal: not even a refund in its place has it signed again",
        paid_rate=10,
        mempool="refund",
        built_upon=True,
        expected=(Wait(),),
    ),
]


@looped("case", CASES, ids=lambda case: case.name)
def test_the_table_of_cases(case: Case) -> None:
    """Each row: what the planner does next for one channel."""
    channel = closing(case.received_sat, case.reason) if case.received_sat > 546 else too_small()
    paid = settled([channel], fee(case.paid_rate)) if case.paid_rate else None
    own = paid.txid if paid else b""
    mempool = {
        "": (),
        "own": (Unconfirmed(own, fee(case.paid_rate), SIZE),),
        "attached": (Unconfirmed(own, TOO_DEAR_TO_EVICT, SIZE),),
        "refund": (Unconfirmed(REFUND, fee(100), SIZE),),
        "dear refund": (Unconfirmed(REFUND, TOO_DEAR_TO_EVICT, SIZE),),
    }[case.mempool]
    spends = Spends(
        paid=paid,
        mempool=mempool,
        child=Settlement(bytes(CHILD_BYTES), b"\x01" * 32, Sat(case.child_sat)) if case.child_sat else None,
        is_replaceable=case.replaceable,
        is_void=case.void,
        is_built_upon=case.built_upon,
    )
    conditions = Conditions(rules, UnixTime(NOW + case.after), case.fees, case.requested, case.follows_curve)

    attempts = plan([channel], SERVER_DESTINATION, spends, conditions)

    assert [type(attempt) for attempt in attempts] == [type(each) for each in case.expected]
    for attempt, expected in zip(attempts, case.expected, strict=True):
        agrees(attempt, expected)


def agrees(attempt: Attempt, expected: Attempt) -> None:
    """Compare amounts up to the byte by which real signatures differ from the largest ones; reasons by their subject."""
    if isinstance(attempt, Pinned) and isinstance(expected, Pinned):
        assert expected.reason in attempt.reason
        return
    ours, theirs = msgspec.structs.asdict(attempt), msgspec.structs.asdict(expected)
    assert ours == {key: pytest.approx(value, rel=0.015) for key, value in theirs.items()}


# --- members, and what follows an attempt ---------------------------------------------------------------------------


@looped(
    ("name", "seconds", "change", "waits"),
    [
        ("drained", 0, {}, True),
        ("past half of its time", WINDOW // 2, {}, False),
        ("its client offers a fee", 0, {"client_fee_sat": Sat(1)}, False),
        ("a withdrawal", 0, {"reason": CloseReason.WITHDRAW}, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_which_channels_may_wait(name: str, seconds: int, change: dict[str, Any], waits: bool) -> None:
    """Only a channel that has time, and whose settlement concerns no other transaction."""
    channel = closing(1_000_000)
    assert channel.closing is not None
    channel = msgspec.structs.replace(channel, closing=msgspec.structs.replace(channel.closing, **change))
    assert may_wait(channel, Conditions(rules, UnixTime(NOW + seconds))) == waits


def test_a_member_that_can_not_pay_the_common_rate_is_left_out() -> None:
    """The others settle together."""
    large = [closing(500_000, seed="large"), closing(1_000_000, seed="larger")]
    small = Payer("small", funding_sat=Sat(2_000)).channel(2_000)
    conditions = Conditions(rules, NOW, ChainFees(30))
    assert fitting([*large, small], SERVER_DESTINATION, conditions) == large
    assert fitting([small], SERVER_DESTINATION, conditions) == [small]


def test_the_settlement_that_another_member_stores_is_taken() -> None:
    """Only if it pays a higher rate and spends this channel's output."""
    channel, other = closing(), closing(1_000_000, seed="other")
    first, second = settled([channel, other], 10_000), settled([channel, other], 20_000)
    alone = settled([other], 90_000)
    holders = [step(other, Signed(each)) for each in (first, second, alone)]
    assert dearer_elsewhere(channel, first, holders) == second
    assert dearer_elsewhere(channel, second, holders) is None


@looped(
    ("name", "allowed_sat", "is_funded", "usable"),
    [
        ("a lower fee", 5_000, False, True),
        ("no figure", 0, False, False),
        ("less than the mempool requires", 1_999, False, False),
        ("no lower than refused", 9_000, False, False),
        ("leaves dust", 5_500, False, False),
        ("leaves dust to the reserve", 5_500, True, True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_signer_s_limit_lowers_the_fee(name: str, allowed_sat: int, is_funded: bool, usable: bool) -> None:
    """The planner accepts a lower fee, unless it is too low for the mempool, or leaves dust."""
    attempt = Sign(Sat(9_000), Sat(2_000))
    found = lowered(attempt, Sat(allowed_sat), [closing(6_000).claim], rules, is_funded=is_funded)
    assert found == (Sign(Sat(allowed_sat), Sat(2_000)) if usable else None)


@looped(("allowed_sat", "usable"), [(5_000, True), (9_000, False), (0, False), (1_500, False)])
def test_the_signer_s_limit_lowers_a_child_s_fee(allowed_sat: int, usable: bool) -> None:
    """Only as long as the child raises its parent's rate."""
    paid = settled([closing()], fee(10))
    found = lowered_child(ChildPays(Sat(9_000)), Sat(allowed_sat), paid)
    assert found == (ChildPays(Sat(allowed_sat)) if usable else None)


def test_the_smallest_sufficient_coin_is_chosen() -> None:
    """A coin that leaves dust is too small; a fee below what the mempool requires is none."""
    coins = [Coin(OutPoint(bytes([number]) * 32, 0), Sat(value)) for number, value in ((1, 90_000), (2, 600), (3, 10))]
    key = private_key("reserve").public_key.format()
    generous = Conditions(msgspec.structs.replace(rules, fee_share_percent=100), NOW)
    chosen = choose_coin([closing(2_000)], key, coins, FundFromReserve(4), generous)
    assert chosen is not None
    assert chosen[0].coins == (coins[1],)
    assert choose_coin([closing(2_000)], key, coins, FundFromReserve(4, Sat(2_001)), generous) is None
    assert choose_coin([closing(2_000)], key, coins[2:], FundFromReserve(4, Sat(0)), generous) is None


def test_a_replacement_exceeds_what_it_evicts() -> None:
    """All fees together plus its own relay, and the rate of each transaction other than the last settlement."""
    paid = settled([closing()], fee(10))
    own, small = Unconfirmed(paid.txid, fee(10), SIZE), Unconfirmed(REFUND, Sat(3_000), 100)
    fees = ChainFees(increment_sat_per_vb=2)
    assert replacement_fee(SIZE, Spends(paid=paid), fees) == 0
    assert replacement_fee(SIZE, Spends(paid=paid, mempool=(own,)), fees) == fee(10) + 2 * SIZE
    assert replacement_fee(SIZE, Spends(paid=paid, mempool=(own, small)), fees) == 30 * SIZE + 1 + 2 * SIZE
