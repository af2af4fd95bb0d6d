"""Vectors of the original JavaScript client: the project writes and reads the same bytes (RBPCP §18)."""

from __future__ import annotations

import pytest
from bitcoin import base58
from bitcoin.core import CTransaction, Hash

from paychan.protocol.address import decode_address, encode_address
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.keys import parse_public_key
from paychan.protocol.kinds.p2sh import encode_script_number, parse_redeem_script
from paychan.protocol.kinds.refund import Coin, refunds_at_rate, sign_refund
from paychan.protocol.payment import Payment, PaymentVerifier, decode_v1, encode_v1, make_payment, sign_payment
from paychan.protocol.settlement import build_settlement, settlement_size, sign_settlement
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.wire.rbpcp import opening_secret
from tests.lib.kernel import interpreter_accepts
from tests.lib.looped import looped
from tests.lib.sighash import whole_transaction_digest
from tests.lib.vectors import JS_CASES, Case

each_case = pytest.mark.parametrize("case", JS_CASES, ids=lambda case: case.name)
each_payment = looped(
    ("case", "row"),
    [(case, row) for case in JS_CASES for row in case.payments],
    ids=[f"{case.name}-{number}" for case in JS_CASES for number in range(len(case.payments))],
)


@each_case
def test_public_keys_are_those_of_the_private_keys(case: Case) -> None:
    """The vectors' private keys give the public keys of the script."""
    assert case.client_key.public_key.format().hex() == case.raw["client"]["pubkey_hex"]
    assert case.server_key.public_key.format().hex() == case.raw["server"]["pubkey_hex"]
    assert parse_public_key(case.raw["client"]["pubkey_hex"]) == case.terms.client_key


@each_case
def test_private_keys_are_exported_as_the_client_does(case: Case) -> None:
    """With the network's version byte the WIF equals that of bitcoinjs for the same key."""
    for side, key in (("client", case.client_key), ("server", case.server_key)):
        payload = bytes([case.network.wif_version]) + key.secret + b"\x01"

        assert base58.encode(payload + Hash(payload)[:4]) == case.raw[side]["wif"]


@each_case
def test_expiry_is_pushed_as_the_client_pushes_it(case: Case) -> None:
    """Length byte and script number of the expiry equal the client's, for four and five bytes."""
    number = encode_script_number(case.terms.expiry.lock_time)

    assert (bytes([len(number)]) + number).hex() == case.raw["exp_time_script_push_hex"]


@each_case
def test_redeem_script_and_funding_output(case: Case) -> None:
    """Redeem script, its hash, the funding output and its address equal the JavaScript client's."""
    assert case.terms.redeem_script.hex() == case.raw["redeem_script_hex"]
    assert case.terms.funding_script.hex() == case.raw["funding_script_pubkey_hex"]
    assert case.terms.funding_script[2:22].hex() == case.raw["redeem_script_hash160_hex"]
    assert case.terms.funding_address(case.network) == case.raw["funding_address"]


@each_case
def test_redeem_script_is_read_back(case: Case) -> None:
    """The client's script is read as the terms from which it was made."""
    assert parse_redeem_script(bytes.fromhex(case.raw["redeem_script_hex"])) == case.terms


@each_case
def test_addresses_and_scripts_are_each_other(case: Case) -> None:
    """Change and funding address decode to their scriptPubKeys, which encode to the same addresses."""
    assert decode_address(case.raw["change_address"], case.network).hex() == case.raw["change_script_pubkey_hex"]
    assert encode_address(case.change_script, case.network) == case.raw["change_address"]
    assert decode_address(case.raw["funding_address"], case.network) == case.terms.funding_script


@each_case
def test_debug_funding(case: Case) -> None:
    """The debug funding of this client key and expiry equals the JavaScript client's."""
    want = case.raw["debug_funding"]

    outpoint = debug_outpoint(case.terms.client_key, case.terms.expiry.lock_time)

    assert (outpoint.txid_hex, outpoint.vout, DEBUG_FUNDING_SAT) == (want["txid"], want["vout"], want["value"])


@each_payment
def test_payment_digest(case: Case, row: dict[str, str]) -> None:
    """The sighash with a cached prefix equals bitcoinjs' hash of the whole transaction, for every payment."""
    change_sat, kind = Sat(int(row["change_value"])), case.terms.kind

    digest = kind.payment_digest(case.terms, case.outpoint, case.funding_sat, case.change_script, change_sat)

    assert digest.hex() == row["sighash_hex"]
    assert f"{kind.flag(change_sat):02x}" == row["sighash_flag"]


@each_payment
def test_payment_is_signed_to_the_same_bytes(case: Case, row: dict[str, str]) -> None:
    """Signing is deterministic (RFC 6979, low S), so the payment equals the client's in every byte."""
    payment = sign_payment(
        case.client_key, case.terms, case.outpoint, case.funding_sat, case.change_script, Sat(int(row["change_value"]))
    )

    assert payment.signature.hex() == row["signature_der_hex"]
    assert payment.signature_with_flag.hex() == row["signature_with_flag_hex"]


