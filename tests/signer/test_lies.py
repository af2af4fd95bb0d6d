"""`UnixSigner` with signers that reply with something else than was requested: no such reply is accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from coincurve import PublicKey

from paychan.protocol.address import key_script
from paychan.protocol.certificate import Certificate
from paychan.protocol.settlement import Reserve, Settlement, sign_settlement
from paychan.protocol.settlement import sign_child as make_child
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    CertificateReply,
    CertificateRequest,
    ChildReply,
    HealthReply,
    KeyReply,
    Reply,
    ReserveReply,
    SettlementReply,
    SettlementRequest,
)
from paychan.signer_client.base import SignerRefused
from signer.keys.ring import KeyRing, SigningKey, hardened_keys
from tests.lib import background
from tests.signer.connected import HANDLER, KEYS, REQUEST, WITH_RESERVE, client, served, sign, sign_child
from tests.signer.messages import (
    CLIENT,
    CLIENT_KEY,
    EXPIRY,
    make_coin,
    make_handler,
    make_request,
    mutated,
    with_high_s,
    with_padded_s,
)

RESERVE = KEYS.reserve()
OTHER_KEYS = KeyRing([hardened_keys(bytes(31) + b"\x01")])
HEALTH = HealthReply(1, "regtest", "hardened", debug=False)


def signature(key: SigningKey, digest: bytes) -> bytes:
    return background.run(key.sign, digest)


def resigned(
    request: SettlementRequest, alter: Callable[[bytes], bytes] = bytes, keys: KeyRing = KEYS, **changes: Any
) -> Settlement:
    """A settlement that differs from the request, or has other signatures."""

    def server_signature(index: int, digest: bytes) -> bytes:
        if index >= len(request.claims):
            return alter(signature(keys.reserve(), digest))
        terms = request.claims[index].terms
        return alter(signature(keys.new(terms.client_key, terms.expiry.lock_time), digest))

    names = ("claims", "destination_script", "fee_sat", "reserve")
    return sign_settlement(**{**{name: getattr(request, name) for name in names}, **changes}, sign=server_signature)


def changed(settlement: Settlement, change: Callable[[CTransaction], CTransaction]) -> Settlement:
    transaction = change(CTransaction.deserialize(settlement.transaction))
    return Settlement(transaction.serialize(), transaction.GetTxid(), settlement.fee_sat)


def with_flag(settlement: Settlement, flag: int) -> Settlement:
    """The settlement with another hash type in the first server signature."""

    def change(transaction: CTransaction) -> CTransaction:
        script = bytearray(transaction.vin[0].scriptSig)
        second = 1 + script[0]
        script[second + script[second]] = flag
        first = CTxIn(transaction.vin[0].prevout, bytes(script), transaction.vin[0].nSequence)
        return CTransaction([first, *transaction.vin[1:]], transaction.vout)

    return changed(settlement, change)


def spliced(settlement: Settlement, other: Settlement) -> Settlement:
    """One settlement's inputs and outputs with the other's signatures."""
    scripts = [txin.scriptSig for txin in CTransaction.deserialize(other.transaction).vin]

    def change(transaction: CTransaction) -> CTransaction:
        pairs = zip(transaction.vin, scripts, strict=True)
        return CTransaction([CTxIn(i.prevout, script, i.nSequence) for i, script in pairs], transaction.vout)

    return changed(settlement, change)


STRANGER = key_script(PublicKey.from_secret(b"\x07" * 32).format())
HONEST = resigned(REQUEST)
LIES: dict[str, Settlement] = {
    "other destination": resigned(REQUEST, destination_script=STRANGER),
    "other fee paid": mutated(resigned(REQUEST, fee_sat=Sat(6_000)), "fee_sat", REQUEST.fee_sat),
    "other fee said": mutated(HONEST, "fee_sat", 6_000),
    "fewer claims": resigned(REQUEST, claims=REQUEST.claims[:1]),
    "other order": resigned(make_request(KEYS, drained=2), claims=make_request(KEYS, drained=2).claims[::2]),
    "other txid": mutated(HONEST, "txid", bytes(32)),
    "no txid": mutated(HONEST, "txid", b""),
    "trailing byte": mutated(HONEST, "transaction", HONEST.transaction + b"\x00"),
    "cut off": mutated(HONEST, "transaction", HONEST.transaction[:-1]),
    "empty": mutated(HONEST, "transaction", b""),
    "garbage": mutated(HONEST, "transaction", b"\xff" * 300),
    "flag NONE": with_flag(HONEST, 2),
    "flag SINGLE": with_flag(HONEST, 3),
    "flag ALL, ANYONECANPAY": with_flag(HONEST, 0x81),
    "high S": resigned(REQUEST, with_high_s),
    "padded S": resigned(REQUEST, with_padded_s),
    "trailing byte in the signature": resigned(REQUEST, lambda signature: signature + b"\x00"),
    "no DER": resigned(REQUEST, lambda signature: bytes(len(signature))),
    "key of another": resigned(REQUEST, keys=OTHER_KEYS),
    "signatures of another settlement": spliced(HONEST, resigned(REQUEST, fee_sat=Sat(6_000))),
    "unsigned": changed(
        HONEST, lambda t: CTransaction([CTxIn(i.prevout, b"", i.nSequence) for i in t.vin], t.vout)
    ),
    "one more output": changed(HONEST, lambda t: CTransaction(t.vin, [*t.vout, CTxOut(1, STRANGER)])),
    "lock time": changed(HONEST, lambda t: CTransaction(t.vin, t.vout, nLockTime=1)),
    "version 2": changed(HONEST, lambda t: CTransaction(t.vin, t.vout, nVersion=2)),
    "sequence": changed(
        HONEST, lambda t: CTransaction([CTxIn(i.prevout, i.scriptSig, 0) for i in t.vin], t.vout)
    ),
}  # fmt: skip


HONEST_WITH_RESERVE = resigned(WITH_RESERVE)
LIES_WITH_RESERVE: dict[str, Settlement] = {
    "without coins": resigned(WITH_RESERVE, reserve=None),
    "fewer coins": resigned(WITH_RESERVE, reserve=Reserve(RESERVE.public_key, (make_coin(KEYS),))),
    "other coin": resigned(WITH_RESERVE, reserve=Reserve(RESERVE.public_key, (make_coin(KEYS, 0), make_coin(KEYS, 2)))),
    "other order": resigned(
        WITH_RESERVE, reserve=Reserve(RESERVE.public_key, (make_coin(KEYS, 1), make_coin(KEYS, 0)))
    ),
    "other key": resigned(
        mutated(WITH_RESERVE, "reserve.public_key", CLIENT_KEY), destination_script=WITH_RESERVE.destination_script
    ),
    "other destination": resigned(WITH_RESERVE, destination_script=STRANGER),
    "key of another": resigned(WITH_RESERVE, keys=OTHER_KEYS),
    "high S": resigned(WITH_RESERVE, with_high_s),
    "unsigned coin": changed(
        HONEST_WITH_RESERVE,
        lambda t: CTransaction([*t.vin[:3], CTxIn(t.vin[3].prevout, b"", t.vin[3].nSequence)], t.vout),
    ),
}


def child_of(
    settlement: Settlement,
    alter: Callable[[bytes], bytes] = bytes,
    key: bytes | None = None,
    fee_sat: int = 2_000,
) -> Settlement:
    """A child of `WITH_RESERVE`'s settlement."""
    public_key = RESERVE.public_key if key is None else key
    return make_child(settlement, public_key, Sat(fee_sat), lambda _, digest: alter(signature(RESERVE, digest)))


