"""All commands of `paychan-signer` on one command line. `run` alone needs only `signer.service`, and starts sooner."""

from __future__ import annotations

from signer.cli import audit, seed, settings, status
from signer.service import app, main

__all__ = ["app", "main"]

seed.register(app)
app.command()(status.status)
app.command()(status.heartbeat)
app.command()(settings.settings)
app.add_typer(audit.app, name="audit")
