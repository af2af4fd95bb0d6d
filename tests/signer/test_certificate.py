"""The identity key: it certifies keys for receipts within limits, leaves a line for each, and does nothing else."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from coincurve import PublicKey

from paychan.protocol.address import key_script
from paychan.protocol.certificate import MOST_SECONDS, Certificate, certificate_digest
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.settlement import Coin, Reserve
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    CertificateReply,
    CertificateRequest,
    KeyRequest,
    Refusal,
    SettlementRequest,
)
from signer.judge.policies import BEGIN_SECONDS
from signer.judge.rate import CERTIFICATES_PER_HOUR
from signer.keys.ring import DEBUG_KEY, KeyRing, StaticKey, hardened_keys, rbpcp_v2_keys
from signer.ledger.base import Entry, LedgerFailed
from tests.lib.ledger import MemoryLedger
from tests.lib.looped import looped
from tests.signer.messages import (
    CLIENT_KEY,
    EXPIRY,
    make_claim,
    make_handler,
    make_request,
    make_reserve_request,
    mutated,
)
from tests.signer.test_handlers import Recording

NOW = 1_800_000_000
KEYS = KeyRing([hardened_keys(bytes(32))])
RECEIPT_KEY = PublicKey.from_secret(b"\x66" * 32).format()
REQUEST = CertificateRequest(7, RECEIPT_KEY, UnixTime(NOW), UnixTime(NOW + MOST_SECONDS))


def now() -> float:
    return float(NOW)


def lasting(seconds: int, begin: int = NOW) -> dict[str, UnixTime]:
    return {"not_before": UnixTime(begin), "not_after": UnixTime(begin + seconds)}


@looped(
    "keys",
    [KEYS, KeyRing([rbpcp_v2_keys(bytes(32))]), KeyRing([StaticKey(DEBUG_KEY)], key_script(CLIENT_KEY))],
    ids=["hardened", "rbpcp-v2", "debug"],
)
@looped("times", [lasting(1), lasting(MOST_SECONDS), lasting(60, NOW - BEGIN_SECONDS)])
def test_a_certificate_is_signed_in_every_mode(keys: KeyRing, times: dict[str, UnixTime]) -> None:
    """A key is certified by the identity key for the requested times, up to both limits."""
    request = CertificateRequest(7, RECEIPT_KEY, **times)

    reply = make_handler(keys, clock=now)(request)

    assert isinstance(reply, CertificateReply)
    assert reply.identity_key == keys.identity()
    assert Certificate(reply.identity_key, RECEIPT_KEY, **times, signature=reply.signature).problem() == ""


@looped(
    ("changes", "reason"),
    [
        ({"receipt_key": b"\x05" + RECEIPT_KEY[1:]}, "compressed"),
        ({"receipt_key": b"\x02" + b"\xff" * 32}, "not a point"),
        ({"receipt_key": KEYS.identity()}, "identity key itself"),
        (lasting(MOST_SECONDS + 1), f"last {MOST_SECONDS + 1} s, want 1 to {MOST_SECONDS} s"),
        (lasting(0), "last 0 s"),
        (lasting(-1), "last -1 s"),
        (lasting(60, NOW - BEGIN_SECONDS - 1), f"want within {BEGIN_SECONDS} s of {NOW}"),
        (lasting(60, NOW + BEGIN_SECONDS + 1), f"want within {BEGIN_SECONDS} s of {NOW}"),
        (lasting(60, -1), "begin at -1"),
        (lasting(60, 2**64 - 61), "begin at"),
        ({"not_after": UnixTime(2**64 - 1)}, "want 1 to"),
    ],
)
def test_policy_certificate(changes: dict[str, Any], reason: str) -> None:
    """Only a valid key other than the identity's, from now on, for at most 100 days; nothing else is signed."""
    recording = Recording(hardened_keys(bytes(32)))
    request = REQUEST
    for name, value in changes.items():
        request = mutated(request, name, value)

    reply = make_handler(KeyRing([recording]), clock=now)(request)

    assert isinstance(reply, Refusal)
    assert reply.tag == "policy-certificate"
    assert reason in reply.reason
    assert not recording.digests


