"""Signatures of the signer: the published vectors byte for byte, SIGHASH_ALL only, and none before all checks."""

from __future__ import annotations

from collections.abc import Callable

from bitcoin.core import CTransaction, CTxInWitness, CTxWitness
from bitcoin.core.script import SIGHASH_ALL, CScript, CScriptWitness, SignatureHash
from hypothesis import given, settings

from paychan.protocol.address import decode_address, key_script
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    MAX_CLAIMS,
    AgainReply,
    AgainRequest,
    BehindReply,
    BehindRequest,
    ChildReply,
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
    Newest,
    NewestReply,
    NewestRequest,
    Refusal,
    ReserveReply,
    ReserveRequest,
    SettlementReply,
    SettlementRequest,
    StatusReply,
    StatusRequest,
    encode_frame,
    frame_size,
)
from signer.judge.facts import Limits
from signer.judge.handler import Handler
from signer.judge.validation import MAX_COINS
from signer.keys.ring import KeyRing, KeySource, SigningKey, StaticKey, hardened_keys, rbpcp_v2_keys
from signer.ledger.entries import Output
from tests.lib.kernel import interpreter_accepts
from tests.lib.ledger import MemoryLedger
from tests.lib.looped import looped
from tests.lib.vectors import JS_CASES, Case
from tests.signer.messages import (
    CLIENT,
    CLIENT_KEY,
    EXPIRY,
    destination,
    make_child_request,
    make_fundings,
    make_handler,
    make_request,
    make_reserve_request,
    mutated,
    server_key,
)
from tests.signer.requests import damaged_requests

KEYS = KeyRing([hardened_keys(bytes(32))])
REQUEST = make_request(KEYS)


def handler(keys: KeyRing = KEYS) -> Handler:
    """A handler that was shown the outputs of these tests, with limits that allow any fee."""
    limits = Limits(max_fee_percent=100, max_fee_sat=10**9, max_fee_sat_per_vb=10_000)
    return make_handler(
        keys, make_reserve_request(KEYS, drained=5), make_reserve_request(keys, drained=5), limits=limits
    )


class RecordingKey:
    """A key that records every digest that it signs."""

    def __init__(self, key: SigningKey, digests: list[bytes]) -> None:
        self.public_key = key.public_key
        self._key = key
        self._digests = digests

    async def sign(self, digest: bytes) -> bytes:
        self._digests.append(digest)
        return await self._key.sign(digest)


class Recording:
    """A tree of keys that records every signed digest."""

    def __init__(self, source: KeySource) -> None:
        self._source = source
        self.digests: list[bytes] = []

    def channel_key(self, client_key: bytes, expiry: UnixTime, *, create: bool) -> SigningKey | None:
        return self._recorded(self._source.channel_key(client_key, expiry, create=create))

    def destination_key(self, client_key: bytes, expiry: UnixTime) -> SigningKey | None:
        return self._recorded(self._source.destination_key(client_key, expiry))

    def reserve_key(self) -> SigningKey:
        return RecordingKey(self._source.reserve_key(), self.digests)

    def identity_key(self) -> SigningKey:
        return RecordingKey(self._source.identity_key(), self.digests)

    def _recorded(self, key: SigningKey | None) -> SigningKey | None:
        return None if key is None else RecordingKey(key, self.digests)


def pushes(script: bytes) -> list[bytes]:
    """Data pushed by a scriptSig; OP_1 and the like count as empty."""
    return [data or b"" for _, data, _ in CScript(script).raw_iter()]


def test_health_identifies_the_signer() -> None:
    """A health reply has network, key mode, debug and the identity key, and the request's id."""
    answer = handler()(Health(3))

    assert answer == HealthReply(
        3, "regtest", "hardened", False, "", UnixTime(0), 100, Sat(1_000_000_000), 10_000, KEYS.identity()
    )


def test_key_reply_has_the_key_and_destination_of_settlements() -> None:
    """The key and destination of the reply are those that a settlement of the channel needs."""
    reply = handler()(KeyRequest(4, CLIENT_KEY, EXPIRY))

    assert isinstance(reply, KeyReply)
    assert (reply.server_key, reply.destination_script) == (
        REQUEST.claims[0].terms.server_key,
        REQUEST.destination_script,
    )


def test_reserve_key_is_that_of_settlements() -> None:
    """The key of the reply is the one that the reserve of a settlement must have."""
    assert handler()(ReserveRequest(6)) == ReserveReply(6, KEYS.reserve().public_key)


