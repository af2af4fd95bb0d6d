"""Budget and spending log: limits hold for all histories, programs and crashes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paychan.client import errors
from paychan.client.files import write_private
from paychan.client.paying.account import DAY_SECONDS, Answered, Corrected, Declination, Paid, Unpaid
from paychan.client.paying.budget import Budget, Sums, host_of
from paychan.client.paying.spending import FULL_BYTES, SpendingLog
from paychan.client.paying.walletbudget import WalletBudget, write_wallet_budget

HOSTS = ("a.example:443", "b.example:443", "b.example:8443")
CHANNEL = "ab" * 32 + ":0"
NOON = 1_800_000_000


def paid(
    price_sat: int = 25, *, host: str = HOSTS[0], at: int = NOON, request: str = "r", counted_sat: int = -1
) -> Paid:
    return Paid(
        request=request,
        key=f"key of {request}",
        at=at,
        host=host,
        method="GET",
        url=f"https://{host}/",
        channel=CHANNEL,
        price_sat=price_sat,
        change_sat=1_000,
        counted_sat=price_sat if counted_sat < 0 else counted_sat,
    )


@pytest.mark.parametrize(
    ("limit", "spent"),
    [
        ("per_request", Sums()),
        ("per_host", Sums(host_sat=76)),
        ("per_day", Sums(day_sat=76)),
        ("total", Sums(total_sat=76)),
    ],
)
def test_each_limit_is_met_exactly(limit: str, spent: Sums) -> None:
    """A price that reaches a limit is allowed, and one satoshi more is not; the refusal names the limit."""
    limit_sat = 24 if limit == "per_request" else 100
    budget = Budget(**{limit: limit_sat})

    problem = budget.problem(HOSTS[0], 25, spent)

    assert budget.problem(HOSTS[0], 24, spent) is None
    assert isinstance(problem, errors.OverBudget)
    assert problem.fields["limit"] == limit
    assert problem.fields["limit_sat"] == limit_sat


def test_a_budget_needs_a_limit() -> None:
    """A budget that would allow everything is a mistake of the program."""
    with pytest.raises(ValueError, match="per_request"):
        Budget(hosts=["a.example"])


@pytest.mark.parametrize("limit", [-1, 1.5, True, "10"])
def test_a_limit_is_a_whole_number_of_satoshi(limit: object) -> None:
    """No other value becomes a limit."""
    with pytest.raises((errors.WrongNumber, errors.TermsUnacceptable)):
        Budget(total=limit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "allowed", "refused"),
    [
        ("a.example", ["a.example:443", "a.example:80"], ["a.example:8443", "b.a.example:443", "a.example.evil:443"]),
        ("A.Example.:8443", ["a.example:8443"], ["a.example:443"]),
        ("[::1]:8000", ["[::1]:8000"], ["[::1]:80", "[::2]:8000"]),
        ("::1", ["[::1]:80", "[::1]:443"], ["[::1]:8000"]),
    ],
)
def test_hosts_are_compared_whole(entry: str, allowed: list[str], refused: list[str]) -> None:
    """An entry allows its host and port, and no name that only looks like it."""
    budget = Budget(total=100, hosts=[entry])

    assert [budget.problem(host, 1, Sums()) for host in allowed] == [None] * len(allowed)
    assert all(isinstance(budget.problem(host, 1, Sums()), errors.HostNotAllowed) for host in refused)


@pytest.mark.parametrize("entry", ["https://a.example", "a.example/x", "user@a.example", " "])
def test_an_entry_of_hosts_that_is_no_host_is_refused(entry: str) -> None:
    """A URL among the hosts would allow nothing, so the program hears of it."""
    with pytest.raises(ValueError, match="want host"):
        Budget(total=1, hosts=[entry])


def test_host_of_a_url_has_its_port() -> None:
    """The same host on two ports is two hosts."""
    assert host_of("https", "A.example.", None) == "a.example:443"
    assert host_of("http", "a.example", 8080) == "a.example:8080"
    assert host_of("http", "::1", None) == "[::1]:80"


def test_approve_is_asked_above_its_threshold() -> None:
    """A question is asked for a price above `approve_above`, and never without `approve`."""
    budget = Budget(total=100, approve=lambda _: True, approve_above=10)

    assert (budget.asks(10), budget.asks(11)) == (False, True)
    assert not Budget(total=100).asks(99)


@given(
    limits=st.fixed_dictionaries(
        {name: st.integers(0, 300) for name in ("per_request", "per_host", "per_day", "total")}
    ),
    tries=st.lists(
        st.tuples(st.integers(0, 120), st.sampled_from(HOSTS), st.integers(0, 3), st.booleans()), max_size=25
    ),
    full_bytes=st.sampled_from([1, 900, FULL_BYTES]),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_history_exceeds_a_limit(
    tmp_path_factory: pytest.TempPathFactory,
    limits: dict[str, int],
    tries: list[tuple[int, str, int, bool]],
    full_bytes: int,
) -> None:
    """For all payments, restarts and sizes of a file of the log, each limit holds and each refusal is logged."""
    directory = tmp_path_factory.mktemp("wallet")
    budget, log, now = Budget(**limits), SpendingLog(directory, full_bytes=full_bytes), NOON
    allowed: list[Paid] = []
    for number, (price_sat, host, days, restarts) in enumerate(tries):
        now += days * DAY_SECONDS // 2
        payment = paid(price_sat, host=host, at=now, request=f"{number}")
        if log.spend(budget, payment) is None:
            allowed.append(payment)
            log.note(Answered(f"{number}", now, 200, CHANNEL, spent_sat=0, charged_sat=0))
        log = SpendingLog(directory, full_bytes=full_bytes) if restarts else log

    by_day = {each.at // DAY_SECONDS: 0 for each in allowed}
    for each in allowed:
        by_day[each.at // DAY_SECONDS] += each.price_sat
    assert all(each.price_sat <= limits["per_request"] for each in allowed)
    assert all(sum(each.price_sat for each in allowed if each.host == host) <= limits["per_host"] for host in HOSTS)
    assert all(sum_sat <= limits["per_day"] for sum_sat in by_day.values())
    assert sum(each.price_sat for each in allowed) <= limits["total"]
    assert sum(isinstance(line, Declination) for line in log.lines()) == len(tries) - len(allowed)


def test_no_answer_lowers_a_sum(tmp_path: Path) -> None:
    """Answers that charge nothing, refusals of servers and corrections leave the budget as it was."""
    log, budget = SpendingLog(tmp_path), Budget(total=50)
    assert log.spend(budget, paid(25)) is None
    before = log.account().sums(HOSTS[0], NOON)
    for line in (
        Unpaid("r", NOON, "charged_nothing", "sorry"),
        Corrected(CHANNEL, NOON, spent_sat=-25),
        Answered("r", NOON, 502, CHANNEL, spent_sat=-25, charged_sat=-25),
    ):
        log.note(line)

    assert log.account().sums(HOSTS[0], NOON) == before == Sums(25, 25, 25)


def test_a_clock_that_goes_back_opens_no_day_again(tmp_path: Path) -> None:
    """A payment of tomorrow, by a clock that was fast, counts today."""
    log, budget = SpendingLog(tmp_path), Budget(per_day=25)

    assert log.spend(budget, paid(25, at=NOON + DAY_SECONDS)) is None
    assert isinstance(log.spend(budget, paid(1, at=NOON, request="s")), errors.OverBudget)
    assert log.spend(budget, paid(25, at=NOON + 2 * DAY_SECONDS, request="t")) is None


def test_each_torn_tail_is_cut_off(tmp_path: Path) -> None:
    """However much of the last line a crash leaves, the payments before it count, and the log goes on."""
    log, budget = SpendingLog(tmp_path), Budget(total=1000)
    for number in range(2):
        assert log.spend(budget, paid(10, request=f"{number}")) is None
    whole = log.path.read_bytes()
    ends = [0, *(index + 1 for index, byte in enumerate(whole) if byte == 10)]
    near_ends = {end + step for end in ends for step in (-2, -1, 0, 1, 2)}
    for length in sorted({*range(0, len(whole), 29), *near_ends} & {*range(len(whole) + 1)}):
        log.path.write_bytes(whole[:length])
        again = SpendingLog(tmp_path)
        lines = sum(1 for end in ends[1:] if end <= length)
        assert again.account().total_sat == 10 * lines
        assert again.spend(budget, paid(7, request="next")) is None
        assert SpendingLog(tmp_path).account().total_sat == 10 * lines + 7
    log.path.write_bytes(whole + b"\0" * 300)  # a file system may give the size before the content
    assert SpendingLog(tmp_path).account().total_sat == 20


def test_a_damaged_line_stops_all_paying(tmp_path: Path) -> None:
    """A line that a crash can't have torn says how much was spent, so nothing is paid without it."""
    log, budget = SpendingLog(tmp_path), Budget(total=1000)
    for number in range(3):
        assert log.spend(budget, paid(10, request=f"{number}")) is None
    raw = bytearray(log.path.read_bytes())
    raw[raw.index(b'"price_sat":10') + 12] ^= 1
    log.path.write_bytes(raw)

    with pytest.raises(errors.DamagedFile, match="byte 0"):
        SpendingLog(tmp_path).spend(budget, paid(1, request="next"))


