"""What the signer sends is checked before anybody uses it: the first settlement stored is the one that will be published."""

from __future__ import annotations

from collections.abc import Callable

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError
from coincurve import PublicKey

from paychan.protocol.address import key_script
from paychan.protocol.errors import PaychanError
from paychan.protocol.kinds.script import check_public_key
from paychan.protocol.settlement import (
    Settlement,
    build_settlement,
    sign_child,
    sign_settlement,
)
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.signer_messages import AgainReply, ChildRequest, SettlementRequest
from paychan.signer_client.base import SignerRefused

WRONG_REPLY = "protocol-reply"
"""Tag of a reply that is not what was asked for."""

_KEY_BYTES = 33


def check_key(key: bytes, name: str) -> None:
    """Check that it is a public key. Raises `SignerRefused`, as all checks here do."""
    try:
        check_public_key(key, name)
    except PaychanError as error:
        raise SignerRefused(WRONG_REPLY, str(error)) from None


def check_settlement(came: Settlement, request: SettlementRequest) -> None:
    """Check that it is what claims, destination, fee and reserve mean."""
    _check_rebuilt(came, lambda: _rebuild(came, request))


def check_child(came: Settlement, request: ChildRequest) -> None:
    """Check that it is what was asked for, but for the txid that it spends."""
    _check_rebuilt(came, lambda: _rebuild_child(came, request))


def check_again(reply: AgainReply, outpoint: OutPoint) -> None:
    """Check that it is about this outpoint, and that its settlement, if any, is what its request and claim mean."""
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
        raise SignerRefused(WRONG_REPLY, "another transaction than the one asked for")


def _rebuild(settlement: Settlement, request: SettlementRequest) -> Settlement:
    """Make the settlement again, with the server's signatures taken out of the one that came back.

    Raises:
        SerializationError, IndexError: no transaction, or none with these inputs.
        ValueError: a signature is not the server's over this transaction.
    """
    claims, reserve = request.claims, request.reserve
    scripts = [bytes(txin.scriptSig) for txin in CTransaction.deserialize(settlement.transaction).vin]

    def server_signature(index: int, digest: bytes) -> bytes:
        if reserve is not None and index >= len(claims):
            return _verified(scripts[index], 0, reserve.public_key, digest)
        claim = claims[index]
        return _verified(scripts[index], 1 + len(claim.payment.signature_with_flag), claim.terms.server_key, digest)

    return sign_settlement(claims, request.destination_script, request.fee_sat, server_signature, reserve)


def _rebuild_child(child: Settlement, request: ChildRequest) -> Settlement:
    """Make the child again; of its parent it shows the txid alone, and of the destination the key. Raises likewise."""
    parent = request.parent
    unsigned = build_settlement(parent.claims, parent.destination_script, parent.fee_sat, parent.reserve)
    txin = CTransaction.deserialize(child.transaction).vin[0]
    script, spent = bytes(txin.scriptSig), Settlement(unsigned.serialize(), bytes(txin.prevout.hash), parent.fee_sat)
    public_key = script[-_KEY_BYTES:]
    if key_script(public_key) != parent.destination_script:
        msg = "its key is not the destination's"
        raise ValueError(msg)
    return sign_child(spent, public_key, request.fee_sat, lambda _, digest: _verified(script, 0, public_key, digest))


def _verified(script: bytes, start: int, public_key: bytes, digest: bytes) -> bytes:
    """Take the signature that is pushed at `start` of a scriptSig, without its hash flag, once it verifies."""
    signature = script[start + 1 : start + script[start]]
    # libsecp256k1 takes strict DER with low S only; what can't be parsed is a ValueError
    if not PublicKey(public_key).verify(signature, digest, hasher=None):
        msg = f"no signature of {public_key.hex()}"
        raise ValueError(msg)
    return signature
