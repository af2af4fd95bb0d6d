"""Paid requests in random histories: losses, restarts, and a seller that lies. Without sockets: the seller answers calls."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paychan.client import Budget, Payer, Purse, errors
from paychan.client.paying.account import Paid
from paychan.client.paying.demands import Headers
from paychan.client.paying.drive import drive
from paychan.client.paying.exchange import Answer, exchange
from paychan.client.paying.paying import Request
from paychan.client.paying.spending import SpendingLog
from paychan.protocol.debug_funding import debug_outpoint
from paychan.protocol.types import Sat
from tests.client.conftest import IMPATIENT
from tests.client.liar import FUNDING_SAT, Liar
from tests.client.paying.seller import Lie, Reply, Seller

SLOW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


class World:
    """A seller, and the files of a wallet with one channel to it, opened with 10,000 sat."""

    def __init__(self, seller: Seller, files: Path) -> None:
        self.seller, self._files, self._opened = seller, files, seller.liar.channel
        self._number = 0

    def anew(self) -> Path:
        """Return a fresh wallet; the seller forgets all payments after the opening."""
        self._number += 1
        wallet = self._files.with_name(f"wallet{self._number}")
        shutil.copytree(self._files, wallet)
        self.seller.liar.channel = self._opened
        self.seller.paid.clear()
        self.seller.lies.clear()
        self.seller.price_sat = 25
        return wallet

    def get(self, purse: Purse, path: str) -> int:
        """Make one request; return the status of the program's answer."""
        url = f"{self.seller.url}{path}"

        def send(headers: Headers) -> tuple[Reply, Answer]:
            reply = self.seller.answer("GET", f"/{path}", {name.lower(): value for name, value in headers}, b"")
            if reply is None:
                msg = "connection lost"
                raise ConnectionError(msg)
            return reply, Answer(reply.status, [(name.lower(), value) for name, value in reply.headers], reply.body)

        return drive(exchange(purse, Request("GET", url, self.seller.host)), send, lambda _: None)[0].status


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    files = tmp_path_factory.mktemp("world") / "wallet"
    with Liar() as liar, Seller(liar) as seller:
        with Payer(liar.url, wallet=files, patience=IMPATIENT) as payer:
            channel = payer.new_channel(hours=100)
            channel.fund(str(debug_outpoint(channel.record.terms.client_key, channel.record.expiry)), FUNDING_SAT)
            channel.open()
        yield World(seller, files)


def signed_sat(purse: Purse) -> int:
    """Return the sum that the wallet signed after the opening: what the seller may take."""
    record = purse.wallet.read(purse.wallet.names()[0])
    return record.funding_sat - record.left_sat - 10_000


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["", "", "before", "after"]), st.booleans()), max_size=12
    )
)
@SLOW
def test_losses_cost_nothing(world: World, steps: list[tuple[str, Any, bool]]) -> None:
    """Whichever answers are lost and however often the program restarts: each delivery is paid once, and no sum is left.

    A request is repeated until it has its answer, as programs do; requests of other paths come in between.
    """
    purse = Purse(Budget(total=10_000), wallet := world.anew())
    delivered: Counter[str] = Counter()
    for path, drop, restarts in (*steps, *((path, "", True) for path in "abc")):
        purse = Purse(Budget(total=10_000), wallet) if restarts else purse
        if drop:
            world.seller.lies.append(Lie(drop=drop))
        try:
            assert world.get(purse, path) == 200
            delivered[path] += 1
        except ConnectionError:
            pass

    total_sat = 25 * delivered.total()
    assert signed_sat(purse) == world.seller.signed_sat == total_sat
    assert world.seller.channel.spent_sat - 10_000 == total_sat
    assert purse.log.account().total_sat == total_sat
    assert not purse.log.account().open


LIES = st.one_of(
    st.none(),
    st.sampled_from(["before", "after"]).map(lambda drop: Lie(drop=drop)),
    st.just(Lie(refuse=True)),
    st.just(Lie(release=True)),
    st.sampled_from([200, 404, 500]).map(lambda status: Lie(status=status)),
    st.integers(0, 100_000).map(lambda sat: Lie(credit_sat=sat)),
    st.tuples(st.sampled_from(["newest", "older", "unsigned"]), st.integers(0, 11_000)),
)


