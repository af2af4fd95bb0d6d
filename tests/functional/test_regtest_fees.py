"""Settlements that are not mined at once, on a real chain: their fees rise with time, through every disturbance."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import SIGHASH_ALL, CScript, SignatureHash

from paychan.protocol.types import OutPoint
from tests.lib.crowdedmempool import CrowdedMempool
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, wait_for
from tests.lib.node import Node
from tests.lib.system import System, dead_signer

Market = tuple[System, Node]
HOUR = 3600
BUDGET_SAT = OPENING_SAT // 2
"""The fee limit: `settlement.max_fee_percent` is 50."""

WITNESS_SCRIPT = CScript(b"\x00\x20" + bytes(32))
"""An output of the smallest value that nodes relay: 330 sat, 43 bytes."""


@contextmanager
def market(directory: Path, *flags: str, sections: dict[str, str] | None = None) -> Iterator[Market]:
    with (
        Node(directory / "node", *flags) as node,
        System(directory / "system", sections=sections, node=node) as system,
    ):
        yield system, node


def pass_time(node: Node, unix_time: int) -> None:
    """Move the median time past beyond a time, in blocks without transactions of the mempool."""
    node.set_mock_time(unix_time + 60)
    while node.median_time <= unix_time:
        node.mine_only()


def waiting(node: Node) -> dict[str, int]:
    """Return the transactions in the mempool: txid and fee in satoshi."""
    pool = node.rpc("getrawmempool", True)
    return {txid: int(entry["fees"]["base"] * 100_000_000) for txid, entry in pool.items()}


def newest_fee(node: Node) -> int:
    """Return the fee in satoshi of the only transaction in the mempool; 0 without one."""
    return next(iter(waiting(node).values()), 0)


def settling(system: System, node: Node) -> Customer:
    """Return a channel whose settlement is in the mempool."""
    customer = Customer(system, node)
    customer.opened()
    assert customer.close(OPENING_SAT).status_code == 202
    assert len(waiting(node)) == 1
    return customer


def child_of(customer: Customer, txid: str, outputs: list[tuple[int, bytes]], vout: int = 0) -> bytes:
    """Spend an output to the customer's own key, as only the customer can."""
    unsigned = CTransaction(
        [CTxIn(COutPoint(bytes.fromhex(txid)[::-1], vout))], [CTxOut(sat, CScript(script)) for sat, script in outputs]
    )
    digest = SignatureHash(CScript(customer.change_script), unsigned, 0, SIGHASH_ALL)
    signature = customer.key.sign(digest, hasher=None) + bytes([SIGHASH_ALL])
    script = CScript([signature, customer.key.public_key.format()])
    return bytes(CTransaction([CTxIn(unsigned.vin[0].prevout, script)], unsigned.vout).serialize())


