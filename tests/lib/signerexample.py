"""Messages with real bytes for the signer's protocol page: a channel's key, its funding, its settlement, a refusal."""

from __future__ import annotations

import msgspec
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from coincurve import PrivateKey

from paychan.protocol.address import key_script
from paychan.protocol.certificate import certificate_digest
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import sign_payment
from paychan.protocol.settlement import Claim, sign_settlement
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    CertificateReply,
    CertificateRequest,
    FundingReply,
    FundingRequest,
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
    Refusal,
    Reply,
    Request,
    SettlementReply,
    SettlementRequest,
)

SERVER, CLIENT = PrivateKey(b"\x22" * 32), PrivateKey(b"\x11" * 32)

TERMS = make_terms(SERVER.public_key.format(), CLIENT.public_key.format(), UnixTime(1_900_000_000))
DESTINATION = key_script(PrivateKey(b"\x33" * 32).public_key.format())
CHANGE_SCRIPT = key_script(TERMS.client_key)

FUNDING = CTransaction(
    [CTxIn(COutPoint(b"\x44" * 32, 0))], [CTxOut(1_000_000, CScript(TERMS.funding_script))], nVersion=1
)
OUTPOINT = OutPoint(bytes(FUNDING.GetTxid()), 0)
CLAIM = Claim(
    TERMS,
    OUTPOINT,
    Sat(1_000_000),
    CHANGE_SCRIPT,
    sign_payment(CLIENT, TERMS, OUTPOINT, Sat(1_000_000), CHANGE_SCRIPT, Sat(400_000)),
)
SETTLEMENT_REQUEST = SettlementRequest(4, (CLAIM,), DESTINATION, Sat(5_000))
SETTLEMENT = sign_settlement([CLAIM], DESTINATION, Sat(5_000), lambda _, digest: SERVER.sign(digest, hasher=None))
IDENTITY, RECEIPT = PrivateKey(b"\x55" * 32), PrivateKey(b"\x66" * 32)
CERTIFICATE_REQUEST = CertificateRequest(
    6, RECEIPT.public_key.format(), UnixTime(1_800_000_000), UnixTime(1_800_604_800)
)
CERTIFICATE_DIGEST = certificate_digest(
    CERTIFICATE_REQUEST.receipt_key, CERTIFICATE_REQUEST.not_before, CERTIFICATE_REQUEST.not_after
)

ABROAD = msgspec.structs.replace(SETTLEMENT_REQUEST, id=5, destination_script=CHANGE_SCRIPT)

EXAMPLE: list[tuple[str, Request, Reply]] = [
    (
        "The signer's state. The private key of the server's identity is 55…55.",
        Health(1),
        HealthReply(
            1, "regtest", "hardened", False, "", UnixTime(0), 50, Sat(5_000_000), 200, IDENTITY.public_key.format()
        ),
    ),
    (
        "The server's key for the client with private key 11…11 and expiry 2030-03-17 17:46:40 UTC. It is that of private key 22…22.",
        KeyRequest(2, TERMS.client_key, TERMS.expiry.unix_time),
        KeyReply(2, TERMS.server_key, DESTINATION),
    ),
    (
        "The transaction that funds the channel, whose output 0 holds 1,000,000 sat.",
        FundingRequest(3, FUNDING.serialize(), (0,)),
        FundingReply(3),
    ),
    (
        "A settlement: the client's payment leaves it 400,000 sat; of the other 600,000 sat, 5,000 sat are fee.",
        SETTLEMENT_REQUEST,
        SettlementReply(4, SETTLEMENT),
    ),
    (
        "The same, but paid to the client.",
        ABROAD,
        Refusal(
            5,
            "policy-destination",
            f"destination script of 25 bytes beginning {CHANGE_SCRIPT.hex()} is not allowed",
        ),
    ),
    (
        "A certificate: for a week the key of private key 66…66 signs the server's receipts.",
        CERTIFICATE_REQUEST,
        CertificateReply(6, IDENTITY.public_key.format(), IDENTITY.sign(CERTIFICATE_DIGEST, hasher=None)),
    ),
]