def test_a_full_file_is_followed_by_the_next(tmp_path: Path) -> None:
    """Sums, open requests and expected charges go on; a crash between the names of the files loses and doubles nothing."""
    now = int(time.time())
    log, budget = SpendingLog(tmp_path, full_bytes=10**9), Budget(total=1000)
    for name in ("one", "two", "three"):
        assert log.spend(budget, paid(10, request=name, at=now)) is None
    log.note(Answered("two", now, 200, CHANNEL, spent_sat=10, charged_sat=10))
    log.note(Unpaid("three", now, "busy", "busy"))
    before = log.account()
    os.link(log.path, tmp_path / "spending-1.log")  # here a crash came
    assert len(list(log.lines())) == 5
    full = SpendingLog(tmp_path, full_bytes=1)
    full.account()
    after = SpendingLog(tmp_path).account()

    for name in ("total_sat", "by_host", "by_day", "open", "unpaid", "spent", "signed", "declined"):
        assert getattr(after, name) == getattr(before, name), name
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["spending-1.log", "spending.log"]
    assert len(list(log.lines())) == 6
    assert isinstance(log.spend(budget, paid(971, request="four", at=now)), errors.OverBudget)
    log.note(Answered("one", now, 200, CHANNEL, spent_sat=20, charged_sat=10))
    assert set(SpendingLog(tmp_path).account().open) == {"key of three"}


