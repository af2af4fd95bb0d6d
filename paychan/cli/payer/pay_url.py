"""The command `paychan pay URL`: one request as with curl, paid if the server answers 402."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from paychan.cli.payer.options import WalletOption, examples
from paychan.cli.terminal import JsonOption, err, fail, show_json
from paychan.shared.wording import sat

if TYPE_CHECKING:
    import httpx

    from paychan.client import Bill, Budget, Need, Question

EXAMPLES = examples(
    "paychan pay https://api.example/tile --max 50",
    "paychan pay https://api.example/tile   (asks on the terminal before it pays)",
    "paychan pay https://api.example/draw --max 500 --data @picture.json --header 'Content-Type: application/json'",
    "paychan pay http://localhost:8080/tile --max 50 --open   (opens a channel if the wallet has none)",
    "paychan pay https://api.example/film --max 5000 --output film.mp4",
)


ReceiptOption = Annotated[
    Path | None,
    typer.Option("--receipt", metavar="FILE", help="Ask for a signed receipt, and write it to a file."),
]

MaxOption = Annotated[
    int | None,
    typer.Option("--max", metavar="SAT", min=0, help="Highest price. \\[default: asks on the terminal]"),
]
MaxDayOption = Annotated[
    int | None,
    typer.Option("--max-day", metavar="SAT", min=0, help="Highest sum of the wallet's payments on one day (UTC)."),
]
HeaderOption = Annotated[
    list[str] | None, typer.Option("--header", "-H", metavar="'NAME: VALUE'", help="Header; may be repeated.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the answer to a file.")
]
FollowOption = Annotated[
    bool, typer.Option("--location", "-L", help="Follow redirects; --max then holds for each host that asks.")
]
OpenOption = Annotated[bool, typer.Option("--open", help="Open a channel if the wallet has none to this server.")]


def pay(
    url: Annotated[str, typer.Argument(metavar="URL", help="http:// or https://.", show_default=False)],
    most: MaxOption = None,
    most_a_day: MaxDayOption = None,
    units: Annotated[
        int, typer.Option(min=1, help="Units to pay for before an answer with a price per event, second or the like.")
    ] = 1,
    method: Annotated[
        str, typer.Option("--method", "-X", help="HTTP method. \\[default: GET, or POST with --data]")
    ] = "",
    header: HeaderOption = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Body; @FILE reads a file, @- standard input.")
    ] = None,
    output: OutputOption = None,
    receipt: ReceiptOption = None,
    follow: FollowOption = False,
    opens: OpenOption = False,
    prefer: Annotated[Literal["x402", "mpp"], typer.Option(help="Protocol, if the server offers both.")] = "x402",
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Request a URL, and pay for it over a channel of the wallet if it has a price.

    The answer goes to standard output, and one line about the payment to standard error. The exit status is 1 if the
    answer's status is 400 or more. If the answer is lost, the same command pays with the same payment.
    """
    from paychan.cli.payer.terminal import exit_on_error
    from paychan.client import Purse, paid_client

    with exit_on_error(as_json):
        budget = _budget(most, most_a_day, as_json=as_json)
        if output is not None:
            output.expanduser().open("ab").close()  # an answer that is paid for must have its place
        purse = Purse(budget, wallet, open_channel=_opener(wallet) if opens else None, prefer=prefer, units=units)
        body = None if data is None else _body(data)
        wanted = [] if receipt is None else [("X-Paychan-Want-Receipt", "1")]
        with (
            paid_client(purse, follow_redirects=follow, timeout=60) as client,
            _translated(url),
            client.stream(
                method or ("GET" if body is None else "POST"),
                url,
                headers=_headers(header or []) + wanted,
                content=body,
            ) as answer,
        ):
            bills = [bill for each in (*answer.history, answer) if (bill := each.extensions.get("paychan"))]
            if receipt is not None:
                _keep_receipt(answer, receipt)
            _show(answer, bills, output, as_json=as_json)


