"""`paychan serve`: the server process alone."""

from __future__ import annotations

from paychan.cli.gateway import DEFAULT_PORT, GatewayPort, Price, Upstream, gateway_of
from paychan.cli.options import ConfigFile
from paychan.cli.terminal import fail

EXAMPLES = """[bold]Examples[/bold]

  paychan serve debug

  paychan serve debug --gateway http://127.0.0.1:5000 --price 25
"""


def serve(
    file: ConfigFile, gateway: Upstream = None, price: Price = None, gateway_port: GatewayPort = DEFAULT_PORT
) -> None:
    """Start the server alone; node and signer may start before or after it.

    PORT in the environment overrides http.port.
    """
    sells = gateway_of(gateway, price, gateway_port)
    from paychan.shared.startup import without_packages

    with without_packages("rich", "click", "pygments"):
        from paychan.app import run
        from paychan.config import check_environment, load_server_config
        from paychan.parts import StartError
        from paychan.protocol.settings import SettingsError
        from paychan.store.base import StoreFailed

    try:
        check_environment()
        run(load_server_config(file, sells), str(file))
    except (SettingsError, StartError, StoreFailed) as error:
        fail(str(error), status=2)
