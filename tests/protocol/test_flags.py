"""Flag and change value must fit each other before a digest is computed (RBPCP §3, threats 8, 13, 14 and 15)."""

from __future__ import annotations

from paychan.protocol.channel import Pay, Rejected
from paychan.protocol.errors import BadFlag, DustChange, FlagMismatch, PaychanError
from paychan.protocol.kinds.p2sh import P2SH
from paychan.protocol.payment import Payment, change_problem
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Sat
from tests.lib.channels import VIEW, Payer
from tests.lib.looped import looped

DUST = Sat(700)
SINGLE, NONE = 0x83, 0x82


def problem(flag: int, change: int) -> PaychanError | None:
    """The refusal of a flag with a change value, or None."""
    return change_problem(Payment(Sat(change), b"\x30" + bytes(7), flag), P2SH, DUST)


@looped("flag", range(256))
def test_threat_14_two_flags_of_256(flag: int) -> None:
    """Only 0x83 with change and 0x82 without change are accepted; the other 254 bytes are always refused."""
    with_change, drained = problem(flag, 100_000), problem(flag, 0)

    if flag == SINGLE:
        assert (with_change, type(drained)) == (None, FlagMismatch)
    elif flag == NONE:
        assert (type(with_change), drained) == (FlagMismatch, None)
    else:
        assert with_change == drained == BadFlag(got=flag)


@looped("flag", [flag for flag in range(256) if flag != SINGLE])
def test_threat_14_a_correctly_signed_payment_under_another_flag_is_refused(flag: int) -> None:
    """A valid signature with any of the other 255 flag bytes is refused."""
    payer = Payer("flags")
    channel = payer.channel()
    good = payer.payment(channel.payment.change_sat - 1)

    outcome = apply(channel, Pay(Payment(good.change_sat, good.signature, flag)), VIEW)

    assert isinstance(outcome, Rejected)
    assert isinstance(outcome.error, FlagMismatch if flag == NONE else BadFlag)


@looped(
    ("change", "want"),
    [
        (0, FlagMismatch(flag=SINGLE, change_sat=0)),
        (1, DustChange(got_sat=1, need_sat=DUST)),
        (DUST - 1, DustChange(got_sat=DUST - 1, need_sat=DUST)),
        (DUST, None),
        (DUST + 1, None),
    ],
)
def test_threat_13_dust_boundary(change: int, want: PaychanError | None) -> None:
    """Change is 0 or at least the dust limit; one satoshi less is refused with both numbers."""
    assert problem(SINGLE, change) == want


@looped("change", [1, 499, DUST - 1, DUST, 10**9])
def test_giving_all_up_with_change_left_is_refused(change: int) -> None:
    """0x82 binds no output, so the rest of the client's money would become fee."""
    assert problem(NONE, change) == FlagMismatch(flag=NONE, change_sat=change)


def test_threat_15_single_without_its_output_never_reaches_the_sighash() -> None:
    """SINGLE without change hashes to the constant 1: the flag rule refuses a real signature over that constant."""
    payer = Payer("constant one")
    constant = (1).to_bytes(32, "little")
    signature = payer.key.sign(constant, hasher=None)

    outcome = apply(payer.channel(), Pay(Payment(Sat(0), signature, SINGLE)), VIEW)

    assert outcome == Rejected(FlagMismatch(flag=SINGLE, change_sat=0))
