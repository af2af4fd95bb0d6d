"""A server that lies about a channel's new output: the payer signs nothing for it, and records nothing."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from bitcoin.core import (
    CMutableOutPoint,
    CMutableTransaction,
    CMutableTxIn,
    CMutableTxOut,
    CTransaction,
    CTxOut,
)
from bitcoin.core.script import CScript

from paychan.client import Channel, PaymentRefused, ServerMisbehaved, State
from paychan.protocol.kinds.base import SIGHASH_ALL
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.rbpcp import read_v2_body
from tests.client.conftest import OpenChannel
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, Answer, Liar, Lie
from tests.lib.channels import SERVER_DESTINATION, private_key
from tests.lib.sighash import whole_transaction_digest

LEFT_SAT = FUNDING_SAT - OPEN_PRICE_SAT

Change = Callable[[CMutableTransaction], None]


@pytest.fixture
def channel(liar: Liar, opened: OpenChannel) -> Channel:
    """A channel that paid 100 sat, and then had a withdrawal."""
    channel = opened(movable=True)
    channel.pay(100)
    return channel


def settlement(liar: Liar) -> CMutableTransaction:
    """The settlement that moved the channel last."""
    closing = liar.left[-1].closing
    assert closing is not None
    assert closing.settlement is not None
    return CMutableTransaction.from_tx(CTransaction.deserialize(closing.settlement.transaction))


def sign(channel: Channel, changed: CMutableTransaction, seed: str = "liar") -> None:
    """Sign the changed transaction with the server's key."""
    pushed = [data for _, data, _ in changed.vin[0].scriptSig.raw_iter()]
    digest = whole_transaction_digest(changed, 0, channel.record.terms.redeem_script)
    signature = private_key(seed).sign(digest, hasher=None) + bytes([SIGHASH_ALL])
    changed.vin[0].scriptSig = CScript([pushed[0], signature, 1, pushed[3]])


def moving_by(liar: Liar, transaction: CMutableTransaction, vout: int = 0) -> Lie:
    """Build the answer that moves the channel by this transaction."""
    txid = transaction.GetTxid()[::-1].hex()
    location = f"{liar.url}/v2/channels/{txid}/{vout}?secret=x"
    return Lie(change={"transaction": transaction.serialize().hex()}, headers={"Location": location})


def rejects(liar: Liar, channel: Channel, lie: Lie, what: str) -> None:
    """The payment raises, record and refunds stay, no other host gets a request, and the true answer still works."""
    before, requests = channel.record, len(liar.requests)
    liar.lies.append(lie)
    with pytest.raises(ServerMisbehaved, match=what):
        channel.pay(50)

    after = channel.record
    assert (after.funding_outpoint, after.funding_sat) == (before.funding_outpoint, before.funding_sat)
    assert (after.refunds, after.moves, after.earlier_paid_sat) == (before.refunds, (), 0)
    assert after.left_sat == LEFT_SAT - 150
    assert len(liar.requests) == requests + 1
    assert channel.resume().total_paid_sat == OPEN_PRICE_SAT + 150 == liar.received_sat
    assert channel.record.state is State.OPEN


def _value(more: int) -> Change:
    def change(transaction: CMutableTransaction) -> None:
        transaction.vout[0].nValue += more

    return change


def _script(transaction: CMutableTransaction) -> None:
    transaction.vout[0].scriptPubKey = CScript(SERVER_DESTINATION)


def _swapped(transaction: CMutableTransaction) -> None:
    transaction.vout.reverse()


def _drop_outputs(transaction: CMutableTransaction) -> None:
    transaction.vout.clear()


def _other_input(transaction: CMutableTransaction) -> None:
    transaction.vin[0].prevout.hash = b"\x07" * 32


def _other_index(transaction: CMutableTransaction) -> None:
    transaction.vin[0].prevout.n ^= 1


def _lock_time(transaction: CMutableTransaction) -> None:
    transaction.nLockTime = 1


def _sequence(transaction: CMutableTransaction) -> None:
    transaction.vin[0].nSequence = 0


def _version(transaction: CMutableTransaction) -> None:
    transaction.nVersion = 2


