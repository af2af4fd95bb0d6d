"""Channels, payments and settlements for tests: really signed, by keys that follow from a seed.

`Payer("any text")` is the client of one channel with fixed terms. The functions move a channel through the real state
machine, so a test never holds a record that the server could not have written.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

import msgspec
from coincurve import PrivateKey
from msgspec import Struct

from paychan.protocol.address import hash160, key_script, p2sh_script, witness_script
from paychan.protocol.channel import (
    Accepted,
    Channel,
    Close,
    CloseReason,
    Command,
    Confirmed,
    Found,
    Opening,
    Outcome,
    Pay,
    Published,
    Rules,
    Signed,
    SpentElsewhere,
    State,
    Unfunded,
    View,
)
from paychan.protocol.expiry import Expiry
from paychan.protocol.fees import Shortfall, plan_closing
from paychan.protocol.finding import read_claim
from paychan.protocol.kinds.base import ChannelTerms, make_terms
from paychan.protocol.opening import open_channel
from paychan.protocol.payment import Payment, sign_payment
from paychan.protocol.settlement import Settlement, sign_settlement
from paychan.protocol.state_machine import apply, close
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.rbpcp import opening_secret

NOW = UnixTime(1_500_000_000)
DAY_SECONDS = 86_400
RULES = Rules(
    dust_sat=Sat(546),
    min_confirmations=1,
    settlement_period_seconds=DAY_SECONDS,
    min_duration_seconds=3_600,
    fee_sat_per_vb=10,
)
VIEW = View(NOW, RULES)


@lru_cache(maxsize=1024)
def private_key(seed: str) -> PrivateKey:
    """Derive a key from a text. The newest ones are kept: one channel of a test asks a dozen times."""
    return PrivateKey(sha256(seed.encode()).digest())


SERVER_DESTINATION = key_script(private_key("server destination").public_key.format())
"""Destination of the settlements built here (P2PKH)."""


def scripts_of(public_key: bytes) -> dict[str, bytes]:
    """A script of each type that change may be paid to; the first is that of the key."""
    return {
        "p2pkh": key_script(public_key),
        "p2sh": p2sh_script(public_key),
        "p2wpkh": witness_script(0, hash160(public_key)),
        "p2wsh": witness_script(0, sha256(public_key).digest()),
        "p2tr": witness_script(1, public_key[1:]),
    }


class Payer(Struct, frozen=True):
    """The client of one channel, and for tests also its server key.

    A `movable` client is a v2 client whose change funds the channel again; `at` is the output that the channel moved
    to.
    """

    seed: str
    expiry: UnixTime = UnixTime(NOW + 30 * DAY_SECONDS)
    funding_sat: Sat = Sat(1_000_000)
    movable: bool = False
    at: OutPoint | None = None

    @property
    def key(self) -> PrivateKey:
        return private_key(f"client {self.seed}")

    @property
    def server_key(self) -> PrivateKey:
        return private_key(f"server {self.seed}")

    @property
    def terms(self) -> ChannelTerms:
        return make_terms(self.server_key.public_key.format(), self.key.public_key.format(), self.expiry)

    @property
    def outpoint(self) -> OutPoint:
        return self.at or OutPoint(sha256(f"funding {self.seed}".encode()).digest(), len(self.seed) % 3)

    @property
    def change_script(self) -> bytes:
        return self.terms.funding_script if self.movable else key_script(self.key.public_key.format())

    def payment(self, change_sat: int) -> Payment:
        """Sign the payment that leaves `change_sat` to the client."""
        return sign_payment(self.key, self.terms, self.outpoint, self.funding_sat, self.change_script, Sat(change_sat))

    def opening(self, paid_sat: int = 10_000) -> Opening:
        """Build the request that opens the channel with a first payment of `paid_sat`."""
        payment = self.payment(self.funding_sat - paid_sat)
        return Opening(
            terms=self.terms,
            outpoint=self.outpoint,
            funding_sat=self.funding_sat,
            confirmations=RULES.min_confirmations,
            change_script=self.change_script,
            payment=payment,
            price_sat=Sat(0),
            secret=opening_secret(payment) if self.movable else b"",
        )

    def channel(self, paid_sat: int = 10_000) -> Channel:
        """Return the channel as opened (seq 1)."""
        return accepted(open_channel(self.opening(paid_sat), VIEW))

    def pay(self, channel: Channel, paid_sat: int = 1) -> Channel:
        """Return the channel after one more payment."""
        payment = self.payment(channel.payment.change_sat - paid_sat)
        return accepted(apply(channel, Pay(payment), VIEW))

    def settlement(self, channel: Channel, rate_sat_per_vb: int | None = None) -> Settlement:
        """Return the settlement of a closing channel, as the signer would build it."""
        fee_sat = plan_closing([channel], SERVER_DESTINATION, RULES, rate_sat_per_vb)
        assert not isinstance(fee_sat, Shortfall)
        return sign_settlement(
            [channel.claim], SERVER_DESTINATION, fee_sat, lambda _, digest: self.server_key.sign(digest, hasher=None)
        )

    def history(
        self, state: State, paid_sat: int = 10_000, reason: CloseReason = CloseReason.OPERATOR
    ) -> list[Channel]:
        """Return every version of a channel from its opening to a state; one command leads from each to the next."""
        versions = [self.channel(paid_sat)]
        if state is State.OPEN:
            return versions
        if state is State.UNFUNDED:
            return [*versions, step(versions[-1], Unfunded())]
        if state is State.LOST:
            return [*versions, step(versions[-1], SpentElsewhere(sha256(self.seed.encode()).digest()))]
        versions.append(
            withdrawn(versions[-1]) if reason is CloseReason.WITHDRAW else step(versions[-1], Close(reason))
        )
        versions.append(step(versions[-1], Signed(self.settlement(versions[-1]))))
        later: dict[State, list[Command]] = {
            State.CLOSING: [],
            State.PUBLISHED: [Published()],
            State.CLOSED: [Published(), confirmed(versions[-1])],
        }
        for command in later[state]:
            versions.append(step(versions[-1], command))
        return versions


def accepted(outcome: Outcome) -> Channel:
    """Return the channel of an outcome, which must not be a refusal."""
    assert isinstance(outcome, Accepted), outcome
    return outcome.channel


def confirmed(channel: Channel) -> Confirmed:
    """Build the command: the newest settlement of a channel is deep in the chain."""
    assert channel.closing is not None
    assert channel.closing.settlement is not None
    return Confirmed(channel.closing.settlement.txid)


def found_by(payer: Payer, paid: Channel, *, deep: bool = False) -> Found:
    """Build the command: the chain shows another settlement than the record's, and the operator closes the channel."""
    settlement = payer.settlement(step(paid, Close(CloseReason.OPERATOR)))
    claim = read_claim(paid, settlement.transaction)
    assert claim is not None
    return Found(claim, settlement, deep)


def step(channel: Channel, command: Command) -> Channel:
    """Return the channel after a command, which must be accepted."""
    return accepted(apply(channel, command, VIEW))


def withdrawn(channel: Channel) -> Channel:
    """Return a channel with a withdrawal under way; it may be of the opening payment, as earlier servers allowed."""
    closing = accepted(close(channel, CloseReason.WITHDRAW, VIEW))
    return msgspec.structs.replace(closing, seq=channel.seq + 1)


def many(count: int, template: Channel | None = None) -> list[Channel]:
    """Return many open channels for volume.

    They differ only in outpoint and expiry, so their signatures do not verify.
    """
    channel = template or Payer("many").channel()
    return [
        msgspec.structs.replace(
            channel,
            outpoint=OutPoint(sha256(number.to_bytes(8, "big")).digest(), 0),
            terms=msgspec.structs.replace(
                channel.terms, expiry=Expiry(channel.terms.expiry.lock_time + number % 1_000)
            ),
        )
        for number in range(count)
    ]
