"""The rate limit per client address for terms and openings (faults 33 and 65)."""

from __future__ import annotations

import pytest

from paychan.api.budgets.request_rates import BURST_SECONDS, MOST_ADDRESSES, RequestRates


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_fault_33_an_address_has_a_burst_and_then_a_rate() -> None:
    """An address may send the requests of ten seconds at once, then at the rate.

    After the returned wait one is allowed.
    """
    clock = Clock()
    rates = RequestRates(2, clock)
    assert [rates.wait_seconds("192.0.2.1") for _ in range(2 * BURST_SECONDS)] == [0] * 20
    assert rates.wait_seconds("192.0.2.1") == 1
    assert rates.wait_seconds("192.0.2.2") == 0
    clock.now += 1
    assert [rates.wait_seconds("192.0.2.1") for _ in range(3)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("first", "second", "one"),
    [
        ("2001:db8::1", "2001:db8:0:0:ffff::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("", "", True),
    ],
)
def test_fault_33_an_ipv6_client_is_its_network(first: str, second: str, *, one: bool) -> None:
    """All addresses of a /64 share a bucket; both forms of an IPv4 address are one address."""
    rates = RequestRates(1, Clock())
    for _ in range(BURST_SECONDS):
        rates.wait_seconds(first)
    assert bool(rates.wait_seconds(second)) == one


def test_fault_33_the_table_of_addresses_is_bounded() -> None:
    """More addresses than the table has entries do not make it larger."""
    rates = RequestRates(1, Clock())
    for number in range(MOST_ADDRESSES + 500):
        rates.wait_seconds(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(rates._buckets) == MOST_ADDRESSES


def test_fault_33_no_limit_means_none() -> None:
    """With a rate of 0 no request is counted."""
    rates = RequestRates(0, Clock())
    assert not any(rates.wait_seconds("192.0.2.1") for _ in range(10_000))
    assert not rates._buckets
