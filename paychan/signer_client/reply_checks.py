"""Checks of the signer's replies before any use: the first settlement that is stored is the one that is broadcast."""

from __future__ import annotations

from collections.abc import Callable

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError
from coincurve import PublicKey

from paychan.protocol.address import key_script
from paychan.protocol.certificate import Certificate
from paychan.protocol.errors import PaychanError
from paychan.protocol.keys import check_public_key
from paychan.protocol.kinds.p2pkh import read_key_input
from paychan.protocol.settlement import (
    Settlement,
    build_settlement,
    sign_child,
    sign_settlement,
)
from paychan.protocol.tx import unlockings_of
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.signer_messages import (
    AgainReply,
    CertificateReply,
    CertificateRequest,
    ChildRequest,
    SettlementRequest,
)
from paychan.signer_client.base import SignerRefused

WRONG_REPLY = "protocol-reply"
"""Tag of a reply that does not fit its request."""


def check_key(key: bytes, name: str) -> None:
    """Check that the bytes are a public key. Raises `SignerRefused`, like all checks here."""
    try:
        check_public_key(key, name)
    except PaychanError as error:
        raise SignerRefused(WRONG_REPLY, str(error)) from None


def check_settlement(came: Settlement, request: SettlementRequest) -> None:
    """Check that the settlement is the one that claims, destination, fee and reserve determine."""
    _check_rebuilt(came, lambda: _rebuild(came, request))


def check_child(came: Settlement, request: ChildRequest) -> None:
    """Check that the child is the requested one; the txid that it spends is not checked."""
    _check_rebuilt(came, lambda: _rebuild_child(came, request))


def check_certificate(came: CertificateReply, request: CertificateRequest) -> Certificate:
    """Return the certificate of the requested key and times, after checking its signature."""
    certificate = Certificate(
        came.identity_key, request.receipt_key, request.not_before, request.not_after, came.signature
    )
    if problem := certificate.problem():
        raise SignerRefused(WRONG_REPLY, f"not the certificate that was requested: {problem}")
    return certificate


def check_again(reply: AgainReply, outpoint: OutPoint) -> None:
    """Check that the reply is about this outpoint, and that its settlement, if any, follows from its request and claim."""
    if reply.claim.outpoint != outpoint:
        raise SignerRefused(WRONG_REPLY, f"no claim of {outpoint}")
    if reply.settlement is None or reply.request is None:
        if (reply.settlement is None) != (reply.request is None):
            raise SignerRefused(WRONG_REPLY, "a settlement without its request")
        return
    if reply.claim not in reply.request.claims:
        raise SignerRefused(WRONG_REPLY, f"the claim of {outpoint} is not in the request")
    check_settlement(reply.settlement, reply.request)


def _check_rebuilt(came: Settlement, rebuild: Callable[[], Settlement]) -> None:
    try:
        rebuilt = rebuild()
    except (SerializationError, ValueError, IndexError) as error:
        raise SignerRefused(WRONG_REPLY, f"not a transaction of these claims: {error}") from None
    if rebuilt != came:
        raise SignerRefused(WRONG_REPLY, "the transaction is not the requested one")


def _rebuild(settlement: Settlement, request: SettlementRequest) -> Settlement:
    """Build the settlement again, with the server's signatures taken from the one that the signer returned.

    Raises:
        SerializationError, IndexError: not a transaction, or one without these inputs.
        ValueError: a signature is not the server's signature of this transaction.
    """
    claims, reserve = request.claims, request.reserve
    unlockings = unlockings_of(CTransaction.deserialize(settlement.transaction))

    def server_signature(index: int, digest: bytes) -> bytes:
        if reserve is not None and index >= len(claims):
            return _verified(read_key_input(unlockings[index])[0], reserve.public_key, digest)
        terms = claims[index].terms
        spend = terms.kind.recognise(unlockings[index])
        return _verified(spend.server_signature if spend else b"", terms.server_key, digest)

    return sign_settlement(claims, request.destination_script, request.fee_sat, server_signature, reserve)


def _rebuild_child(child: Settlement, request: ChildRequest) -> Settlement:
    """Build the child again, with the parent's txid and the destination's key taken from it.

    Raises what `_rebuild` does.
    """
    parent = request.parent
    unsigned = build_settlement(parent.claims, parent.destination_script, parent.fee_sat, parent.reserve)
    transaction = CTransaction.deserialize(child.transaction)
    signature, public_key = read_key_input(unlockings_of(transaction)[0])
    spent = Settlement(unsigned.serialize(), bytes(transaction.vin[0].prevout.hash), parent.fee_sat)
    if key_script(public_key) != parent.destination_script:
        msg = "its key is not the destination's"
        raise ValueError(msg)
    return sign_child(spent, public_key, request.fee_sat, lambda _, digest: _verified(signature, public_key, digest))


def _verified(signature_with_flag: bytes, public_key: bytes, digest: bytes) -> bytes:
    """Return a signature without its hash flag, after verifying it."""
    signature = signature_with_flag[:-1]
    # libsecp256k1 accepts only strict DER with low S; a signature that can't be parsed is a ValueError
    if not PublicKey(public_key).verify(signature, digest, hasher=None):
        msg = f"no signature of {public_key.hex()}"
        raise ValueError(msg)
    return signature
