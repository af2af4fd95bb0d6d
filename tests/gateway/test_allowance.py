"""The free allowance of each client address."""

from __future__ import annotations

from paychan.gateway.allowance import Allowance
from paychan.gateway.pricefile import FreeAllowance


def test_the_first_requests_of_an_address_are_free() -> None:
    """Each address has its own count; after `hours` it begins anew."""
    allowance = Allowance(FreeAllowance(requests=2, hours=1))

    assert [allowance.takes("192.0.2.1", 0) for _ in range(3)] == [True, True, False]
    assert allowance.takes("192.0.2.2", 0)
    assert not allowance.takes("192.0.2.1", 3599)
    assert allowance.takes("192.0.2.1", 3600)


def test_the_first_seconds_of_an_address_are_free() -> None:
    """The time runs from the address's first request."""
    allowance = Allowance(FreeAllowance(seconds=10, hours=1))

    assert [allowance.takes("192.0.2.1", time) for time in (100, 109.9, 110, 3699, 3700)] == [
        True, True, False, False, True,
    ]  # fmt: skip


def test_without_an_allowance_no_address_is_remembered() -> None:
    """Strangers cost no memory where the seller gives nothing."""
    allowance = Allowance(FreeAllowance())

    assert not allowance.exists
    assert not allowance.takes("192.0.2.1", 0)
    assert allowance._used == {}


def test_a_flood_of_addresses_wins_nothing() -> None:
    """A full table gives further addresses nothing, and forgets no address whose time has not passed."""
    allowance = Allowance(FreeAllowance(requests=1, hours=1, addresses=3))
    given = [allowance.takes(f"192.0.2.{number}", number) for number in range(10)]

    assert given == [True] * 3 + [False] * 7
    assert not allowance.takes("192.0.2.0", 10)
    assert len(allowance._used) == 3
    assert allowance.takes("192.0.2.9", 3600)


def test_a_host_with_a_network_of_ipv6_is_one_address() -> None:
    """Addresses of one /64 count together; an IPv4 address in IPv6 form is that IPv4 address."""
    allowance = Allowance(FreeAllowance(requests=1))

    assert allowance.takes("2001:db8::1", 0)
    assert not allowance.takes("2001:db8::ffff:2%eth0", 0)
    assert allowance.takes("2001:db8:0:1::1", 0)
    assert allowance.takes("192.0.2.1", 0)
    assert not allowance.takes("::ffff:192.0.2.1", 0)


def test_a_count_is_given_back() -> None:
    """A free request without an answer does not count, and nothing falls below zero."""
    allowance = Allowance(FreeAllowance(requests=1))
    allowance.give_back("192.0.2.1")
    allowance.takes("192.0.2.1", 0)
    allowance.give_back("192.0.2.1")
    allowance.give_back("192.0.2.1")

    assert [allowance.takes("192.0.2.1", 0) for _ in range(2)] == [True, False]
