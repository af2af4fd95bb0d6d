"""`paychan receipt verify`: says whether a receipt is genuine, by the file and the server's identity key alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paychan.cli.payer.options import examples
from paychan.cli.terminal import JsonOption, fail, say, show_facts, show_json, warn, whole

if TYPE_CHECKING:
    from paychan.protocol.receipts import Verified

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.callback()
def _group() -> None:
    """Receipts of paid requests. With this callback, `verify` is a command of its own."""


@app.command(
    epilog=examples(
        "paychan receipt verify receipt.json --identity 02f0…9c   (66 hex digits)",
        "paychan receipt verify receipt.json   (shows whose it is)",
        "paychan receipt verify - --json < receipt.json",
    )
)
def verify(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help='The receipt, "-" for standard input.', show_default=False),
    ],
    identity: Annotated[
        str,
        typer.Option(
            "--identity", metavar="HEX", help="Identity key of the server, as its offers and the operator name it."
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Verify a signed receipt: a server certified the key that signed it, and nothing in it was changed since.

    It needs no network and no wallet. Without --identity any server's receipt is genuine: compare the identity that is
    shown. The exit status is 0 if it is genuine, 1 if not, 2 if the file or the identity can't be read.
    """
    from paychan.protocol.errors import PaychanError
    from paychan.protocol.keys import parse_public_key
    from paychan.protocol.receipts import MAX_RECEIPT_BYTES, NotVerified, verify_receipt

    try:
        wanted = parse_public_key(identity, "--identity") if identity else None
    except PaychanError as error:
        fail(str(error), status=2, code=error.code)
    result = verify_receipt(_content(file, MAX_RECEIPT_BYTES + 2), wanted)
    if isinstance(result, NotVerified):
        fail(f"{file} is not genuine: {result.reason}", code=result.fault.value)
    facts = _facts(result)
    if as_json:
        show_json({"verified": True, "identity_compared": wanted is not None, **facts})
    else:
        _show(result, facts, compared=wanted is not None)


def _content(file: Path, most_bytes: int) -> bytes:
    """Read up to this many bytes of a file, or of standard input."""
    try:
        if str(file) == "-":
            return sys.stdin.buffer.read(most_bytes)
        with file.open("rb") as opened:
            return opened.read(most_bytes)
    except OSError as error:
        fail(f"{file} can't be read: {error.strerror}", status=2, code="unreadable")


def _facts(result: Verified) -> dict[str, Any]:
    paid, certificate = result.paid, result.certificate
    return {
        "identity": certificate.identity.hex(),
        "channel": str(paid.channel),
        "method": paid.method,
        "url": paid.url,
        "charged_sat": paid.charged_sat,
        "credit_sat": paid.credit_sat,
        "change_sat": paid.change_sat,
        "time": paid.time,
        "request_sha256": paid.request_sha256.hex() if paid.request_sha256 is not None else None,
        "answer_sha256": paid.answer_sha256.hex() if paid.answer_sha256 is not None else None,
        "receipt_key": certificate.receipt_key.hex(),
        "not_before": certificate.not_before,
        "not_after": certificate.not_after,
    }


def _show(result: Verified, facts: dict[str, Any], *, compared: bool) -> None:
    from paychan.shared.wording import clock, sat

    paid = result.paid
    if compared:
        say("Genuine: the server with this identity was paid.", "green")
    else:
        say("Signed by the server below; its identity was not compared.", "yellow")
    show_facts(
        "",
        ("server", whole(facts["identity"])),
        ("request", whole(f"{paid.method} {paid.url}")),
        ("time", clock(paid.time)),
        ("charged", sat(paid.charged_sat)),
        ("credit left", sat(paid.credit_sat)),
        ("channel", whole(facts["channel"])),
        ("change", sat(paid.change_sat)),
        ("request body", whole(f"SHA-256 {facts['request_sha256']}") if paid.request_sha256 is not None else ""),
        ("answer body", whole(f"SHA-256 {facts['answer_sha256']}") if paid.answer_sha256 is not None else ""),
    )
    if not compared:
        warn(
            "Every payer can run a server and make receipts of it: compare this key with the one that you know, or give "
            "that one as --identity."
        )
