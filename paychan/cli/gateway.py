"""`paychan gateway`, and the options by which `up` and `serve` sell a service at one price, without a price list."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paychan.cli.terminal import fail

if TYPE_CHECKING:
    from paychan.config import Gateway

EXAMPLES = """[bold]Examples[/bold]

  paychan gateway http://127.0.0.1:5000 --price 25

  paychan gateway http://127.0.0.1:5000 --price 25 --config config/regtest --port 8080
"""

DEFAULT_PORT = 8080

Upstream = Annotated[
    str | None, typer.Option("--gateway", metavar="URL", help="Sell the answers of the service at this URL.")
]
Price = Annotated[
    int | None, typer.Option("--price", metavar="SAT", min=1, help="Price of a request through the gateway.")
]
GatewayPort = Annotated[
    int, typer.Option("--gateway-port", metavar="PORT", min=0, max=65535, help="Port of the gateway.")
]


def gateway_of(upstream: str | None, price: int | None, port: int) -> Gateway | None:
    """Return the settings that the options mean; None: those of the file."""
    if upstream is None and price is None:
        return None
    if upstream is None or price is None:
        fail("--gateway and --price belong together: --gateway http://127.0.0.1:5000 --price 25", status=2)
    from paychan.config import Gateway

    return Gateway(upstream=upstream, price_sat=price, port=port)


def arguments_of(upstream: str | None, price: int | None, port: int) -> tuple[str, ...]:
    """Return the same options for another command line."""
    if gateway_of(upstream, price, port) is None:
        return ()
    return ("--gateway", str(upstream), "--price", str(price), "--gateway-port", str(port))


def gateway(
    upstream: Annotated[str, typer.Argument(metavar="URL", help="The service whose answers are sold.")],
    price: Annotated[int, typer.Option("--price", metavar="SAT", min=1, help="Price of a request.")],
    config: Annotated[
        Path, typer.Option("--config", metavar="DIRECTORY", help="Directory with server.toml and signer.toml.")
    ] = Path("debug"),
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="Port of the gateway.")
    ] = DEFAULT_PORT,
) -> None:
    """Sell an HTTP service: start signer and server with a gateway before it, and stop both on Ctrl-C.

    Each request has one price here. A price list ([gateway] prices in server.toml) has prices by path, method and unit.
    """
    from paychan.cli.up_command import command

    command(config, upstream, price, port)
