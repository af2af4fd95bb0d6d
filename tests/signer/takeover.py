"""A server under an attacker's control: it holds the signer's socket, knows every public fact, and tries anything.

It can't restore old copies of the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from paychan.protocol.settlement import CHILD_BYTES
from paychan.protocol.types import MAX_MONEY_SAT, Sat
from paychan.protocol.wire.signer_messages import (
    AgainRequest,
    ChildReply,
    ChildRequest,
    FundingReply,
    FundingRequest,
    KeyReply,
    KeyRequest,
    NewestReply,
    NewestRequest,
    Refusal,
    Reply,
    Request,
    SettlementReply,
    SettlementRequest,
)
from signer.keys.ring import KeyRing
from signer.ledger.entries import Output, decode_entry
from tests.signer.doors import Door
from tests.signer.hostile import GOOD, NUMBERS, PLANS, Attacker, Plan
from tests.signer.judge import Judge, Rules
from tests.signer.messages import mutated
from tests.signer.scene import ADDRESS, CHANNELS, PLACES, PREVIOUS, SOURCES, THIEF, Place, facts
from tests.signer.tricks import DAMAGES, SOUND, TRICKS, damaged


def _some(*parts: st.SearchStrategy[Any]) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    return st.lists(st.tuples(*parts), min_size=1, max_size=5)


class HostileServer(RuleBasedStateMachine):
    """Sends requests, and has every reply judged. A subclass sets the kind of signer (`open_door`)."""

    open_door: ClassVar[Callable[[KeyRing, bytes | None], Door]]
    limits: ClassVar[Rules]
    answers: ClassVar[Counter[tuple[str, str]]]
    door: Door

    @initialize(
        address=st.sampled_from([None, None, ADDRESS]),
        hidden=st.sets(st.integers(0, len(PLACES) - 1), max_size=1),
        plans=st.lists(GOOD, min_size=1, max_size=2),
    )
    def begin(self, address: bytes | None, hidden: set[int], plans: list[Plan]) -> None:
        """The operator starts a signer; the server shows most of the chain's outputs, as an honest server does."""
        keys = KeyRing(SOURCES, address, [PREVIOUS])
        self.door = type(self).open_door(keys, address)
        self.attacker = Attacker(keys, self.limits)
        self.judge = Judge(self.limits, *facts(address))
        self.wanted: tuple[SettlementRequest, int] | None = None
        self.wait(0, beat=True)
        for raw in dict.fromkeys(place.raw for place in PLACES):
            self.judge.learn(raw)
            outputs = [place.outpoint.vout for n, place in enumerate(PLACES) if place.raw == raw and n not in hidden]
            if outputs:
                self.ask(FundingRequest(1, raw, tuple(outputs)))
        self.settle(plans)

    # --- requests ---------------------------------------------------------------------------------------------------

    def ask(self, *requests: Request) -> list[Reply]:
        """Send one request, or several at the same time, and judge the replies. A refused request changes no entry."""
        before = self.door.memory()
        if len(requests) == 1:
            replies = [self.door.send(requests[0])]
        else:
            with ThreadPoolExecutor(len(requests)) as pool:
                replies = list(pool.map(self.door.send, requests))
        for request, reply in zip(requests, replies, strict=True):
            self.count(request, reply)
        if all(isinstance(reply, Refusal) for reply in replies):
            assert self.door.memory() == before
        signed = [reply.settlement for reply in replies if isinstance(reply, SettlementReply)]
        self.judge.settlements([(each.transaction, each.fee_sat) for each in signed], self.door.now())
        for request, reply in zip(requests, replies, strict=True):
            if isinstance(reply, ChildReply):
                self.judge.child(reply.child.transaction, reply.child.fee_sat)
            elif isinstance(request, FundingRequest) and isinstance(reply, FundingReply):
                self.judge.show(request.transaction, request.outputs)
            elif isinstance(request, SettlementRequest) and isinstance(reply, SettlementReply):
                self.attacker.signed_for(request, reply.settlement.transaction)
        return replies

    def count(self, request: Request, reply: Reply) -> None:
        asked = type(request).__name__
        answer = reply.tag if isinstance(reply, Refusal) else "given"
        self.answers[asked, answer] += 1
        assert not isinstance(reply, Refusal) or reply.tag != "protocol-ledger"

    # --- attacks ----------------------------------------------------------------------------------------------------

    @rule(
        channel=st.integers(0, len(CHANNELS) - 1),
        value_sat=st.sampled_from([1, 545, 2_000, 100_000, 10_000_000, MAX_MONEY_SAT]),
        number=st.integers(0, 3),
        shows=st.sampled_from([True] * 7 + [False]),
    )
    def invent(self, channel: int, value_sat: int, number: int, shows: bool) -> None:
        """A transaction that pays any value to a channel, and spends an output that never existed."""
        place = self.attacker.invent(channel, value_sat, number)
        self.judge.learn(place.raw)
        if shows:
            self.ask(_shown(place))

    @rule(damages=_some(NUMBERS, st.sampled_from(["none", *DAMAGES])))
    def show(self, damages: list[tuple[int, str]]) -> None:
        """True transactions, the same in other bytes, missing outputs, or outputs that are no channel's."""
        for number, damage in damages:
            request = damaged(_shown(PLACES[number % len(PLACES)]), damage, number)
            if damage in SOUND:
                self.judge.learn(request.transaction)
            [reply] = self.ask(request)
            assert isinstance(reply, FundingReply if damage in SOUND else Refusal)

    @rule(channel=st.integers(0, len(CHANNELS) - 1), mine=st.booleans())
    def ask_for_a_key(self, channel: int, mine: bool) -> None:
        """The key of a channel, or one whose client key is a key of the signer."""
        terms = CHANNELS[channel].terms
        reply = self.ask(KeyRequest(1, terms.server_key if mine else terms.client_key, terms.expiry.lock_time))[0]
        assert isinstance(reply, KeyReply)

    @rule(plans=st.lists(PLANS | GOOD, min_size=1, max_size=5))
    def settle(self, plans: list[Plan]) -> None:
        """Settlements with any faults."""
        for plan in plans:
            request = self.attacker.request(plan)
            [reply] = self.ask(request)
            if isinstance(reply, Refusal) and reply.need_sat:
                self.wanted = (request, reply.need_sat)

    @rule(tricks=_some(GOOD, st.sampled_from(sorted(TRICKS))))
    def settle_with_a_trick(self, tricks: list[tuple[Plan, str]]) -> None:
        """Settlements that are valid except for one trick."""
        for plan, trick in tricks:
            self.ask(TRICKS[trick](self.attacker, self.attacker.request(plan), plan.number))

    @rule(plans=st.lists(PLANS | GOOD, min_size=2, max_size=4), same=st.booleans())
    def settle_at_once(self, plans: list[Plan], same: bool) -> None:
        """Several settlements at the same time, or one several times."""
        requests = [self.attacker.request(plan) for plan in plans]
        self.ask(*(requests[:1] * len(requests) if same else requests))

    @precondition(lambda self: self.wanted)
    @rule(less=st.booleans())
    def pay_what_is_needed(self, less: bool) -> None:
        """The fee that the last refusal named, or a satoshi less."""
        assert self.wanted is not None
        (request, need_sat), self.wanted = self.wanted, None
        self.ask(mutated(request, "fee_sat", need_sat - less))

    @precondition(lambda self: self.attacker.signed)
    @rule(
        changes=_some(
            NUMBERS, st.integers(0, 7), st.sampled_from(["as before", "dearer", "dearer", "same rate", "less", "most"])
        )
    )
    def settle_otherwise(self, changes: list[tuple[int, int, str]]) -> None:
        """A signed settlement, with fewer claims, other change, another script or another destination."""
        for number, how, fee in changes:
            signed = self.attacker.newest(number)
            request = self.otherwise(signed, how, number)
            if fee != "as before":
                fee_sat = signed.fee_sat - 1 if fee == "less" else self.attacker.fee(fee, request)
                request = mutated(request, "fee_sat", fee_sat)
            self.ask(request)

    def otherwise(self, request: SettlementRequest, how: int, number: int) -> SettlementRequest:
        changes: dict[int, Callable[[], SettlementRequest]] = {
            1: lambda: mutated(request, "claims", request.claims[:1]),
            2: lambda: mutated(request, "claims", request.claims[1:] or request.claims),
            3: lambda: mutated(request, "destination_script", THIEF),
            4: lambda: mutated(request, "claims.0", self.attacker.signs(request.claims[0], change_script=THIEF)),
            5: lambda: mutated(request, "claims.0", self.attacker.signs(request.claims[0], number % 3)),
            6: lambda: mutated(request, "claims.0", self.attacker.signs(request.claims[0], -number)),
        }
        return changes.get(how, lambda: request)()

    @rule(plans=st.lists(PLANS | GOOD, min_size=1, max_size=4))
    def show_payments(self, plans: list[Plan]) -> None:
        """Newest payments, good and bad, several at a time; those not refused bound all later settlements."""
        claims = tuple(claim for plan in plans for claim in self.attacker.request(plan).claims)
        [reply] = self.ask(NewestRequest(1, claims))
        assert isinstance(reply, NewestReply)
        for index, claim in enumerate(claims):
            if index not in (*reply.unshown, *reply.refused):
                at, change_sat = claim.outpoint, claim.payment.change_sat
                self.judge.remember(at.serialize(), claim.funding_sat - change_sat)
                self.attacker.shown[at] = min(change_sat, self.attacker.shown.get(at, change_sat))

    @precondition(lambda self: self.attacker.signed)
    @rule(number=NUMBERS)
    def again(self, number: int) -> None:
        """The settlement that was signed for an output, or for one without any."""
        places = [*self.attacker.signed] * 3 + [place.outpoint for place in self.attacker.places]
        self.ask(AgainRequest(1, places[number % len(places)]))

    @precondition(lambda self: self.attacker.signed)
    @rule(
        children=_some(
            NUMBERS,
            st.sampled_from(["usual", "usual", "most", "more", "more", "all", "negative", "none"]),
            st.sampled_from([True, True, True, False]),
        )
    )
    def child(self, children: list[tuple[int, str, bool]]) -> None:
        """Children of settlements that were signed, or of some that never were."""
        for number, fee, signed in children:
            parent = self.attacker.newest(number)
            if not signed:
                parent = mutated(parent, "fee_sat", parent.fee_sat + 1)
            fees = {"usual": CHILD_BYTES, "negative": -1, "none": 0}
            fee_sat = fees[fee] if fee in fees else self.attacker.fee(fee, parent) - parent.fee_sat
            self.ask(ChildRequest(1, parent, Sat(fee_sat)))

    @precondition(lambda self: self.attacker.signed)
    @rule(number=NUMBERS)
    def use_what_came_back(self, number: int) -> None:
        """The output of a settlement to the reserve may be a coin of the next."""
        coin = self.attacker.came_back(self.attacker.newest(number))
        if coin is not None:
            self.ask(_shown(coin))

    @precondition(lambda self: self.judge.values)
    @rule()
    def restart(self) -> None:
        before = self.door.memory()
        self.door.restart()
        assert self.door.memory() == before

    @precondition(lambda self: self.limits.hour_sat or self.limits.heartbeat_seconds)
    @rule(seconds=st.sampled_from([600, 3_500, 7_201, 82_000]), beat=st.sampled_from([False, False, True]))
    def wait(self, seconds: int, beat: bool) -> None:
        """Time passes if limits depend on it, with or without a heartbeat of the operator."""
        self.door.wait(seconds)
        if beat:
            self.door.beat()
            self.judge.beat(self.door.now())

    def teardown(self) -> None:
        """The signer remembers outputs exactly as they were shown."""
        if not hasattr(self, "door"):
            return
        try:
            for key, raw in self.door.memory().items():
                if key[:1] == b"f" and len(key) == 37:
                    output = decode_entry(raw, Output)
                    assert self.judge.outputs[key[1:]] == (output.value_sat, output.script)
        finally:
            self.door.close()


def _shown(place: Place) -> FundingRequest:
    return FundingRequest(1, place.raw, (place.outpoint.vout,))
