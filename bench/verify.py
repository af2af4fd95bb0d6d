"""Measure the CPU time of cryptography and of the check of one payment, in one thread, and R.

    python bench/verify.py

Figures are the minimum of several rounds, so that other work on the machine hardly matters. R is the number of
verifications per second on one core. No server can check more payments than that, so all rates are given as shares of
R.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import machine
import typer
from bitcoin.core import CMutableTransaction, CMutableTxIn, CMutableTxOut, COutPoint
from bitcoin.core.script import CScript, SignatureHash
from coincurve import PrivateKey, PublicKey
from costs import microseconds
from crowd import RULES, client
from rich.console import Console
from rich.table import Table

from paychan.protocol.channel import Channel
from paychan.protocol.payment import Payment, change_problem, decode_v1, encode_v1, encoding_problem


def works() -> dict[str, Callable[[], object]]:
    """Return the measured functions by name."""
    channel, payment = client(1)
    key = PrivateKey(b"\x01" * 32)
    compressed, text = channel.terms.client_key, encode_v1(payment)
    kind = channel.terms.kind
    hasher = kind.payment_preimage(channel.terms, channel.outpoint, channel.funding_sat, channel.change_script)
    verifier = channel.verifier()
    digest, public = hasher.digest(payment.change_sat), PublicKey(compressed)
    assert public.verify(payment.signature, digest, hasher=None)
    assert slow_digest(*client(1)) == digest

    def whole() -> None:
        """Do every check of a payment, as it arrives in v1's query."""
        read = decode_v1(text)
        assert change_problem(read, kind, RULES.dust_sat) is None
        assert verifier.problem(read) is None

    return {
        "verify": partial(public.verify, payment.signature, digest, hasher=None),
        "sign": partial(key.sign, digest, hasher=None),
        "parse a key": partial(PublicKey, compressed),
        "sighash, prefix laid out once per channel": partial(hasher.digest, payment.change_sat),
        "sighash by python-bitcoinlib, transaction built": partial(slow_digest, *client(1)),
        "strict DER": partial(encoding_problem, payment.signature),
        "payment out of base64": partial(decode_v1, text),
        "whole check: base64, flag, dust, DER, sighash, verify": whole,
        "verifier of a channel: key parsed, prefix laid out": channel.verifier,
    }


def slow_digest(channel: Channel, payment: Payment) -> bytes:
    """Hash without the prepared prefix: python-bitcoinlib builds the transaction for the same digest."""
    spent, script = channel.outpoint, CScript(channel.terms.redeem_script)
    output = CMutableTxOut(payment.change_sat, CScript(channel.change_script))
    transaction = CMutableTransaction([CMutableTxIn(COutPoint(spent.txid, spent.vout))], [output])
    return bytes(SignatureHash(script, transaction, 0, payment.flag))


def main(save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True) -> None:
    """Measure each function."""
    facts, before = machine.facts(), machine.verifies_per_second()
    numbers = {name: round(microseconds(work), 2) for name, work in works().items()}
    rate = (before + machine.verifies_per_second()) / 2
    table = Table("", "CPU µs", "in verifies")
    for name, each in numbers.items():
        table.add_row(name, f"{each:.2f}", f"{each / numbers['verify']:.3f}")
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)
    print(f"R {rate:,.0f} verifications/s by the clock, {1e6 / numbers['verify']:,.0f} by the CPU time of an idle core")
    if save:
        of_core = {"R_verifies_per_second": round(rate), "R_of_a_whole_core": round(1e6 / numbers["verify"])}
        print(
            f"Saved as {machine.save('verify', of_core | {'cpu_us': numbers, 'durability': 'nothing is stored'}, facts)}"
        )


if __name__ == "__main__":
    typer.run(main)