def with_script(settlement: Settlement, script: bytes) -> Settlement:
    return changed(settlement, lambda t: CTransaction([CTxIn(t.vin[0].prevout, script, t.vin[0].nSequence)], t.vout))


CHILD = child_of(HONEST_WITH_RESERVE)
SCRIPT = bytes(CTransaction.deserialize(CHILD.transaction).vin[0].scriptSig)
CHILD_LIES: dict[str, Settlement] = {
    "other fee": child_of(HONEST_WITH_RESERVE, fee_sat=2_001),
    "other fee said": mutated(CHILD, "fee_sat", 2_001),
    "other fee paid": mutated(child_of(HONEST_WITH_RESERVE, fee_sat=2_001), "fee_sat", 2_000),
    "other parent": child_of(resigned(mutated(WITH_RESERVE, "fee_sat", 5_001))),
    "the parent": HONEST_WITH_RESERVE,
    "other txid": mutated(CHILD, "txid", bytes(32)),
    "empty": mutated(CHILD, "transaction", b""),
    "trailing byte": mutated(CHILD, "transaction", CHILD.transaction + b"\x00"),
    "no inputs": changed(CHILD, lambda t: CTransaction([], t.vout)),
    "two inputs": changed(CHILD, lambda t: CTransaction([*t.vin, *t.vin], t.vout)),
    "of the client's change": make_child(
        HONEST_WITH_RESERVE, CLIENT_KEY, Sat(2_000), lambda _, digest: CLIENT.sign(digest, hasher=None)
    ),
    "other output": changed(CHILD, lambda t: CTransaction(t.vin, [CTxOut(t.vout[0].nValue, STRANGER)])),
    "one more output": changed(CHILD, lambda t: CTransaction(t.vin, [*t.vout, CTxOut(1, STRANGER)])),
    "other output spent": changed(
        CHILD, lambda t: CTransaction([CTxIn(COutPoint(HONEST_WITH_RESERVE.txid, 0), SCRIPT)], t.vout)
    ),
    "lock time": changed(CHILD, lambda t: CTransaction(t.vin, t.vout, nLockTime=1)),
    "no script": with_script(CHILD, b""),
    "key alone": with_script(CHILD, SCRIPT[-34:]),
    "other key": with_script(CHILD, SCRIPT[:-33] + CLIENT_KEY),
    "flag NONE": with_script(CHILD, SCRIPT[: SCRIPT[0]] + b"\x02" + SCRIPT[SCRIPT[0] + 1 :]),
    "high S": child_of(HONEST_WITH_RESERVE, with_high_s),
    "no DER": child_of(HONEST_WITH_RESERVE, lambda signature: bytes(len(signature))),
    "signature of another": child_of(HONEST_WITH_RESERVE, lambda _: signature(RESERVE, bytes(32))),
}


