"""Every log line of a channel names the channel, and the request if one caused it: with the real server, signer and node."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from urllib.parse import urlencode

from websockets.sync.client import connect

from paychan.protocol.types import OutPoint
from paychan.protocol.wire.payment_frames import write_payments
from tests.lib.customer import OPENING_SAT, Customer, CustomerV2, code, market, wait_for
from tests.lib.node import Node

Line = dict[str, str]

OF_THE_PROCESS = {
    "files",
    "serving",
    "stopping",
    "http",
    "waiting for a part",
    "a part is usable",
    "a part is not usable",
    "serving although parts are missing",
    "group written",
    "unsettled near expiry",  # has the channels in a list
}
"""Lines that are about no single channel."""

BY_A_REQUEST = {"refused", "payment booked", "payment refused", "request refused", "channel opened"}
"""Lines that only requests cause."""

AT_FIRST_BY_A_REQUEST = {"channel closing", "settlement published"}
"""Lines that a request causes; after the reorg the watcher causes them."""


def lines(log: Path) -> list[Line]:
    """Read the lines in logfmt; another line is a line of no event."""
    found = [
        {name: value.strip('"') for name, value in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)', line)}
        for line in log.read_text().splitlines()
    ]
    assert all("event" in line for line in found), log.read_text()
    return found


def streamed(customer: CustomerV2, *sums: int) -> None:
    """Pay over a stream, one frame for all sums."""
    url = f"{customer.system.url}{customer.path}/stream?{urlencode({'secret': customer.secret})}"
    with connect(url.replace("http", "ws", 1), proxy=None, compression=None) as stream:
        stream.send(write_payments([customer.payment(each) for each in sums]))
        stream.recv(timeout=10)


def paid_and_refused(customer: Customer, paid_sat: int) -> None:
    """Pay by PUT, then send a payment of a smaller sum, which the channel refuses."""
    assert customer.pay(paid_sat).status_code == 200
    assert code(customer.pay(paid_sat - 2)) == (400, "value_backwards")


def expire(node: Node, customer: Customer) -> None:
    node.set_mock_time(customer.terms.expiry.lock_time + 60)
    while node.median_time <= customer.terms.expiry.lock_time:
        node.mine_only()


def test_each_line_about_a_channel_names_it_and_its_request(tmp_path: Path) -> None:
    """Open, pay in v1, v2 and a stream, be refused, close, settle, reorg; another one is lost to its refund."""
    with market(tmp_path, {"log": 'level = "debug"'}) as (system, node):
        first, second, lost = Customer(system, node), CustomerV2(system, node), Customer(system, node)
        for each in (first, second, lost):
            each.opened()
            paid_and_refused(each, OPENING_SAT + 10)
        streamed(second, OPENING_SAT + 20, OPENING_SAT + 30)
        node.stop()
        wait_for(lambda: second.pay(OPENING_SAT + 40).status_code == 503, "refused without a node")
        streamed(second, OPENING_SAT + 40)
        node.start()
        wait_for(lambda: second.pay(OPENING_SAT + 40).status_code == 200, "accepted again")
        assert first.close(OPENING_SAT + 10).status_code == 202
        assert second.close(OPENING_SAT + 40).status_code == 200
        node.mine(2)
        for each in (first, second):
            each.ends("closed")
        node.reorg(3)
        wait_for(lambda: first.record["status"] != "closed", "noticed")
        node.mine(3)
        first.ends("closed")

        assert system.signer is not None
        system.signer.stop()
        txid, vout = str(lost.outpoint).split(":")
        system.manage("POST", f"/channels/{txid}/{vout}/close")
        expire(node, lost)
        refund = node.send_raw(lost.refund().transaction)
        node.mine_only(refund)
        node.mine_only()
        lost.ends("lost")

    found = lines(system.directory / "server.log")
    check(found, [each.outpoint for each in (first, second, lost)])


def check(found: list[Line], outpoints: list[OutPoint]) -> None:
    """Each line has its ids, and each turn of the channels' lives is there."""
    names = {str(outpoint) for outpoint in outpoints}
    lives = defaultdict[str, list[str]](list)
    for line in found:
        if line["event"] in OF_THE_PROCESS:
            continue
        if line["event"] != "request refused":  # a refused opening is about no channel
            assert line.get("channel") in names, line
        life = lives[line.get("channel", "")]
        is_first = line["event"] in AT_FIRST_BY_A_REQUEST and line["event"] not in life
        if line["event"] in BY_A_REQUEST or is_first:
            assert re.fullmatch(r"[0-9a-f]{6}-[0-9]+", line.get("request", "")), line
        life.append(line["event"])
    first, second, lost = (lives[str(outpoint)] for outpoint in outpoints)
    for life in (first, second):
        assert BY_A_REQUEST - {"refused"} | AT_FIRST_BY_A_REQUEST | {"channel settled"} <= set(life)
    assert "refused" in second, "the line of the incident number that the client got"
    assert first.count("channel settled") == 2, "the reorg took the settlement back"
    assert second.count("payment booked") == 4, "opening, two PUTs, and one write for both payments of the frame"
    assert {"channel opened", "settlement waits", "channel lost"} <= set(lost)
    asked = {line["request"] for line in found if "request" in line}
    assert len(asked) >= 3 * 4, "each request has an id of its own"
