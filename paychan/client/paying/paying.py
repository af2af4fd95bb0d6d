"""Decisions of a payer about a request that has a price: channel, change value, and the meaning of the answer. It is pure.

    credit  = signed sum - expected charges - prices of other requests whose answers were lost
    raise   = price - credit, at least 0: the signed sum grows by it, once for each request

A request is paid at most its price: in all its tries together the signed sum grows by no more, so a server that answers 402
again and again gains nothing. A try after a lost answer signs the same change value again.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

import msgspec
from msgspec import Struct

from paychan.client.errors import Declined, FalseProof, InsufficientFunds, NoChannel, WouldLeaveDust
from paychan.client.flows.find import room_sat, same_server
from paychan.client.limits import HOUR
from paychan.client.paying.account import Account, Paid
from paychan.client.paying.demands import Demand
from paychan.client.paying.errors import IdentityChanged
from paychan.client.record import ChannelRecord, State
from paychan.protocol.address import decode_address
from paychan.protocol.payment import PaymentVerifier
from paychan.protocol.types import Sat
from paychan.protocol.wire.offers import ChannelState, Offer, Settled, Voucher, address_network

SPARE_SECONDS = 60
"""Least time before the settlement period for which a channel must still take payments."""

RESERVED_SECONDS = 3600
"""Time for which the price of a request without an answer is held back from the credit.

A request that a server refused, although it was paid, is paid anew only if the program leaves it alone for this time.
"""

_ENDED = (
    "unknown_channel",
    "channel_not_found",
    "channel_closing",
    "channel_closed",
    "channel_lost",
    "channel_moved",
    "channel_expiring",
)
"""Codes of a 402 after which the wallet asks the channel's own server how it stands."""

_replace = msgspec.structs.replace


class Request(Struct, frozen=True):
    """A request as the program makes it."""

    method: str
    url: str
    host: str
    """`host:port` of the connection."""
    names: frozenset[str] = frozenset()
    """Names of its headers, in lower case."""
    body_digest: bytes | None = sha256(b"").digest()
    """SHA-256 of the body; None if the body can't be sent a second time."""
    buffer_bytes: int = 0
    """Longest stream as a body that is kept for a second time."""

    @property
    def key(self) -> str:
        """Digest of method, URL and body: a program that repeats a request repeats all three."""
        parts = (self.method.encode(), self.url.encode(), self.body_digest or b"")
        return sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()[:32]


class Plan(Struct, frozen=True):
    """A payment to make: `paid` goes to the log and `record` to the wallet, both before the signature is made."""

    demand: Demand
    record: ChannelRecord
    paid: Paid

    @property
    def voucher(self) -> Voucher:
        """The signed payment."""
        record = self.record
        return Voucher.of(record.outpoint, record.funding_sat, record.sign(record.left_sat))


def pays(record: ChannelRecord, offer: Offer, now: int) -> bool:
    """Say whether a channel is open to the server of an offer, and takes payments now.

    A server is known by its identity key once a payment for a request has taught it, so all its names are one server. The
    record's own expiry and settlement period count, not those of the offer.
    """
    return (
        record.state is State.OPEN
        and bool(record.funding_outpoint)
        and record.network is address_network(offer.chain)
        and _is_server(record, offer)
        and record.expiry - HOUR * record.settlement_period_hours > now + SPARE_SECONDS
    )


def _is_server(record: ChannelRecord, offer: Offer) -> bool:
    return record.identity == offer.identity.hex() if record.identity else same_server(record.url, offer.pay_url)


def changed_identity(demands: Iterable[Demand], records: Iterable[ChannelRecord], host: str) -> IdentityChanged | None:
    """Return the error for an offer that names another identity key for the server of an open channel, or None."""
    records = [record for record in records if record.identity and record.state is State.OPEN]
    for demand in demands:
        offer = demand.offer
        for record in records:
            if same_server(record.url, offer.pay_url) and record.identity != offer.identity.hex():
                return IdentityChanged(
                    host=host,
                    pay_url=offer.pay_url,
                    channel=record.name,
                    got=offer.identity.hex(),
                    want=record.identity,
                )
    return None


