"""Options of the payer's commands for the payer's own view of the chain, and for signing a refund."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NodeOption = Annotated[str, typer.Option("--node", envvar="PAYCHAN_NODE", help="Your own bitcoind: http://host:port.")]
CredentialsOption = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        envvar="PAYCHAN_CREDENTIALS",
        help="File with user:password of the node, such as its .cookie.",
    ),
]
ElectrumOption = Annotated[
    str,
    typer.Option("--electrum", envvar="PAYCHAN_ELECTRUM", help="Electrum server: ssl://host:port or tcp://host:port."),
]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--certificate",
        envvar="PAYCHAN_CERTIFICATE",
        help="The Electrum server's own certificate, if no certificate authority signed it.",
    ),
]
RateOption = Annotated[
    int | None,
    typer.Option("--fee-rate", min=1, help="Satoshi per byte. \\[default: the chain's estimate if available, else 2]"),
]
ToOption = Annotated[str, typer.Option("--to", help="Address for the refund. \\[default: the change address]")]
MaxFeeOption = Annotated[
    int | None,
    typer.Option(
        "--max-fee", min=1, help="Highest fee in satoshi. \\[default: 10 % of the refunded amount, and 200 per byte]"
    ),
]
TransactionOption = Annotated[
    str,
    typer.Option("--transaction", help="The funding transaction in hex, or a file with it: proves the value."),
]


def read_transaction(text: str) -> str:
    """Return a transaction's hex, given directly or as the name of a file.

    Raises:
        OSError: the file can't be read.
    """
    text = text.strip()
    if not text or len(text) > 255 or all(c in "0123456789abcdefABCDEF" for c in text):
        return text.lower()
    return Path(text).expanduser().read_text(encoding="ascii", errors="replace").strip().lower()