async def test_honest_settlement_is_accepted(tmp_path: Path) -> None:
    """The honest reply, from which the lies below are made, is accepted."""
    async with served(tmp_path, HANDLER) as path, client(path) as signer:
        assert await sign(signer) == HONEST
    async with served(tmp_path, make_handler(KEYS, WITH_RESERVE)) as path, client(path) as signer:
        assert await sign(signer, WITH_RESERVE) == HONEST_WITH_RESERVE
        assert await sign_child(signer, WITH_RESERVE) == CHILD


@pytest.mark.parametrize("lie", LIES_WITH_RESERVE)
async def test_settlement_with_other_coins_is_refused(tmp_path: Path, lie: str) -> None:
    """A settlement with other coins than requested, or with invalid signatures, is refused."""
    reply = LIES_WITH_RESERVE[lie]
    async with served(tmp_path, lambda request: SettlementReply(request.id, reply)) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await sign(signer, WITH_RESERVE)
        assert refused.value.tag == "protocol-reply"


@pytest.mark.parametrize("lie", CHILD_LIES)
async def test_child_that_differs_is_refused(tmp_path: Path, lie: str) -> None:
    """A child that differs from the request in any part is refused."""
    reply = CHILD_LIES[lie]
    async with served(tmp_path, lambda request: ChildReply(request.id, reply)) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await sign_child(signer, WITH_RESERVE)
        assert refused.value.tag == "protocol-reply"