@looped(
    ("client_key", "expiry", "reason"),
    [
        (b"\x02" + b"\xff" * 32, EXPIRY, "not a point"),
        (b"\x05" + CLIENT_KEY[1:], EXPIRY, "compressed"),
        (CLIENT_KEY, 499_999_999, "not a time"),
        (CLIENT_KEY, 1 << 32, "not a time"),
        (CLIENT_KEY, -1, "not a time"),
    ],
)
def test_no_key_for_an_impossible_channel(client_key: bytes, expiry: int, reason: str) -> None:
    """A client key off the curve or an expiry that is no time gets no server key."""
    reply = handler()(KeyRequest(5, client_key, UnixTime(expiry)))

    assert isinstance(reply, Refusal)
    assert reply.tag == "policy-template"
    assert reason in reply.reason


def test_no_key_for_a_client_with_the_servers_key() -> None:
    """A client with the server's own key gets no key: one side could spend alone."""
    keys = KeyRing([StaticKey(CLIENT.secret)], key_script(CLIENT_KEY))
    reply = make_handler(keys)(KeyRequest(5, CLIENT_KEY, EXPIRY))

    assert isinstance(reply, Refusal)
    assert reply.tag == "policy-template"


@looped("case", JS_CASES, ids=lambda case: case.name)
def test_settlements_of_the_vectors_are_reproduced(case: Case) -> None:
    """With the vectors' server key, each settlement is the published one byte for byte."""
    expected = case.raw["settlement"]
    address = decode_address(expected["server_address"], case.network)
    ledger, claim = MemoryLedger(), case.claim()
    ledger.shown_outputs[claim.outpoint] = Output(claim.funding_sat, claim.terms.funding_script)
    signs = make_handler(KeyRing([StaticKey(case.server_key.secret)], address), ledger=ledger)

    reply = signs(SettlementRequest(9, (claim,), address, Sat(expected["fee"])))

    assert isinstance(reply, SettlementReply)
    assert reply.settlement.transaction.hex() == expected["tx_hex"]
    assert reply.settlement.txid[::-1].hex() == expected["txid"]
    assert reply.settlement.fee_sat == expected["fee"]


@looped("make_keys", [hardened_keys, rbpcp_v2_keys])
@looped("drained", [0, 1, 5])
def test_policy_sighash(make_keys: Callable[[bytes], KeySource], drained: int) -> None:
    """Every signed digest is the SIGHASH_ALL digest of its input, and every server signature has the flag ALL."""
    recording = Recording(make_keys(bytes(32)))
    keys = KeyRing([recording])
    request = make_request(keys, drained=drained)

    reply = handler(keys)(request)

    assert isinstance(reply, SettlementReply)
    transaction = CTransaction.deserialize(reply.settlement.transaction)
    scripts = [CScript(claim.terms.redeem_script) for claim in request.claims]
    assert recording.digests == [SignatureHash(s, transaction, i, SIGHASH_ALL) for i, s in enumerate(scripts)]
    assert [pushes(txin.scriptSig)[1][-1] for txin in transaction.vin] == [SIGHASH_ALL] * len(scripts)


def test_policy_sighash_of_coins_and_children() -> None:
    """Signatures for coins of the reserve and for a child are SIGHASH_ALL, too."""
    recording = Recording(hardened_keys(bytes(32)))
    signs = handler(KeyRing([recording]))
    request = make_reserve_request(KEYS)

    replies = signs(request), signs(make_child_request(request))

    assert isinstance(replies[0], SettlementReply)
    assert isinstance(replies[1], ChildReply)
    settlement, child = (
        CTransaction.deserialize(raw) for raw in (replies[0].settlement.transaction, replies[1].child.transaction)
    )
    script = CScript(key_script(KEYS.reserve().public_key))
    assert recording.digests[2:4] == [SignatureHash(script, settlement, i, SIGHASH_ALL) for i in (2, 3)]
    assert recording.digests[-1] == SignatureHash(script, child, 0, SIGHASH_ALL)
    assert [pushes(txin.scriptSig)[0][-1] for txin in (*settlement.vin[2:], *child.vin)] == [SIGHASH_ALL] * 3


@looped("flag", range(256))
def test_policy_sighash_does_not_follow_the_client(flag: int) -> None:
    """For any hash flag of the client's payment, server signatures have the flag ALL only."""
    recording = Recording(hardened_keys(bytes(32)))
    reply = handler(KeyRing([recording]))(mutated(REQUEST, "claims.0.payment.flag", flag))

    if flag == 0x83:
        assert isinstance(reply, SettlementReply)
        transaction = CTransaction.deserialize(reply.settlement.transaction)
        assert all(pushes(txin.scriptSig)[1][-1] == SIGHASH_ALL for txin in transaction.vin)
    else:
        assert isinstance(reply, Refusal)
        assert not recording.digests