def test_a_log_that_others_may_read_is_refused(tmp_path: Path) -> None:
    """The log names what its owner bought."""
    log = SpendingLog(tmp_path)
    log.account()
    log.path.chmod(0o644)

    with pytest.raises(errors.LooseMode):
        log.account()


def test_a_restored_log_is_read_anew(tmp_path: Path) -> None:
    """A file that replaces the log counts alone, also if it is longer."""
    log, budget = SpendingLog(tmp_path / "one"), Budget(total=1000)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert log.spend(budget, paid(10)) is None
    other = SpendingLog(tmp_path / "two")
    for number in range(3):
        assert other.spend(budget, paid(100, request=f"{number}")) is None
    other.path.replace(log.path)

    assert log.account().total_sat == 300


def test_open_requests_are_the_newest_without_an_answer(tmp_path: Path) -> None:
    """A 402 leaves a request open; an answer closes it, and only it."""
    log, budget = SpendingLog(tmp_path), Budget(total=1000)
    for name in ("one", "two", "three"):
        assert log.spend(budget, paid(10, request=name)) is None
    log.note(Unpaid("one", NOON, "busy", "busy"))
    log.note(Answered("two", NOON, 200, CHANNEL, spent_sat=10, charged_sat=10))
    log.note(Answered("two", NOON, 200, CHANNEL, spent_sat=10, charged_sat=10))

    assert set(SpendingLog(tmp_path).account().open) == {"key of one", "key of three"}
    assert log.account().spent == {CHANNEL: 10}


SPENDER = """
import sys
from pathlib import Path
from paychan.client.paying.budget import Budget
from paychan.client.paying.spending import SpendingLog
from tests.client.paying.test_budget import paid

log, budget = SpendingLog(Path(sys.argv[1]), full_bytes=2000), Budget(total=100)
print("ready", flush=True)
sys.stdin.readline()
print(sum(log.spend(budget, paid(3, request=f"{sys.argv[2]}-{number}")) is None for number in range(40)))
"""


