"""Options of the payer's commands that name the payer's own view of the chain, and how a refund is signed."""

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
        help="The Electrum server's own certificate, if nobody signed it.",
    ),
]
RateOption = Annotated[
    int | None,
    typer.Option("--fee-rate", min=1, help="Satoshi per byte. \\[default: the chain's estimate if asked, or else 2]"),
]
ToOption = Annotated[str, typer.Option("--to", help="Address that gets everything. \\[default: the change address]")]
MaxFeeOption = Annotated[
    int | None,
    typer.Option(
        "--max-fee", min=1, help="Most satoshi to pay as fee. \\[default: 10 % of what comes back, and 200 per byte]"
    ),
]
TransactionOption = Annotated[
    str,
    typer.Option("--transaction", help="The funding transaction in hex, or a file that holds it: proves the value."),
]


def read_transaction(text: str) -> str:
    """Return a transaction's hex, given as such or as the name of a file.

    Raises:
        OSError: the file can't be read.
    """
    text = text.strip()
    if not text or len(text) > 255 or all(c in "0123456789abcdefABCDEF" for c in text):
        return text.lower()
    return Path(text).expanduser().read_text(encoding="ascii", errors="replace").strip().lower()