@pytest.mark.parametrize("reply", [HEALTH, ReserveReply(1, b"\x05" * 33), ReserveReply(1, b"\x02" + b"\xff" * 32)])
async def test_invalid_reserve_key_is_refused(tmp_path: Path, reply: Reply) -> None:
    """No coin is sent to an invalid key."""
    async with served(tmp_path, lambda _: reply) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await signer.reserve_key()
        assert refused.value.tag == "protocol-reply"


RECEIPT_KEY = PublicKey.from_secret(b"\x66" * 32).format()
BEGIN, END = UnixTime(1_800_000_000), UnixTime(1_800_604_800)


def certified(
    keys: KeyRing = KEYS, receipt_key: bytes = RECEIPT_KEY, begin: UnixTime = BEGIN, end: UnixTime = END
) -> bytes:
    return background.run(keys.certify, receipt_key, begin, end)


CERTIFICATE_LIES: dict[str, Reply] = {
    "another message": HEALTH,
    "no key": CertificateReply(1, b"\x05" * 33, certified()),
    "another identity": CertificateReply(1, OTHER_KEYS.identity(), certified()),
    "signature of another": CertificateReply(1, KEYS.identity(), certified(OTHER_KEYS)),
    "of another key": CertificateReply(1, KEYS.identity(), certified(receipt_key=CLIENT_KEY)),
    "earlier": CertificateReply(1, KEYS.identity(), certified(begin=UnixTime(BEGIN - 1))),
    "longer": CertificateReply(1, KEYS.identity(), certified(end=UnixTime(END + 1))),
    "high S": CertificateReply(1, KEYS.identity(), with_high_s(certified())),
    "padded S": CertificateReply(1, KEYS.identity(), with_padded_s(certified())),
    "trailing byte": CertificateReply(1, KEYS.identity(), certified() + b"\x00"),
    "empty": CertificateReply(1, KEYS.identity(), b""),
}


@pytest.mark.parametrize("lie", CERTIFICATE_LIES)
async def test_certificate_that_differs_is_refused(tmp_path: Path, lie: str) -> None:
    """A certificate of another key, time or identity, or whose signature is none, is refused."""
    async with served(tmp_path, lambda _: CERTIFICATE_LIES[lie]) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await signer.certify(RECEIPT_KEY, BEGIN, END)
        assert refused.value.tag == "protocol-reply"


async def test_an_honest_certificate_is_taken(tmp_path: Path) -> None:
    """The certificate that the signer makes passes the checks that refuse the others."""
    handler = make_handler(KEYS, clock=lambda: float(BEGIN))
    async with served(tmp_path, handler) as path, client(path) as signer:
        certificate = await signer.certify(RECEIPT_KEY, BEGIN, END)

    assert isinstance(handler(CertificateRequest(2, RECEIPT_KEY, BEGIN, END)), CertificateReply)
    assert certificate == Certificate(KEYS.identity(), RECEIPT_KEY, BEGIN, END, certified())


@pytest.mark.parametrize("lie", LIES)
async def test_settlement_that_differs_is_refused(tmp_path: Path, lie: str) -> None:
    """A settlement that differs in any part from the requested claims, destination and fee is refused."""
    reply = LIES[lie]
    async with served(tmp_path, lambda request: SettlementReply(request.id, reply)) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await sign(signer)
        assert refused.value.tag == "protocol-reply"


@pytest.mark.parametrize(
    "reply",
    [HEALTH, KeyReply(1, b"\x05" * 33, b""), KeyReply(1, b"\x02" + b"\xff" * 32, b""), SettlementReply(1, HONEST)],
    ids=["health", "prefix", "off-the-curve", "settlement"],
)
async def test_invalid_key_is_refused(tmp_path: Path, reply: Reply) -> None:
    """A reply of another kind, or a key that is no compressed point, is not accepted as a server key."""
    async with served(tmp_path, lambda _: reply) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await signer.public_key(CLIENT_KEY, EXPIRY)
        assert refused.value.tag == "protocol-reply"