@each_payment
def test_payment_payload_is_written_and_read(case: Case, row: dict[str, str]) -> None:
    """A payment encodes to the client's payload and decodes from it, as bytes and as base64url."""
    payment = make_payment(
        int(row["change_value"]), bytes.fromhex(row["signature_der_hex"]), int(row["sighash_flag"], 16)
    )

    assert encode_v1(payment) == row["payload_base64url"]
    assert decode_v1(row["payload_base64url"]) == payment
    assert (payment.change_sat.to_bytes(8, "little") + payment.signature_with_flag).hex() == row["payload_hex"]


@each_payment
def test_payment_verifies_for_its_channel_alone(case: Case, row: dict[str, str]) -> None:
    """Every payment verifies, but not for another change value, output, or change address."""
    payment = decode_v1(row["payload_base64url"])
    elsewhere = OutPoint(case.outpoint.txid, case.outpoint.vout ^ 1)
    other_script = case.terms.funding_script if case.change_script != case.terms.funding_script else b"\x6a"

    assert PaymentVerifier(case.terms, case.outpoint, case.funding_sat, case.change_script).problem(payment) is None
    assert PaymentVerifier(case.terms, elsewhere, case.funding_sat, case.change_script).problem(payment) is not None
    if payment.change_sat:
        more = Payment(Sat(payment.change_sat + 1), payment.signature, payment.flag)
        assert (
            PaymentVerifier(case.terms, case.outpoint, case.funding_sat, case.change_script).problem(more) is not None
        )
        assert PaymentVerifier(case.terms, case.outpoint, case.funding_sat, other_script).problem(payment) is not None


@each_payment
def test_channel_secret_of_an_opening(case: Case, row: dict[str, str]) -> None:
    """The v2 secret is the hash of signature and flag."""
    assert opening_secret(decode_v1(row["payload_base64url"])).hex() == row["v2_secret_if_opening_hex"]


@each_case
def test_refund_at_a_fixed_fee(case: Case) -> None:
    """The refund equals the client's transaction, and Core's interpreter accepts it."""
    want = case.raw["refund"]
    script = decode_address(want["address"], case.network)

    refund = sign_refund(
        case.client_key, case.terms, case.outpoint, case.funding_sat, script, want["fee"], sequence=want["sequence"]
    )

    assert refund.transaction.hex() == want["tx_hex"]
    assert refund.txid[::-1].hex() == want["txid"]
    transaction = CTransaction.deserialize(refund.transaction)
    assert transaction.vin[0].nSequence == want["sequence"]
    assert transaction.nLockTime == want["locktime"]
    assert bytes(transaction.vin[0].scriptSig).hex() == want["script_sig_hex"]
    digest = whole_transaction_digest(transaction, 0, case.terms.redeem_script)
    assert digest.hex() == want["sighash_hex"]
    assert interpreter_accepts(case.terms.funding_script, refund.transaction, 0, case.funding_sat)


@each_case
def test_refund_at_a_rate(case: Case) -> None:
    """A refund at a rate pays the rate times the size of the refund without a fee."""
    want = case.raw["refund_per_byte"]
    script = decode_address(case.raw["refund"]["address"], case.network)

    coin, rate = Coin(case.outpoint, case.funding_sat), want["satoshi_per_byte"]
    sequence = case.raw["refund"]["sequence"]  # the vectors are from before refunds could be replaced (BIP125)

    refund = refunds_at_rate(case.client_key, case.terms, [coin], script, rate, sequence=sequence)

    assert refund.fee_sat == want["fee"]
    assert refund.transaction.hex() == want["tx_hex"]
    assert refund.txid[::-1].hex() == want["txid"]


@each_case
def test_settlement(case: Case) -> None:
    """The settlement of the last payment equals bitcoinjs' transaction, and Core's interpreter accepts it."""
    want, claim = case.raw["settlement"], case.claim()
    destination = decode_address(want["server_address"], case.network)
    unsigned = build_settlement([claim], destination, want["fee"])

    settlement = sign_settlement(
        [claim], destination, want["fee"], lambda _, digest: case.server_key.sign(digest, hasher=None)
    )

    digest = unsigned.legacy_digest(0, case.terms.redeem_script)
    assert digest.hex() == want["server_sighash_hex"]
    assert want["server_signature_with_flag_hex"] in settlement.transaction.hex()
    assert want["script_sig_hex"] in settlement.transaction.hex()
    assert settlement.transaction.hex() == want["tx_hex"]
    assert settlement.txid[::-1].hex() == want["txid"]
    assert interpreter_accepts(case.terms.funding_script, settlement.transaction, 0, case.funding_sat)


@each_case
def test_settlement_size_is_known_before_signing(case: Case) -> None:
    """The size for the fee is the signed size, or up to two bytes more."""
    claim, want = case.claim(), case.raw["settlement"]

    size = settlement_size([claim], decode_address(want["server_address"], case.network))

    assert want["size_bytes"] <= size <= want["size_bytes"] + 2