def _budget(most: int | None, most_a_day: int | None, *, as_json: bool) -> Budget:
    """Return the limits; without --max, a question on the terminal decides.

    Raises:
        ValueError: neither --max nor a terminal to ask at.
    """
    from paychan.client import Budget
    from paychan.protocol.types import MAX_MONEY_SAT

    if most is not None:
        return Budget(per_request=most, per_day=most_a_day)
    if as_json or not _has_terminal():
        msg = "there is no terminal to ask at: want --max SAT, the highest price to pay"
        raise ValueError(msg)

    def approve(question: Question) -> bool:
        return typer.confirm(f"{question.host} wants {sat(question.price_sat)}. Pay?", err=True)

    return Budget(per_request=MAX_MONEY_SAT, per_day=most_a_day, approve=approve)


def _has_terminal() -> bool:
    return sys.stdin.isatty()


def _opener(wallet: Path | None) -> Any:
    def open_channel(need: Need) -> None:
        from paychan.client import Network, Payer

        network = {"mainnet": Network.LIVE, "regtest": Network.REGTEST}.get(need.network, Network.TEST)
        with Payer(need.pay_url, wallet=wallet, network=network) as payer:
            channel = payer.channel_for(room_sat=need.room_sat)
            err.print(f"Opened channel {channel.name} to {need.pay_url}.", soft_wrap=True)

    return open_channel


class _translated:  # noqa: N801 - used as a function
    """Turns httpx's errors into those of the payer's commands."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        import httpx

        from paychan.client import Unreachable

        if isinstance(error, httpx.TransportError | httpx.InvalidURL | httpx.TooManyRedirects):
            raise Unreachable(url=self._url, reason=str(error) or type(error).__name__) from None


def _headers(lines: list[str]) -> list[tuple[str, str]]:
    """Split `Name: value`. Raises ValueError."""
    found = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            msg = f"header {line!r}: want 'Name: value'"
            raise ValueError(msg)
        found.append((name.strip(), value.strip()))
    return found


def _body(data: str) -> bytes:
    """Return the body. Raises OSError."""
    if data == "@-":
        return sys.stdin.buffer.read()
    return Path(data[1:]).expanduser().read_bytes() if data.startswith("@") else data.encode()


def _keep_receipt(answer: httpx.Response, file: Path) -> None:
    """Write the signed receipt of an answer."""
    import binascii

    try:
        raw = binascii.a2b_base64(answer.headers.get("X-Paychan-Receipt", ""))
    except binascii.Error:
        raw = b""
    if raw:
        file.expanduser().write_bytes(raw + b"\n")
    else:
        err.print("The answer has no signed receipt.", soft_wrap=True)


def _show(answer: httpx.Response, bills: list[Bill], output: Path | None, *, as_json: bool) -> None:
    if as_json:
        _show_json(answer, bills, output)
    else:
        target = sys.stdout.buffer if output is None else output.expanduser().open("wb")
        try:
            for part in answer.iter_bytes():
                target.write(part)
        finally:
            target.flush()
            if output is not None:
                target.close()
        for bill in bills:
            left = f"{sat(bill.left_sat)} are left in channel {bill.channel}"
            err.print(f"Paid {sat(bill.charged_sat)} to {bill.host}; {left}.", soft_wrap=True)
    if answer.status_code >= 400 and not as_json:
        fail(f"the server answered {answer.status_code} {answer.reason_phrase}".rstrip())
    if answer.status_code >= 400:
        raise typer.Exit(1)


def _show_json(answer: httpx.Response, bills: list[Bill], output: Path | None) -> None:
    import base64

    import msgspec

    content = answer.read()
    shown: dict[str, Any] = {
        "status": answer.status_code,
        "url": str(answer.url),
        "headers": [list(each) for each in answer.headers.multi_items()],
        "bills": msgspec.to_builtins(bills),
    }
    if output is not None:
        output.expanduser().write_bytes(content)
        shown |= {"output": str(output)}
    else:
        try:
            shown |= {"body": content.decode()}
        except UnicodeDecodeError:
            shown |= {"body_base64": base64.b64encode(content).decode()}
    show_json(shown)