def test_nothing_is_signed_before_everything_is_checked() -> None:
    """If the last claim of a batch is bad, no good claim is signed either."""
    recording = Recording(hardened_keys(bytes(32)))
    request = make_request(KEYS, drained=5)

    reply = handler(KeyRing([recording]))(mutated(request, "claims.5.payment.flag", 0x83))

    assert isinstance(reply, Refusal)
    assert not recording.digests


def test_largest_settlement_fits_its_frames() -> None:
    """Request and reply with the most allowed claims stay below the frame limit."""
    request = make_reserve_request(KEYS, drained=MAX_CLAIMS - 1, coins=MAX_COINS)
    signs = make_handler(KEYS, request)
    reply = signs(request)

    assert isinstance(reply, SettlementReply)
    for message in (request, reply, make_child_request(request), signs(make_child_request(request))):
        frame = encode_frame(message)
        assert frame_size(frame[:4]) == len(frame) - 4


@settings(max_examples=200, deadline=None)
@given(request=damaged_requests(KEYS))
def test_any_request_is_refused_or_answered_correctly(request: SettlementRequest) -> None:
    """No request makes the handler fail; a signed transaction is valid and pays all but the fee to its owners."""
    reply = handler()(request)

    if isinstance(reply, Refusal):
        return
    assert isinstance(reply, SettlementReply)
    transaction = CTransaction.deserialize(reply.settlement.transaction)
    coins = request.reserve.coins if request.reserve else ()
    spent = [(claim.terms.funding_script, claim.funding_sat) for claim in request.claims]
    spent += [(key_script(KEYS.reserve().public_key), coin.value_sat) for coin in coins]
    for index, (script, value_sat) in enumerate(spent):
        assert interpreter_accepts(script, reply.settlement.transaction, index, value_sat)
    paid = {bytes(out.scriptPubKey): out.nValue for out in transaction.vout}
    change_sat = request.claims[0].payment.change_sat
    assert paid.pop(request.claims[0].change_script, 0) == change_sat
    total_sat = sum(value_sat for _, value_sat in spent) - change_sat - request.fee_sat
    own = key_script(KEYS.reserve().public_key) if request.reserve else destination(KEYS)
    assert paid == ({own: total_sat} if total_sat else {})


@looped("damage", ["short", "long", "witness", "huge"])
def test_only_transactions_with_the_bytes_of_their_txid_are_accepted(damage: str) -> None:
    """Broken bytes, trailing bytes or a witness are refused, for the txid would differ: no output is recorded."""
    funding = make_fundings(REQUEST)[0]
    whole = CTransaction.deserialize(funding.transaction)
    witness = CTxWitness([CTxInWitness(CScriptWitness([b"\x01"]))])
    changed = {
        "short": funding.transaction[:-1],
        "long": funding.transaction + b"\x00",
        "witness": CTransaction(whole.vin, whole.vout, witness=witness).serialize(),
        "huge": funding.transaction[:4] + b"\xff" * 9 + funding.transaction[5:],
    }[damage]
    ledger = MemoryLedger()

    reply = make_handler(KEYS, ledger=ledger)(mutated(funding, "transaction", changed))

    assert isinstance(reply, Refusal)
    assert reply.tag == "policy-template"
    assert not ledger.shown_outputs


@looped("outputs", [(), (1,), (-1,), (1 << 40,), (0, 5), tuple(range(MAX_CLAIMS + 1))])
def test_only_existing_outputs_are_recorded(outputs: tuple[int, ...]) -> None:
    """For indices that do not exist, no index, or too many, no output is recorded."""
    ledger = MemoryLedger()

    reply = make_handler(KEYS, ledger=ledger)(mutated(make_fundings(REQUEST)[0], "outputs", outputs))

    assert isinstance(reply, Refusal)
    assert not ledger.shown_outputs


def test_again_returns_the_newest_settlement() -> None:
    """A request with only an outpoint returns its last signed settlement, and no other one."""
    signs = handler()
    dearer = mutated(REQUEST, "fee_sat", 9_000)
    signs(REQUEST)
    newest = signs(dearer)
    assert isinstance(newest, SettlementReply)

    for claim in REQUEST.claims:
        assert signs(AgainRequest(12, claim.outpoint)) == AgainReply(
            12, claim, mutated(dearer, "id", 0), newest.settlement
        )
    for outpoint in (OutPoint(bytes(32), 0), OutPoint(b"", -1), make_reserve_request(KEYS).reserve.coins[0].outpoint):  # type: ignore[union-attr]
        reply = signs(AgainRequest(13, outpoint))
        assert isinstance(reply, Refusal)
        assert reply.tag == "policy-template"