@given(steps=st.lists(st.tuples(st.sampled_from("ab"), LIES, st.booleans(), st.integers(1, 60)), max_size=14))
@SLOW
def test_no_lie_gets_more_than_the_budget_counts(world: World, steps: list[tuple[str, Any, bool, int]]) -> None:
    """Whatever the seller answers and charges, the wallet signs no more than the log counts, and that is in the budget."""
    budget = Budget(per_request=50, total=150)
    purse = Purse(budget, wallet := world.anew())
    seller, first = world.seller, purse.wallet.read(purse.wallet.names()[0])
    for path, lie, restarts, price_sat in steps:
        purse, seller.price_sat = Purse(budget, wallet) if restarts else purse, price_sat
        before_sat = signed_sat(purse)
        seller.lies.append(_state_lie(purse, seller, first, *lie) if isinstance(lie, tuple) else lie)
        with suppress(ConnectionError, errors.StillUnpaid, errors.FalseProof, errors.OverBudget):
            world.get(purse, path)
        seller.lies.clear()
        assert signed_sat(purse) - before_sat <= min(price_sat, 50)
        assert signed_sat(purse) <= purse.log.account().total_sat <= 150
        assert world.seller.signed_sat <= signed_sat(purse)


def _state_lie(purse: Purse, seller: Seller, first: Any, proof: str, spent_sat: int) -> Lie:
    """Return a correction by a payment that the wallet signed, earlier or last, or by one that it never signed."""
    record = purse.wallet.read(first.name)
    newest = {"newest": record.sign(record.left_sat), "older": first.sign(first.left_sat)}.get(proof)
    if newest is None:
        other = record.sign(Sat(record.left_sat - 1))
        newest = type(other)(Sat(record.left_sat - 500), other.signature, other.flag)
    accepted_sat = record.funding_sat - newest.change_sat
    return Lie(state=seller.state(newest, spent_sat=Sat(min(spent_sat, accepted_sat)), carried_sat=Sat(0)))


PROGRAM = """
import sys
from paychan.client import Budget, Purse, paid_client

url, wallet, number = sys.argv[1:]
with paid_client(Purse(Budget(total=10_000), wallet)) as client:
    client.get(url + "free")
    print("ready", flush=True)
    sys.stdin.readline()
    print([client.get(url + f"{number}-{each}").status_code for each in range(15)])
"""


def test_programs_share_a_channel(world: World) -> None:
    """Three programs that pay over one channel at the same time take turns: each request is paid once, none is refused."""
    wallet = world.anew()
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, world.seller.url, str(wallet), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for program in programs:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        assert program.stdin is not None
        program.stdin.write("go\n")
        program.stdin.flush()
    answers = [program.communicate(timeout=100)[0] for program in programs]

    assert answers == [f"{[200] * 15}\n"] * 3
    assert len(set(world.seller.paid)) == len(world.seller.paid) == 45
    assert world.seller.signed_sat == 45 * 25
    changes = [line.change_sat for line in SpendingLog(wallet).lines() if isinstance(line, Paid)]
    assert changes == sorted(set(changes), reverse=True), "no change value was signed twice"


KILLED = """
import os, sys
from paychan.client import Budget, Purse, paid_client
from paychan.client.paying import exchange, spending
from paychan.client.wallet import ChannelFile

url, wallet, place = sys.argv[1:]
module, name = {
    "spend": (spending.SpendingLog, "spend"), "save": (ChannelFile, "save"), "book": (exchange.Purse, "book"),
}[place.partition(" ")[2]]
real = getattr(module, name)

def dies(*args, **options):
    if place.startswith("after"):
        real(*args, **options)
    os._exit(9)

setattr(module, name, dies)
with paid_client(Purse(Budget(total=10_000), wallet)) as client:
    client.get(url + "tile")
"""


@pytest.mark.parametrize(
    "place", [f"{when} {step}" for step in ("spend", "save", "book") for when in ("before", "after")]
)
def test_a_program_that_is_killed_pays_once(world: World, place: str) -> None:
    """Wherever a program ends, the next one gets the answer for one price in all."""
    wallet = world.anew()
    program = subprocess.run(
        [sys.executable, "-c", KILLED, world.seller.url, str(wallet), place], timeout=60, check=False
    )
    assert program.returncode == 9

    purse = Purse(Budget(total=10_000), wallet)
    assert world.get(purse, "tile") == 200
    assert signed_sat(purse) == world.seller.signed_sat == (50 if place == "after book" else 25)
    assert world.get(purse, "other") == 200
    assert world.seller.signed_sat == signed_sat(purse) == (75 if place == "after book" else 50)
    assert world.seller.channel.credit_sat == 0
