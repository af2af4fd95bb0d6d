"""Entry point of the `paychan-signer` command: imports only what the command line needs, and names a missing package.

The service and the commands about keys need cryptography, a sandbox and a ledger; the list of commands, and those that
only ask a running signer or read a file, do not.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

LINES = {
    "run": "Start the signer; the word `run` is optional.",
    "init": "Create the seed that a configuration names, and show it once as 24 words.",
    "recover": "Create the seed file from its backup: 12 to 24 words.",
    "verify": "Compare a backup with each generation in the seed file.",
    "encrypt": "Encrypt a seed file of an earlier release.",
    "passphrase": "Change the passphrase of the seed file.",
    "forget": "Remove an old generation from the seed file.",
    "pubkey": "Show the server's key of a channel, and the destination of its settlement.",
    "export-xpub": "Show the extended public keys (BIP32) of the seed.",
    "earnings": "List the addresses that settlements pay to.",
    "sweep": "Spend earnings on addresses that the signer derived.",
    "status": "Show the state of the running signer.",
    "heartbeat": "Tell the signer that the operator watches it.",
    "settings": "Show all settings of the signer.",
    "rotate": "Change the seed or the destination.",
    "audit": "The log of every decision: verify, show or archive it.",
}
"""The commands, as `paychan-signer --help` lists them."""

KEYLESS = {"status": "status", "heartbeat": "status", "settings": "settings", "audit": "audit"}
"""By command that sees no secret: its module in `signer.cli`."""


def main() -> None:
    """Run the command line of the signer."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    try:
        if first in KEYLESS or first in ("--help", "--version"):
            _run_keyless(first)
        else:
            startup: Any = import_module("paychan.shared.startup")
            with startup.without_packages("rich"):
                import_module("structlog")
            alone = first == "run" or not (first in LINES or first.startswith("-"))
            import_module("signer.service" if alone else "signer.commands").main()
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("paychan", "signer"):
            raise
        sys.stderr.write(
            f"paychan-signer: {missing} is missing. Install the server's packages: pip install 'paychan[server]'\n"
        )
        sys.exit(2)


def _run_keyless(name: str) -> None:
    """Run a command that sees no secret, or show the list of all."""
    program: Any = import_module("signer.cli.program")
    app = program.new_app()
    for each, line in LINES.items():
        if each != name:
            app.command(each, help=line)(_nothing)
    if name in KEYLESS:
        module = import_module(f"signer.cli.{KEYLESS[name]}")
        if name == "audit":
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(getattr(module, name))
    import_module("paychan.shared.logsink").open_missing_descriptors()
    import_module("paychan.shared.encoding").prepare_output()
    typer: Any = import_module("typer")
    import_module("paychan.shared.commandline").run(typer.main.get_command(app), typer)


def _nothing() -> None:
    """Stand in the list of commands for one that this call does not run."""