def choose(
    demands: Iterable[Demand], records: Iterable[ChannelRecord], account: Account, key: str, now: int
) -> list[tuple[Demand, ChannelRecord]]:
    """Return the channels that can pay one of the demands, the best first; each with the first demand that it can pay.

    The channel of an earlier try of the same request comes first, then the fullest.
    """
    demands, found = list(demands), []
    earlier = account.open.get(key)
    for record in records:
        demand = next((each for each in demands if pays(record, each.offer, now)), None)
        if demand is not None:
            found.append((demand, record))

    def rank(pair: tuple[Demand, ChannelRecord]) -> tuple[bool, bool, int, str]:
        demand, record = pair
        has_room = isinstance(_raised(record, demand, account, key, now), int)
        is_earlier = earlier is not None and earlier.channel == record.funding_outpoint
        return not is_earlier, not has_room, -room_sat(record), record.name

    return sorted(found, key=rank)


def credit_sat(record: ChannelRecord, account: Account, key: str, now: int) -> int:
    """Return the credit in satoshi that the server should still hold, without what lost requests may have used up."""
    signed_sat = record.funding_sat - record.left_sat
    spent_sat = account.spent.get(record.funding_outpoint, signed_sat)
    lost_sat = sum(
        each.raised_sat
        for each in account.open.values()
        if each.channel == record.funding_outpoint
        and each.key != key
        and each.request not in account.unpaid
        and each.at > now - RESERVED_SECONDS
    )
    return max(0, signed_sat - spent_sat - lost_sat)


def _raised(record: ChannelRecord, demand: Demand, account: Account, key: str, now: int) -> int | Declined:
    """Return the sum by which the payment must grow (satoshi), or why the channel has no room for it."""
    raised_sat = max(0, demand.price_sat - credit_sat(record, account, key, now))
    change_sat = record.left_sat - raised_sat
    if change_sat < 0:
        return InsufficientFunds(want_sat=raised_sat, left_sat=record.left_sat)
    if raised_sat and change_sat < record.dust_sat:
        most_sat = max(0, record.left_sat - record.dust_sat)
        return WouldLeaveDust(change_sat=change_sat, dust_sat=record.dust_sat, most_sat=most_sat)
    return raised_sat


def with_decided(record: ChannelRecord, account: Account) -> ChannelRecord:
    """Return the record with the newest payment of the log, which a crash may have kept out of it."""
    decided_sat = account.signed.get(record.funding_outpoint, record.left_sat)
    return record if decided_sat >= record.left_sat else _replace(record, signed_sat=Sat(decided_sat))


def plan(
    request: Request, demand: Demand, record: ChannelRecord, account: Account, now: int, name: str
) -> Plan | Declined:
    """Decide a payment for a request over a locked channel.

    An earlier try of the request gives its name, and the sum that it signed is not signed again. `name` is the name of a
    request that was not tried before.
    """
    price_sat = demand.price_sat
    counted_sat, before_sat = price_sat, 0
    earlier = account.open.get(request.key)
    if earlier is not None and earlier.channel != record.funding_outpoint:
        earlier = None
    is_lost = earlier is not None and earlier.request not in account.unpaid
    raised_sat = 0 if is_lost else _raised(record, demand, account, request.key, now)
    if isinstance(raised_sat, Declined):
        return raised_sat
    if earlier is not None and not is_lost and earlier.at > now - RESERVED_SECONDS:
        raised_sat = min(raised_sat, max(0, price_sat - earlier.raised_sat))
    if earlier is not None and (is_lost or earlier.raised_sat + raised_sat <= price_sat):
        name, before_sat = earlier.request, earlier.raised_sat
        counted_sat = max(0, price_sat - earlier.price_sat)
    change_sat = Sat(record.left_sat - raised_sat)
    paid = Paid(
        request=name,
        key=request.key,
        at=now,
        host=request.host,
        method=request.method,
        url=request.url,
        channel=record.funding_outpoint,
        price_sat=price_sat,
        change_sat=change_sat,
        counted_sat=counted_sat,
        raised_sat=before_sat + raised_sat,
    )
    return Plan(demand, _replace(record, signed_sat=change_sat), paid)