def test_several_programs_share_one_limit(tmp_path: Path) -> None:
    """Three programs that spend at the same time spend the total exactly once."""
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", SPENDER, str(tmp_path), str(number)],
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
    allowed = [int(program.communicate(timeout=60)[0]) for program in programs]

    assert sum(allowed) == 33
    assert SpendingLog(tmp_path).account().total_sat == 99
    times = [line.request for line in SpendingLog(tmp_path).lines() if isinstance(line, Paid)]
    assert len(set(times)) == 33
    assert any(one[0] != other[0] for one, other in pairwise(times)), "the programs took turns"


def test_a_lock_that_is_never_given_back_ends_the_wait(tmp_path: Path) -> None:
    """The error names the file and the time."""
    log = SpendingLog(tmp_path, wait_seconds=0.05)
    with (
        SpendingLog(tmp_path)._locked(),
        pytest.raises(errors.LogInUse, match=r"spending\.log is in use .* 0\.05 s"),
    ):
        log.account()


# --- the wallet's own limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"per_request": 24}, "wallet_per_request"),
        ({"per_host": 24}, "wallet_per_host"),
        ({"per_day": 24}, "wallet_per_day"),
        ({"total": 24}, "wallet_total"),
    ],
)
def test_limits_of_the_wallet_hold_beside_those_of_the_program(
    tmp_path: Path, limits: dict[str, int], code: str
) -> None:
    """A program with a wider budget is refused by the wallet's limit, and one with a narrower one by its own."""
    write_wallet_budget(tmp_path, WalletBudget(**limits))
    log = SpendingLog(tmp_path)

    problem = log.problem(Budget(total=1000), HOSTS[0], 25, NOON)
    own = log.problem(Budget(total=3), HOSTS[0], 25, NOON)

    assert isinstance(problem, errors.OverBudget)
    assert (problem.fields["limit"], problem.fields["left_sat"]) == (code, 24)
    assert isinstance(own, errors.OverBudget)
    assert own.fields["limit"] == "total"
    assert log.problem(Budget(total=1000), HOSTS[0], 24, NOON) is None


def test_hosts_alone_are_a_limit_of_the_wallet(tmp_path: Path) -> None:
    """A wallet may allow hosts without an amount."""
    write_wallet_budget(tmp_path, WalletBudget(hosts=("other.example",)))

    assert isinstance(SpendingLog(tmp_path).problem(Budget(total=9), HOSTS[0], 1, NOON), errors.HostNotAllowed)


@pytest.mark.parametrize("raw", [b"{", b'{"per_day": -1}', b'{"per_day": 1.5}', b'{"hosts": ["a/b"]}', b'{"new": 1}'])
def test_limits_that_cannot_be_read_stop_all_paying(tmp_path: Path, raw: bytes) -> None:
    """No damaged file opens the wallet."""
    write_private(tmp_path / "budget", raw)

    with pytest.raises((errors.DamagedFile, errors.LaterFile)):
        SpendingLog(tmp_path).problem(Budget(total=9), HOSTS[0], 1, NOON)


# --- backups ----------------------------------------------------------------------------------------------------------


def test_a_restored_account_keeps_the_larger_sums(tmp_path: Path) -> None:
    """Sums of the backup come back, sums of the wallet that are larger stay, and a second restore changes nothing."""
    old, mine = SpendingLog(tmp_path), SpendingLog(_private(tmp_path / "mine"))
    old.spend(Budget(total=1000), paid(100, host=HOSTS[0], request="a"))
    mine.spend(Budget(total=1000), paid(30, host=HOSTS[0], request="b"))
    mine.spend(Budget(total=1000), paid(20, host=HOSTS[1], request="c"))
    saved = old.account().carried(NOON)

    mine.take_over(saved)
    size = mine.path.stat().st_size
    mine.take_over(saved)
    account = SpendingLog(tmp_path / "mine").account()

    assert mine.path.stat().st_size == size
    assert account.total_sat == 100
    assert account.by_host == {HOSTS[0]: 100, HOSTS[1]: 20}
    assert sorted(account.open) == ["key of b", "key of c"]
    fresh = SpendingLog(_private(tmp_path / "fresh"))
    fresh.take_over(saved)
    assert (fresh.account().total_sat, sorted(fresh.account().open)) == (100, sorted(old.account().open))


def _private(directory: Path) -> Path:
    directory.mkdir(mode=0o700)
    return directory