CHANGES = {
    "a satoshi more": (_value(1), "value that the channel moved with"),
    "a satoshi less": (_value(-1), "payment in the move"),
    "as much as the payment leaves": (_value(-50), "payment in the move"),
    "a satoshi less than that": (_value(-51), "payment in the move"),
    "nothing": (_value(-LEFT_SAT + 100), "value that the channel moved with"),
    "the server's script": (_script, "script that the channel moved to"),
    "outputs swapped": (_swapped, "script that the channel moved to"),
    "no outputs": (_drop_outputs, "transaction that moved"),
    "another transaction's output": (_other_input, "output that the move spends"),
    "another output": (_other_index, "output that the move spends"),
    "a lock time": (_lock_time, "payment in the move"),
    "another sequence": (_sequence, "payment in the move"),
    "another version": (_version, "payment in the move"),
}


@pytest.mark.parametrize(("change", "what"), CHANGES.values(), ids=CHANGES.keys())
def test_another_transaction_moves_nothing(liar: Liar, channel: Channel, change: Change, what: str) -> None:
    """The server's signature is not enough: inputs, values, script and layout must be those of a signed payment."""
    liar.withdraw()
    changed = settlement(liar)
    change(changed)
    if changed.vout:
        sign(channel, changed)
    rejects(liar, channel, moving_by(liar, changed), what)


def test_a_settlement_of_an_older_payment_moves_nothing(liar: Liar, channel: Channel) -> None:
    """After the settlement of an older payment, the newer payments would be paid twice."""
    channel.pay(10)
    opening = channel.record.sign(LEFT_SAT - 100)
    liar.withdraw()
    changed = settlement(liar)
    pushed = [data for _, data, _ in changed.vin[0].scriptSig.raw_iter()]
    changed.vout[0].nValue = LEFT_SAT - 100
    changed.vin[0].scriptSig = CScript([opening.signature_with_flag, pushed[1], 1, pushed[3]])
    sign(channel, changed)
    liar.lies.append(moving_by(liar, changed))
    with pytest.raises(ServerMisbehaved, match="value that the channel moved with: got 989,900, want"):
        channel.pay(50)
    assert channel.record.moves == ()


def test_without_the_servers_signature_nothing_moves(liar: Liar, channel: Channel) -> None:
    """A settlement without the server's signature cannot be in any chain; a payer that followed it could lose track."""
    liar.withdraw()
    changed = settlement(liar)
    sign(channel, changed, "another key")
    rejects(liar, channel, moving_by(liar, changed), "no signature of the server")


@pytest.mark.parametrize("script_sig", [b"", b"\x4c", b"\x51" * 4, b"\x00\x00\x51\x00"])
def test_an_unsigned_transaction_moves_nothing(liar: Liar, channel: Channel, script_sig: bytes) -> None:
    """Signatures are missing, or the script cannot be parsed."""
    liar.withdraw()
    changed = settlement(liar)
    changed.vin[0].scriptSig = CScript(script_sig)
    rejects(liar, channel, moving_by(liar, changed), "payment in the move")


def test_a_malleated_settlement_moves_the_channel(liar: Liar, channel: Channel) -> None:
    """A relaying node may change the selector and so the txid; signatures and output stay valid."""
    liar.withdraw()
    changed = settlement(liar)
    pushed = [data for _, data, _ in changed.vin[0].scriptSig.raw_iter()]
    changed.vin[0].scriptSig = CScript([pushed[0], pushed[1], b"\x07", pushed[3]])
    assert liar.channel is not None
    malleated = OutPoint(changed.GetTxid(), 0)
    assert malleated != liar.channel.outpoint
    liar.lies.extend([moving_by(liar, changed), Lie(deaf=True, status=503)])
    with pytest.raises(Exception, match="503"):
        channel.pay(50)

    assert channel.record.funding_outpoint == str(malleated)


@pytest.mark.parametrize(
    "text",
    ["zz", "00", "0" * 10_000, "01000000" + "fd" * 40, "01000000" + "ff" * 40, "\u0661" * 100],
    ids=["no hex", "a byte", "zeros", "many inputs", "too many inputs", "other digits"],
)
def test_text_that_is_no_transaction_moves_nothing(liar: Liar, channel: Channel, text: str) -> None:
    """Any text in place of a transaction is parsed without harm."""
    liar.withdraw()
    rejects(liar, channel, Lie(change={"transaction": text}), "transaction that moved")


def test_bytes_after_the_transaction_move_nothing(liar: Liar, channel: Channel) -> None:
    """Bytes after the transaction are an error."""
    liar.withdraw()
    text = settlement(liar).serialize().hex() + "00"
    rejects(liar, channel, Lie(change={"transaction": text}), "transaction that moved")