def test_fault_03_the_signer_names_the_records_that_are_behind() -> None:
    """Channels with a settlement, or with a newer payment that was shown, are named; the log gets no line for the query."""
    ledger = MemoryLedger()
    signs = make_handler(KEYS, REQUEST, make_request(KEYS, drained=2), ledger=ledger)
    known = [Newest(claim.outpoint, claim.payment.change_sat) for claim in REQUEST.claims]
    shown = make_request(KEYS, drained=2).claims[2]
    other = [Newest(OutPoint(bytes(32), 0), Sat(1)), Newest(OutPoint(b"", -1), Sat(1))]
    asked = BehindRequest(1, (*known, *other, Newest(shown.outpoint, Sat(1)), Newest(shown.outpoint, Sat(0))))
    assert signs(asked) == BehindReply(1, ())
    signs(REQUEST)
    assert signs(NewestRequest(2, (shown,))) == NewestReply(2)
    lines = len(ledger.decisions)
    assert signs(asked) == BehindReply(1, (*(each.outpoint for each in known), shown.outpoint))
    assert len(ledger.decisions) == lines
    assert signs(AgainRequest(3, shown.outpoint)) == AgainReply(3, shown)


def test_status_shows_the_signers_state() -> None:
    """The status has decisions, sums of the last hour and day, heartbeat, trials and protections."""
    ledger = MemoryLedger()
    now = [1_800_000_000.0]
    signs = make_handler(
        KEYS,
        REQUEST,
        ledger=ledger,
        limits=Limits(trial=frozenset(("policy-rate",))),
        clock=lambda: now[0],
        heartbeat=lambda: UnixTime(1_799_999_000),
    )
    signs(REQUEST)
    now[0] += 4_300

    reply = signs(StatusRequest(2))

    assert reply == StatusReply(
        2,
        UnixTime(1_800_000_000),
        3,
        ledger.head.hash,
        Sat(0),
        Sat(1_600_000),
        UnixTime(1_799_999_000),
        ("policy-rate",),
        (),
    )


def test_channel_of_an_older_generation_is_settled_with_its_key() -> None:
    """After a rotation new channels get the new key; old ones are settled with theirs, to the new destination."""
    old, new = hardened_keys(bytes(32)), hardened_keys(b"\x01" * 32)
    rotated = KeyRing([new, old])
    signs = make_handler(rotated, REQUEST)
    to_new = mutated(REQUEST, "destination_script", destination(KeyRing([new])))

    reply = signs(KeyRequest(1, CLIENT_KEY, EXPIRY))
    settled = signs(to_new)

    assert isinstance(reply, KeyReply)
    assert (reply.server_key, reply.destination_script) == (server_key(KeyRing([new])), to_new.destination_script)
    assert isinstance(settled, SettlementReply)
    assert isinstance(signs(mutated(REQUEST, "fee_sat", 5_001)), SettlementReply)
    assert isinstance(make_handler(KeyRing([new]), REQUEST)(to_new), Refusal)


def test_settlement_to_a_previous_address_is_signed_again() -> None:
    """After a change of the operator's address, a settlement for the old one may be replaced by one for either."""
    old, new = key_script(b"\x02" + bytes(32)), key_script(b"\x03" + bytes(32))
    source, ledger = hardened_keys(bytes(32)), MemoryLedger()
    request = mutated(REQUEST, "destination_script", old)
    assert isinstance(make_handler(KeyRing([source], old), REQUEST, ledger=ledger)(request), SettlementReply)
    signs = make_handler(KeyRing([source], new, [old]), ledger=ledger)

    assert isinstance(signs(request), SettlementReply)
    assert isinstance(signs(mutated(mutated(request, "destination_script", new), "fee_sat", 5_001)), SettlementReply)
    assert isinstance(signs(KeyRequest(1, CLIENT_KEY, EXPIRY)), KeyReply)
    other = mutated(make_request(KEYS, drained=2), "destination_script", old)
    unsigned = make_handler(KeyRing([source], new, [old]), other, ledger=ledger)(mutated(other, "fee_sat", 9_000))
    assert isinstance(unsigned, Refusal)
    assert "is retired: no new settlement may pay to it" in unsigned.reason
    refused = make_handler(KeyRing([source], new), ledger=ledger)(mutated(request, "fee_sat", 6_000))
    assert isinstance(refused, Refusal)
    assert refused.tag == "policy-destination"
