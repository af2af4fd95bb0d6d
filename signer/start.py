"""Entry point of the `paychan-signer` command: names a package that is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of the signer."""
    try:
        from signer.service import main as run  # noqa: PLC0415 - its packages may be missing
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("paychan", "signer"):
            raise
        sys.stderr.write(
            f"paychan-signer: {missing} is missing. Install the server's packages: pip install 'paychan[server]'\n"
        )
        sys.exit(2)
    run()
