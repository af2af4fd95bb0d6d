"""Serving and settling are two roles: a process that only serves decides to close, the one that settles goes on."""

from __future__ import annotations

from pathlib import Path

from actors.roles import Serving
from paychan.protocol.channel import Close, CloseReason, State
from tests.lib.world import DebugPayer, accepted, local

PAYER, DRAINED = DebugPayer("roles"), DebugPayer("roles, drained")


async def test_a_process_that_only_serves_leaves_the_settlement_to_another(tmp_path: Path) -> None:
    """Its closing channels stay CLOSING, unsigned; the process that settles takes them up from the store."""
    async with local(tmp_path) as server:
        serving = Serving(server.context)
        for payer in (PAYER, DRAINED):
            accepted(await serving.opener.open(payer.request()))
        accepted(await serving.registry.ask(PAYER.outpoint, PAYER.pays(20_000)))
        accepted(await serving.registry.ask(DRAINED.outpoint, DRAINED.pays(DRAINED.funding_sat)))
        closed = accepted(await serving.registry.ask(PAYER.outpoint, Close(CloseReason.OPERATOR)))
        assert closed.channel.state is State.CLOSING
        accepted(await serving.registry.ask(PAYER.outpoint, Close(CloseReason.OPERATOR)))
        for payer in (PAYER, DRAINED):
            assert (await server.stored(payer)).state is State.CLOSING
        assert not server.signer.calls["sign_settlement"]

        await server.settling.watcher.scan()

        for payer, received in ((PAYER, 20_000), (DRAINED, DRAINED.funding_sat)):
            record = await server.stored(payer)
            assert (record.state, record.received_sat) == (State.CLOSED, received)