@pytest.mark.parametrize(
    "location",
    [
        "",
        "/v2/channels/{txid}/1",
        "/v2/channels/{other}/0",
        "/v1/channels/{txid}/0",
        "/v2/channels/{txid}/0/close",
        "/v2/channels/{txid}",
        "//{txid}/0",
        "/%2e%2e/v2/channels/{txid}/0",
    ],
)
def test_another_location_is_not_followed(liar: Liar, channel: Channel, location: str) -> None:
    """`Location` must name the first output of this very transaction, below the server's URL."""
    liar.withdraw()
    txid = settlement(liar).GetTxid()[::-1].hex()
    lie = Lie(headers={"Location": location.format(txid=txid, other="5e" * 32)})
    rejects(liar, channel, lie, "place that the channel moved to")


@pytest.mark.parametrize("elsewhere", ["http://evil.example", "https://127.0.0.1:1", "//evil.example"])
def test_no_request_leaves_for_another_host(liar: Liar, channel: Channel, elsewhere: str) -> None:
    """A server behind a proxy may name a wrong host in any `Location`: payments go to the URL that the payer chose."""
    liar.withdraw()
    liar.public_url = elsewhere

    assert channel.pay(50).total_paid_sat == OPEN_PRICE_SAT + 150 == liar.received_sat


def test_a_channel_that_can_not_move_is_not_moved(liar: Liar, opened: OpenChannel) -> None:
    """A redirect of a channel that is not movable is refused before its content is read."""
    channel = opened()
    liar.lies.append(Lie(status=318, headers={"Location": f"{liar.url}/v2/channels/{'5e' * 32}/0"}))
    with pytest.raises(ServerMisbehaved, match="redirect"):
        channel.pay(50)


def test_repeated_moves_are_limited(liar: Liar, channel: Channel) -> None:
    """A server that moves the channel again and again is stopped after three moves; each was saved with its refund."""
    at = [channel.record.outpoint]

    def move_on(_method: str, _target: str, body: bytes) -> Answer:
        """Settle the incoming payment at once; the fee comes from coins that do not exist."""
        payment = read_v2_body(body).payment
        vin = [
            CMutableTxIn(CMutableOutPoint(at[-1].txid, at[-1].vout)),
            CMutableTxIn(CMutableOutPoint(b"\x09" * 32, 0)),
        ]
        vout = [CMutableTxOut(payment.change_sat, CScript(channel.record.terms.funding_script))]
        moving = CMutableTransaction(vin, vout, nVersion=1)
        moving.vin[0].scriptSig = CScript([payment.signature_with_flag, b"", 1, channel.record.terms.redeem_script])
        sign(channel, moving)
        at.append(OutPoint(moving.GetTxid(), 0))
        location = {"Location": f"/v2/channels/{at[-1].txid_hex}/0"}
        return Answer(318, json.dumps({"transaction": moving.serialize().hex()}).encode(), location)

    liar.truth = move_on  # type: ignore[method-assign]
    with pytest.raises(ServerMisbehaved, match="moves during one request"):
        channel.pay(50)

    assert len(channel.record.moves) == 3
    assert len(channel.record.refunds) == 4
    assert channel.paid_sat == OPEN_PRICE_SAT + 150


def test_further_outputs_of_the_settlement_are_ignored(liar: Liar, channel: Channel) -> None:
    """Only the first output belongs to the payer: the server may choose the others, if it signs them."""
    liar.withdraw()
    changed = settlement(liar)
    changed.vout.append(CTxOut(1000, CScript(SERVER_DESTINATION)))
    sign(channel, changed)
    liar.lies.extend([moving_by(liar, changed), Lie(deaf=True, status=503)])
    with pytest.raises(Exception, match="503"):
        channel.pay(50)
    assert len(channel.record.moves) == 1


def test_value_in_the_settlement_does_not_count_again(liar: Liar, channel: Channel) -> None:
    """At the new output, a result may count only the value that the settlement did not include."""
    liar.lies.append(Lie(status=400, body=b'{"code":"application_error","error":"no answer"}'))
    with pytest.raises(PaymentRefused):
        channel.pay(100)
    liar.withdraw()
    liar.lies.extend([None, Lie(change={"value_received": 150})])
    with pytest.raises(ServerMisbehaved, match="value_received: got 150, want 50"):
        channel.pay(150)