def corrected(record: ChannelRecord, state: ChannelState, url: str) -> ChannelRecord | None:
    """Return the record after a correction by the server; None if the state is about another channel or proves nothing.

    A state without a proof may correct the charges, and names no payment that is newer than the wallet's.

    Raises:
        FalseProof: the signature that it shows is not by this wallet's key.
    """
    if state.channel != record.outpoint or state.capacity_sat != record.funding_sat:
        return None
    if state.newest is None:
        return record if state.change_sat >= record.left_sat else None
    script = decode_address(record.change_address, record.network)
    verifier = PaymentVerifier(record.terms, record.outpoint, record.funding_sat, script)
    if verifier.problem(state.newest) is not None:
        raise FalseProof(url=url, channel=record.funding_outpoint, change_sat=state.newest.change_sat)
    newest_sat = state.newest.change_sat
    return _replace(
        record,
        signed_sat=min(record.left_sat, newest_sat),
        acknowledged_sat=min(record.agreed_sat, newest_sat),
        refused=record.refused and record.left_sat < newest_sat,
    )


def says_ended(code: str) -> bool:
    """Say whether a seller claims that the channel has ended, by a code of the core or of x402."""
    return code.endswith(_ENDED)


def charges_sat(state: ChannelState) -> int:
    """Return the sum of all charges that a server claims; credit from before a withdrawal makes it smaller."""
    return state.accepted_sat - state.credit_sat


def replan(earlier: Plan, demand: Demand, record: ChannelRecord, state: ChannelState, now: int) -> Plan | None:
    """Decide the one further try after a correction (`corrected`); None if it would cost more than was agreed.

    The price may not grow, and the signed sum grows by no more than the rest of the price.
    """
    paid, price_sat = earlier.paid, demand.price_sat
    before_sat = _raised_before(paid, state)
    raised_sat = max(0, price_sat - max(0, record.funding_sat - record.left_sat - charges_sat(state)))
    change_sat = record.left_sat - raised_sat
    if price_sat > paid.price_sat or before_sat + raised_sat > paid.price_sat:
        return None
    if change_sat < 0 or (raised_sat and change_sat < record.dust_sat):
        return None
    again = _replace(paid, at=now, change_sat=change_sat, counted_sat=0, raised_sat=before_sat + raised_sat)
    return Plan(demand, _replace(record, signed_sat=Sat(change_sat)), again)


def _raised_before(paid: Paid, state: ChannelState) -> int:
    """Return by how much the first try really raised the signed sum, in satoshi.

    A proven payment that is newer than the first try was made by another copy of this wallet: then the first try added
    nothing, or less. The first try itself as proof is no such payment.
    """
    newest_sat = state.change_sat
    if state.newest is None or newest_sat == paid.change_sat:
        return paid.raised_sat
    return min(paid.raised_sat, max(0, newest_sat - paid.change_sat))


def acknowledged(plan: Plan, settled: Settled | None) -> ChannelRecord:
    """Return the record after a paid answer: the server holds the newest payment.

    A receipt about the channel shows that the offer was the server's, so the record learns the identity key of the offer.
    """
    record = _replace(plan.record, acknowledged_sat=plan.record.left_sat, refused=False)
    if record.identity or settled is None or settled.state.channel != record.outpoint:
        return record
    return _replace(record, identity=plan.demand.offer.identity.hex())


def spent_after(plan: Plan, settled: Settled | None, account: Account) -> tuple[int, int]:
    """Return the expected sum of all charges after a paid answer, and the charge of this request, in satoshi.

    An answer without a receipt of this channel counts as charged in full.
    """
    record = plan.record
    if settled is not None and settled.state.channel == record.outpoint:
        return charges_sat(settled.state), settled.charged_sat
    signed_sat = record.funding_sat - record.left_sat
    before_sat = account.spent.get(record.funding_outpoint, signed_sat - plan.paid.raised_sat)
    return min(signed_sat, before_sat + plan.paid.price_sat), plan.paid.price_sat


def no_channel(demand: Demand) -> NoChannel:
    """Return the error for an offer that no channel of the wallet pays."""
    return NoChannel(pay_url=demand.offer.pay_url, price_sat=demand.price_sat)