def test_policy_certificate_has_a_rate() -> None:
    """Certificates have a budget of their own, which an hour fills again; keys and settlements go on."""
    clock = [float(NOW)]
    handler = make_handler(KEYS, make_request(KEYS), clock=lambda: clock[0])

    replies = [handler(REQUEST) for _ in range(CERTIFICATES_PER_HOUR + 1)]

    assert [isinstance(reply, CertificateReply) for reply in replies] == [True] * CERTIFICATES_PER_HOUR + [False]
    assert isinstance(replies[-1], Refusal)
    assert replies[-1].tag == "policy-rate"
    assert replies[-1].reason == f"more than {CERTIFICATES_PER_HOUR} requests of CertificateRequest per hour"
    for request in (KeyRequest(3, CLIENT_KEY, EXPIRY), make_request(KEYS)):
        assert not isinstance(handler(request), Refusal)
    clock[0] += 3600 / CERTIFICATES_PER_HOUR
    assert isinstance(handler(REQUEST), CertificateReply)


def test_every_certificate_has_its_line_before_it_is_signed() -> None:
    """The audit log names the key and its times, and has the digest that was signed."""
    recording, ledger = Recording(hardened_keys(bytes(32))), MemoryLedger()
    handler = make_handler(KeyRing([recording]), ledger=ledger, clock=now)

    for _ in range(20):  # more than the log has room for in a second, were they no new signatures
        assert isinstance(handler(REQUEST), CertificateReply)

    (line, *others) = [each for each in ledger.decisions if each.asked == "CertificateRequest"]
    assert len(others) == 19
    assert line.verdict == "signed"
    assert line.about == {"receipt_key": RECEIPT_KEY.hex(), "not_before": NOW, "not_after": NOW + MOST_SECONDS}
    digest = certificate_digest(RECEIPT_KEY, REQUEST.not_before, REQUEST.not_after)
    assert line.digest == digest.hex()
    assert recording.digests == [digest] * 20


def test_nothing_is_certified_while_the_log_fails() -> None:
    """If the line can't be written, the identity key signs nothing."""

    class Failing(MemoryLedger):
        def put(self, entry: Entry) -> Any:
            raise LedgerFailed(str(len(entry.decisions)))

    recording = Recording(hardened_keys(bytes(32)))

    reply = make_handler(KeyRing([recording]), ledger=Failing(), clock=now)(REQUEST)

    assert isinstance(reply, Refusal)
    assert reply.tag == "protocol-ledger"
    assert not recording.digests


def test_a_nearly_full_disk_is_left_to_settlements() -> None:
    """Below the reserve of the disk no certificate is signed: nothing depends on one, and each has a line."""

    class Short:
        free_bytes, shortage = 5, "5 bytes are free"

    reply = make_handler(KEYS, clock=now, disk=Short())(REQUEST)

    assert reply == Refusal(7, "protocol-disk", "5 bytes are free")


def test_threat_31_the_identity_key_signs_no_transaction() -> None:
    """A server that names it as a channel's key, as the reserve's or as destination gets no signature."""
    recording = Recording(hardened_keys(bytes(32)))
    keys = KeyRing([recording])
    identity = keys.identity()
    claim = make_claim(identity)
    script = key_script(identity)
    reserve = Reserve(identity, (Coin(OutPoint(sha256(b"coin").digest(), 0), Sat(20_000)),))
    own = make_request(KEYS)
    hostile = [
        SettlementRequest(8, (claim,), own.destination_script, Sat(5_000)),
        mutated(own, "destination_script", script),
        mutated(mutated(make_reserve_request(KEYS), "reserve", reserve), "destination_script", script),
    ]

    replies = [make_handler(keys, own, *hostile)(request) for request in hostile]

    assert [isinstance(reply, Refusal) and reply.tag for reply in replies] == [
        "policy-template",
        "policy-destination",
        "policy-destination",
    ]
    assert not recording.digests
    assert keys.find(make_terms(identity, CLIENT_KEY, EXPIRY)) is None
    assert keys.find_reserve(identity) is None