def test_threat_8_the_fee_of_an_unmined_settlement_follows_the_curve(tmp_path: Path) -> None:
    """The rate rises from 40 sat/vB to the cap of 200 towards the deadline, never falls, also not after a restart."""
    with market(tmp_path) as (system, node):
        customer = settling(system, node)
        begun, deadline = max(int(time.time()), node.median_time), customer.terms.expiry.lock_time - 2 * HOUR
        fees = [newest_fee(node)]
        for tenth in (5, 7, 8, 9):
            pass_time(node, begun + (deadline - begun) * tenth // 10)
            wait_for(lambda last=fees[-1]: newest_fee(node) > last, f"higher fee at {tenth} tenths")
            fees.append(newest_fee(node))
            if tenth == 8:
                system.restart_server()
        assert fees == sorted(fees)
        (txid,) = waiting(node)
        size = node.rpc("getmempoolentry", txid)["vsize"]
        assert fees[0] == pytest.approx(40 * size, rel=0.02)
        assert fees[-1] == BUDGET_SAT < 200 * size
        assert customer.record["settlement_txid"] == txid
        node.mine(2)
        customer.ends("closed")
        assert node.rpc("gettxout", txid, 0)["value"] * 100_000_000 == FUNDING_SAT - OPENING_SAT


def test_threat_22_an_evicted_settlement_returns_at_the_minimum_rate(tmp_path: Path) -> None:
    """Other transactions fill the mempool at 100 sat/vB: the evicted settlement returns by itself, and confirms."""
    with market(tmp_path, "-maxmempool=5") as (system, node):
        crowd = CrowdedMempool(node)
        customer = settling(system, node)
        (cheap,) = waiting(node)
        crowd.fill(100)
        assert cheap not in waiting(node)
        wait_for(lambda: customer.record["settlement_txid"] in waiting(node), "in the mempool again")
        assert customer.record["settlement_txid"] != cheap
        assert customer.record["settlement_fee"] <= BUDGET_SAT
        node.mine(3)
        customer.ends("closed")


def test_threat_22_a_higher_relay_fee_is_paid(tmp_path: Path) -> None:
    """A node restarted with a relay fee above the settlement's drops it; it returns with that fee."""
    with market(tmp_path) as (system, node):
        customer = settling(system, node)
        (cheap,) = waiting(node)
        node.stop()
        node.start("-minrelaytxfee=0.0009")
        node.set_mock_time(0)
        wait_for(lambda: len(waiting(node)) == 1 and cheap not in waiting(node), "in the mempool again")
        (txid,) = waiting(node)
        assert waiting(node)[txid] >= 90 * node.rpc("getmempoolentry", txid)["vsize"]
        node.mine(2)
        customer.ends("closed")


def big_child(customer: Customer, node: Node, txid: str) -> None:
    """Pin by weight: one descendant of 95,000 bytes at 1 sat/vB, for which a replacement would have to pay."""
    outputs = 2_200
    rest = FUNDING_SAT - OPENING_SAT - outputs * 330 - 100_000
    node.send_raw(child_of(customer, txid, [(330, WITNESS_SCRIPT)] * outputs + [(rest, customer.change_script)]))


def long_chain(customer: Customer, node: Node, txid: str) -> None:
    """Pin by number: a chain of descendants, as long as the node allows."""
    value, vout = FUNDING_SAT - OPENING_SAT, 0
    for _ in range(24):
        value -= 5_000
        raw = child_of(customer, txid, [(value, customer.change_script)], vout)
        txid = node.send_raw(raw)


@pytest.mark.parametrize("truc", ["accept", "enforce"])
@pytest.mark.parametrize("pin", [big_child, long_chain])
def test_threat_20_a_pinned_settlement_gets_a_child_or_a_replacement(
    tmp_path: Path, pin: Callable[[Customer, Node, str], None], truc: str
) -> None:
    """Descendants of the client's change make a replacement expensive; a child of the server's output pays; both are mined."""
    with market(tmp_path, f"-mempooltruc={truc}") as (system, node):
        customer = settling(system, node)
        (txid,) = waiting(node)
        begun, deadline = max(int(time.time()), node.median_time), customer.terms.expiry.lock_time - 2 * HOUR
        pin(customer, node, txid)
        descendants = set(waiting(node)) - {txid}
        pass_time(node, begun + (deadline - begun) * 3 // 4)
        wait_for(lambda: bool(set(waiting(node)) - descendants - {txid}), "child or replacement")
        assert system.server is not None
        wait_for(lambda: "child pays" in system.server.text() or txid not in waiting(node), "a line of the log")
        pushed = "child pays" in system.server.text()
        print(f"{pin.__name__}, {truc}: {'a child pays' if pushed else 'replaced'}")
        assert pushed == (txid in waiting(node))
        node.mine(2)
        customer.ends("closed")


def refund_with_a_coin(customer: Customer, coin: OutPoint, coin_sat: int, fee_sat: int) -> bytes:
    """Build the refund with an additional coin of the client's, by which it can be replaced later."""
    terms, key = customer.terms, customer.key.public_key.format()
    spent = [(customer.outpoint, terms.redeem_script), (coin, customer.change_script)]
    inputs = [CTxIn(COutPoint(outpoint.txid, outpoint.vout), nSequence=0xFFFFFFFE) for outpoint, _ in spent]
    output = CTxOut(FUNDING_SAT + coin_sat - fee_sat, CScript(customer.change_script))
    unsigned = CTransaction(inputs, [output], nLockTime=terms.expiry.lock_time, nVersion=1)
    signatures = [
        customer.key.sign(SignatureHash(CScript(code), unsigned, index, SIGHASH_ALL), hasher=None) + b"\x01"
        for index, (_, code) in enumerate(spent)
    ]
    scripts = [CScript([signatures[0], 0, terms.redeem_script]), CScript([signatures[1], key])]
    signed = [CTxIn(each.prevout, script, each.nSequence) for each, script in zip(inputs, scripts, strict=True)]
    return bytes(CTransaction(signed, [output], nLockTime=terms.expiry.lock_time, nVersion=1).serialize())


@pytest.mark.parametrize("truc", ["accept", "enforce"])
def test_threat_21_a_cycled_out_settlement_returns_before_the_next_block(tmp_path: Path, truc: str) -> None:
    """After the expiry the client replaces it by a refund, and the refund by a third transaction, in block after block.

    While the refund, which pays more than the budget, is in the mempool, an alarm says so; after that, the settlement
    is back.
    """
    with market(tmp_path, f"-mempooltruc={truc}") as (system, node):
        customer = settling(system, node)
        coin, coin_sat = node.fund(customer.change_address, FUNDING_SAT), FUNDING_SAT
        node.mine_only(coin.txid_hex)
        pass_time(node, customer.terms.expiry.lock_time)
        wait_for(lambda: newest_fee(node) == BUDGET_SAT, "at the budget")
        (ours,) = waiting(node)
        for _ in range(3):
            refund = node.send_raw(refund_with_a_coin(customer, coin, coin_sat, BUDGET_SAT + 30_000))
            assert [*waiting(node)] == [refund]
            wait_for(lambda: "pinned" in str(system.manage("GET", "/health").json()["alarms"]), "alarm")
            third = child_of(customer, coin.txid_hex, [(coin_sat - 100_000, customer.change_script)], coin.vout)
            pushing_out = node.send_raw(third)
            wait_for(lambda there={ours, pushing_out}: set(waiting(node)) == there, "the settlement again")
            node.mine_only(pushing_out)
            coin, coin_sat = OutPoint.parse(pushing_out, 0), coin_sat - 100_000
        node.mine(2)
        customer.ends("closed")
        assert customer.record["settlement_txid"] == ours
        wait_for(lambda: "pinned" not in str(system.manage("GET", "/health").json()["alarms"]), "the end of the scan")


def drained(system: System, node: Node) -> Customer:
    """Return a drained channel, which waits for others to settle with."""
    customer = Customer(system, node)
    customer.opened()
    assert customer.pay(FUNDING_SAT).status_code == 202
    return customer


def test_threat_23_a_batch_settles_without_the_input_that_is_gone(tmp_path: Path) -> None:
    """Three drained channels wait; a reorg and a double-spend remove one's funding: the others settle in one transaction."""
    with market(tmp_path, sections={"settlement": "batch_seconds = 3600"}) as (system, node):
        customers = [drained(system, node) for _ in range(2)]
        thief = Customer(system, node)
        funding = thief.fund()
        node.mine()
        wait_for(lambda: thief.open().status_code == 201, "opened")
        assert thief.pay(FUNDING_SAT).status_code == 202
        assert not waiting(node)
        node.invalidate(1)
        double_spend = node.replace(funding)
        node.mine_only(double_spend)
        pass_time(node, max(int(time.time()), node.median_time) + HOUR)

        wait_for(lambda: len(waiting(node)) == 1, "batch")
        (txid,) = waiting(node)
        spent = {txin["txid"] for txin in node.rpc("getrawtransaction", txid, True)["vin"]}
        assert spent == {customer.outpoint.txid_hex for customer in customers}
        node.mine(2)
        for customer in customers:
            customer.ends("closed")
        assert thief.record["status"] != "closed"


def test_a_batch_pays_more_as_a_whole(tmp_path: Path) -> None:
    """All channels of a batch adopt the same replacement, whichever starts it; a restart changes nothing."""
    with market(tmp_path, sections={"settlement": "batch_seconds = 600\nbatch_channels = 3"}) as (system, node):
        customers = [drained(system, node) for _ in range(3)]
        wait_for(lambda: len(waiting(node)) == 1, "batch")
        ((first, fee),) = waiting(node).items()
        begun, deadline = max(int(time.time()), node.median_time), customers[0].terms.expiry.lock_time - 2 * HOUR
        pass_time(node, begun + (deadline - begun) * 3 // 4)
        system.restart_server()
        wait_for(lambda: first not in waiting(node) and len(waiting(node)) == 1, "dearer")
        ((second, more),) = waiting(node).items()
        assert more > fee
        assert len(node.rpc("getrawtransaction", second, True)["vin"]) == 3
        wait_for(lambda: {c.record["settlement_txid"] for c in customers} == {second}, "adopted by all")
        node.mine(2)
        for customer in customers:
            customer.ends("closed")


def test_threat_18_the_record_shows_the_settlement_that_confirms(tmp_path: Path) -> None:
    """If a miner mines an earlier version instead of the newest, the channel is closed with the earlier txid."""
    with market(tmp_path) as (system, node):
        customer = settling(system, node)
        (first,) = waiting(node)
        raw = node.rpc("getrawtransaction", first)
        begun, deadline = max(int(time.time()), node.median_time), customer.terms.expiry.lock_time - 2 * HOUR
        pass_time(node, begun + (deadline - begun) * 3 // 4)
        wait_for(lambda: first not in waiting(node), "replaced")
        node.mine_only(raw)
        node.mine()
        customer.ends("closed")
        assert customer.record["settlement_txid"] == first
        assert node.rpc("gettxout", first, 0) is not None


def test_threat_24_settlements_need_no_coin_of_the_operator(tmp_path: Path) -> None:
    """With an empty reserve and at the cap, the fee comes out of the channel's earnings, down to the last step."""
    with market(tmp_path, sections={"settlement": "max_fee_percent = 100"}) as (system, node):
        customer = settling(system, node)
        pass_time(node, customer.terms.expiry.lock_time - 2 * HOUR)
        wait_for(lambda: newest_fee(node) >= 160 * 340, "near the cap")
        assert system.manage("GET", "/totals").json()["reserve"]["sat"] == 0
        node.mine(2)
        customer.ends("closed")


def test_threat_24_a_coin_of_the_reserve_pays_the_missing_fee(tmp_path: Path) -> None:
    """Of 1,500 sat received, 1,044 are needed as fee, but 700 must stay: a reserve coin helps, and its rest returns."""
    sections = {
        "settlement": "max_fee_percent = 100\nfee_sat_per_vb = 3",
        "open": "base_price_sat = 0\nadd_settlement_fee = false",
    }
    with market(tmp_path, sections=sections) as (system, node):
        reserve = system.manage("GET", "/totals").json()["reserve"]["address"]
        program = Path(sys.executable).with_name("paychan")
        command = [program, "status", system.server_file]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "200"}).stdout
        assert reserve in said
        coin = node.fund(reserve, 50_000)
        customer = Customer(system, node)
        customer.fund()
        node.mine()
        wait_for(lambda: customer.open(1_500).status_code == 201, "opened")
        assert system.manage("GET", "/totals").json()["reserve"]["sat"] == 50_000
        path = f"/channels/{customer.outpoint.txid_hex}/{customer.outpoint.vout}/close"
        assert system.manage("POST", path).status_code == 200

        ((txid, fee),) = waiting(node).items()
        transaction = node.rpc("getrawtransaction", txid, True)
        assert [OutPoint.parse(txin["txid"], txin["vout"]) for txin in transaction["vin"]] == [customer.outpoint, coin]
        change, rest = transaction["vout"]
        assert change["value"] * 100_000_000 == FUNDING_SAT - 1_500
        assert (rest["scriptPubKey"]["address"], rest["value"] * 100_000_000) == (reserve, 50_000 + 1_500 - fee)
        assert 1_044 < 3 * transaction["vsize"] <= fee <= 1_500
        node.mine(2)
        customer.ends("closed")


def double_spend(node: Node, funding: OutPoint) -> str:
    """Sign, and store, a transaction that double-spends the inputs of a funding transaction to the node's wallet."""
    spent = node.rpc("getrawtransaction", funding.txid_hex, True)["vin"]
    inputs = [{"txid": each["txid"], "vout": each["vout"]} for each in spent]
    raw = node.rpc("createrawtransaction", inputs, [{node.address(): "0.1"}])
    return str(node.rpc("signrawtransactionwithwallet", raw, wallet="miner")["hex"])


def test_fault_05_a_batch_that_lost_a_member_after_a_reorg_is_settled_by_the_rest(tmp_path: Path) -> None:
    """A channel that cannot pay the batch's rate is not in it; after the double-spend of a member, the others are closed."""
    sections = {
        "settlement": "batch_seconds = 600\nbatch_channels = 4",
        "open": "base_price_sat = 0\nadd_settlement_fee = false",
    }
    with market(tmp_path, sections=sections) as (system, node):
        small, others = Customer(system, node), [Customer(system, node) for _ in range(2)]
        small.fund(6_000)
        for each in others:
            each.fund()
        node.mine()
        thief = Customer(system, node)
        theft = double_spend(node, thief.fund())
        node.mine()
        wait_for(lambda: small.open(FUNDING_SAT - 1_000).status_code == 201, "opened")
        for each in (thief, *others):
            wait_for(lambda each=each: each.open().status_code == 201, "opened")  # type: ignore[misc]
        for each in (thief, *others, small):
            assert each.pay(FUNDING_SAT).status_code == 202
        wait_for(lambda: len(waiting(node)) == 2, "batch of three, and the small one alone")
        inputs = {txid: node.rpc("getrawtransaction", txid, True)["vin"] for txid in waiting(node)}
        assert sorted(len(each) for each in inputs.values()) == [1, 3]
        (alone,) = (txid for txid, vin in inputs.items() if len(vin) == 1)
        assert inputs[alone][0]["txid"] == small.outpoint.txid_hex
        node.mine(2)
        for each in (thief, *others, small):
            each.ends("closed")

        node.invalidate(3)
        node.mine_only(theft)
        for _ in range(3):
            node.mine_only()
        for each in others:
            wait_for(lambda each=each: each.record["settlement_txid"] in waiting(node), "alone")  # type: ignore[misc]
        node.mine(2)
        for each in (*others, small):
            each.ends("closed")


def test_fault_09_a_fee_above_the_signers_limit_is_lowered(tmp_path: Path) -> None:
    """Eight hours before expiry the node relays from 56 % of the received sum; the signer allows 50 % until six hours before.

    The server signs for that and broadcasts once the node accepts it. Until then an alarm names both fees.
    """
    sections = {
        "open": "min_duration_hours = 9",
        "channel": "settlement_period_hours = 9",
        "settlement": "margin_hours = 8",
    }
    with market(tmp_path, sections=sections) as (system, node):
        customer = Customer(system, node, int(time.time()) + 20 * HOUR)
        customer.opened()
        with dead_signer(system, node):
            assert customer.close(OPENING_SAT).status_code == 503
            node.stop()
            node.start("-minrelaytxfee=0.0016")
            pass_time(node, customer.terms.expiry.lock_time - 8 * HOUR)
        wait_for(lambda: customer.record["settlement_fee"] == BUDGET_SAT, "signed for what the signer allows")

        def alarms_text() -> str:
            return str(system.manage("GET", "/health").json()["alarms"])

        wait_for(lambda: "does not let it be replaced" in alarms_text(), "an alarm")
        assert re.search(rf"policy-fee: fee of \d+ sat, want up to {BUDGET_SAT} sat", alarms_text())
        clock = node.rpc("getblockheader", node.best)["time"]
        node.stop()
        node.start(f"-mocktime={clock}")
        wait_for(lambda: newest_fee(node) == BUDGET_SAT, "handed in")
        node.mine(2)
        customer.ends("closed")
        wait_for(lambda: '"pinned"' not in system.manage("GET", "/health").text, "the alarm has ended")


def test_fault_09_past_the_deadline_the_fee_may_exceed_the_share(tmp_path: Path) -> None:
    """The node relays from 160 sat/vB, 56 % of the received sum: the server pays it, with an alarm of its own kind."""
    sections = {
        "open": "min_duration_hours = 2",
        "channel": "settlement_period_hours = 2",
        "settlement": "margin_hours = 1",
    }
    with market(tmp_path, sections=sections) as (system, node):
        customer = Customer(system, node, int(time.time()) + 20_400)
        customer.opened()
        assert customer.close(OPENING_SAT).status_code == 202
        node.stop()
        node.start("-minrelaytxfee=0.0016")
        pass_time(node, customer.terms.expiry.lock_time - HOUR - 60)
        assert not waiting(node)
        pass_time(node, customer.terms.expiry.lock_time - HOUR)
        wait_for(lambda: len(waiting(node)) == 1, "settled beyond the share")
        assert OPENING_SAT // 2 < newest_fee(node) < OPENING_SAT * 6 // 10

        def alarmed() -> bool:
            alarms = [alarm for alarm in system.manage("GET", "/health").json()["alarms"] if alarm["kind"] == "fee"]
            said = f"of {OPENING_SAT} sat, more than 50 %"
            return [(each["channel"], said in each["text"]) for each in alarms] == [(str(customer.outpoint), True)]

        wait_for(alarmed, "an alarm of its own")
        node.mine(2)
        customer.ends("closed")
        wait_for(lambda: '"fee"' not in system.manage("GET", "/health").text, "the alarm has ended")
