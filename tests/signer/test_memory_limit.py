"""A signer with an address space limit a few megabytes above its use: it answers, refuses or ends."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from paychan.protocol.types import UnixTime
from paychan.protocol.wire.signer_messages import (
    FundingReply,
    Health,
    KeyReply,
    KeyRequest,
    Reply,
    Request,
    SettlementReply,
    SettlementRequest,
    encode_frame,
)
from signer.keys.ring import KeyRing, hardened_keys
from tests.lib.signer_process import REGTEST, SignerProcess
from tests.signer.crowd import memory_bytes
from tests.signer.messages import CLIENT_KEY, EXPIRY, make_funding, make_fundings, make_request, mutated
from tests.signer.talking import HEALTHY, ask, connect, receive
from tests.signer.test_flood import MOST_OUTPUTS

MIB = 1 << 20
CONNECTIONS = 40


def requests(keys: KeyRing, number: int) -> Iterator[Request]:
    """Requests of one connection: keys, the largest funding, a large settlement, small ones."""
    for each in range(20):
        yield KeyRequest(1, CLIENT_KEY, UnixTime(EXPIRY + 1000 * number + each))
    yield make_funding(MOST_OUTPUTS, number)
    yield mutated(make_request(keys, drained=190), "fee_sat", 50_000 + 1_000 * number)
    for fee_sat in range(5_000, 6_000, 100):
        yield mutated(make_request(keys), "fee_sat", fee_sat + number)


def asked(running: SignerProcess, keys: KeyRing, number: int) -> list[tuple[Request, Reply]]:
    """Replies that one connection got before it ended."""
    answers: list[tuple[Request, Reply]] = []
    with suppress(OSError, AssertionError, ValueError), connect(running.socket) as connection:
        for request in requests(keys, number):
            connection.sendall(encode_frame(request))
            reply = receive(connection)
            if reply is None:
                break
            answers.append((request, reply))
    return answers


@pytest.mark.parametrize("spare_mib", [1, 4, 16])
def test_fault_84_under_a_limit_of_memory_it_answers_or_ends(tmp_path: Path, spare_mib: int) -> None:
    """During many connections with large frames, the signer stays healthy or ends; every signature is recorded."""
    with SignerProcess(tmp_path, REGTEST + "[socket]\nrequest_seconds = 60.0\n") as running:
        keys = KeyRing([hardened_keys(running.master)])
        for funding in make_fundings(make_request(keys, drained=190)):
            assert isinstance(ask(running.socket, funding), FundingReply)
        limit = memory_bytes(running.pid, "VmSize") + spare_mib * MIB
        resource.prlimit(running.pid, resource.RLIMIT_AS, (limit, limit))

        with ThreadPoolExecutor(CONNECTIONS) as threads:
            answers = [*threads.map(lambda number: asked(running, keys, number), range(CONNECTIONS))]

        assert running.process is not None
        with suppress(Exception):
            running.process.wait(1)
        if running.process.poll() is None:
            assert ask(running.socket, Health(1)) == HEALTHY
            assert isinstance(ask(running.socket, KeyRequest(1, CLIENT_KEY, EXPIRY)), KeyReply)
            running.stop()
        else:
            assert running.process.returncode != 0
        assert "Traceback" not in running.log.read_text()
        tags = {getattr(reply, "tag", "") for each in answers for _, reply in each}
        assert "protocol-internal" not in tags

        running.start()
        _is_remembered(running, [pair for each in answers for pair in each])


def _is_remembered(running: SignerProcess, answers: list[tuple[Request, Reply]]) -> None:
    """The signed settlement with the highest fee is returned again, and no cheaper one is signed."""
    signed = [(request, reply) for request, reply in answers if isinstance(reply, SettlementReply)]
    small = [pair for pair in signed if isinstance(pair[0], SettlementRequest) and len(pair[0].claims) == 2]
    if not small:
        return
    dearest = max(small, key=lambda pair: pair[0].fee_sat if isinstance(pair[0], SettlementRequest) else 0)
    again = ask(running.socket, dearest[0])
    assert (
        again == dearest[1] or getattr(again, "tag", "") == "policy-replacement"
    )  # one with a higher fee was signed, but not answered
