"""The payer's own node decides: against lying servers, for deposits of every kind, and for replaced refunds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bitcoin.core import CTransaction
from typer.testing import CliRunner, Result

from paychan.cli.payer.channel import app
from paychan.client import Channel, Network, Payer
from paychan.protocol.types import OutPoint
from tests.client.conftest import IMPATIENT
from tests.client.liar import Liar, Lie
from tests.client.test_routes import record_of
from tests.lib.customer import wait_for
from tests.lib.electrumx import ElectrumX
from tests.lib.node import Node
from tests.lib.vectors import JS_CASES

FUNDING_SAT = 600_000
BUDGET_SAT = 2_000
"""More than the fee of any refund here at the minimum rate."""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "node", "-txindex=1") as node:
        yield node


@pytest.fixture
def liar() -> Iterator[Liar]:
    with Liar() as liar:
        yield liar


@pytest.fixture
def wallet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: Node) -> Path:
    """A wallet, and the payer's own node, both set through the environment."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "wallet"))
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path / "wallet"


@pytest.fixture
def own_node(node: Node) -> list[str]:
    return ["--node", node.url, "--credentials", str(node.credentials)]


@pytest.fixture
def new(liar: Liar, wallet: Path) -> Iterator[Callable[[], Channel]]:
    """Make regtest channels, and release their files for commands."""
    payer = Payer(liar.url, wallet=wallet, network=Network.REGTEST, patience=IMPATIENT)

    def make() -> Channel:
        channel = payer.new_channel(hours=100)
        channel.release()
        return channel

    yield make
    payer.close()


EMPTY = {"funding_outpoint": "", "funding_sat": 0, "state": "new", "signed_sat": None, "acknowledged_sat": None}
"""Fields of a channel that was never funded."""


def run_command(*words: object, status: int = 0) -> Result:
    """Run a payer's command, which must end with this status."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return result


def run_json(*words: object, status: int = 0) -> Any:
    return json.loads(run_command(*words, "--json", status=status).stdout)


def server_lists(liar: Liar, channel: Channel, *outputs: tuple[OutPoint, int], **more: Any) -> None:
    """Make the server list these outputs as deep enough."""
    listed = [
        {
            "funding_txid": outpoint.txid_hex,
            "funding_vout": outpoint.vout,
            "value": value,
            "confirmations": 6,
            "confirmations_needed": 1,
        }
        | more
        for outpoint, value in outputs
    ]
    liar.info_lie = Lie(body=json.dumps({"funding_address": channel.address, "outputs": listed}).encode())


def noted(name: str) -> Any:
    """Return the channel's outputs in the wallet."""
    return run_json("status", name, "--offline")


def inputs_and_fee(node: Node, txid: str) -> tuple[set[str], int]:
    """Return the outpoints that a mempool transaction spends, and its actual fee."""
    transaction = node.rpc("getrawtransaction", txid, True)
    fee = node.rpc("getmempoolentry", txid)["fees"]["base"]
    return {f"{each['txid']}:{each['vout']}" for each in transaction["vin"]}, round(fee * 100_000_000)


def only_refund(node: Node) -> tuple[set[str], int]:
    (txid,) = node.rpc("getrawmempool")
    return inputs_and_fee(node, txid)


# --- 17: the value and the outpoint -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", ["less", "more", "another output", "another payer's output"])
def test_fault_17_the_refund_takes_what_the_chain_shows(
    node: Node, liar: Liar, new: Callable[[], Channel], own_node: list[str], lie: str
) -> None:
    """Whatever outpoint and value the server claimed, the refund spends the outputs at the address, for a small fee."""
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    node.mine()
    elsewhere = node.fund(node.rpc("getnewaddress"), 700_000)
    node.mine()
    claimed = {
        "less": (outpoint, 100_000),
        "more": (outpoint, 900_000),
        "another output": (OutPoint(bytes(32), 3), FUNDING_SAT),
        "another payer's output": (elsewhere, 700_000),
    }[lie]
    server_lists(liar, channel, claimed)
    assert run_json("open", channel.name, "--no-wait", status=1)["code"] != "value_unchecked"  # the server refuses it
    assert noted(channel.name)["funding_outpoint"] == str(claimed[0])
    assert noted(channel.name)["funding_source"] == "server"
    node.pass_median_time(channel.record.expiry)

    shown = run_json("refund", channel.name, "--publish", *own_node)
    spent, fee = only_refund(node)
    assert (spent, fee) == ({str(outpoint)}, shown["fee_sat"])
    assert fee < BUDGET_SAT


def test_fault_17_a_payment_is_not_signed_for_a_value_that_the_own_node_contradicts(
    node: Node, liar: Liar, new: Callable[[], Channel], own_node: list[str]
) -> None:
    """`open` with a node refuses a difference with both numbers, and signs nothing."""
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    node.mine()
    server_lists(liar, channel, (outpoint, 100_000))
    refused = run_json("open", channel.name, "--no-wait", *own_node, status=1)
    assert (refused["code"], refused["got_sat"], refused["want_sat"]) == ("funding_differs", 100_000, FUNDING_SAT)
    assert noted(channel.name)["signed_sat"] is None


def test_fault_17_without_a_node_an_unchecked_value_is_not_signed_silently(
    node: Node, liar: Liar, new: Callable[[], Channel]
) -> None:
    """The funding transaction proves the value; otherwise `--unchecked` is needed, and the output says so."""
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    node.mine()
    server_lists(liar, channel, (outpoint, 100_000))
    run_command("open", channel.name, "--no-wait", status=1)
    refused = run_json("refund", channel.name, status=1)
    assert (refused["code"], refused["value_sat"]) == ("value_unchecked", 100_000)
    assert "--transaction" in run_command("refund", channel.name, status=1).stderr
    for words in (["status", channel.name, "--offline"], ["list"]):
        assert "the server's word, not checked" in run_command(*words).stdout

    assert run_json("refund", channel.name, "--unchecked")["checked"] is False
    raw = node.rpc("getrawtransaction", outpoint.txid_hex)
    proven = run_json("refund", channel.name, "--transaction", raw)
    paid = CTransaction.deserialize(bytes.fromhex(proven["transaction"])).vout[0].nValue
    assert (proven["checked"], paid) == (True, FUNDING_SAT - proven["fee_sat"])
    assert "checked with the funding transaction" in run_command("status", channel.name, "--offline").stdout


def test_fault_17_a_server_whose_transaction_contradicts_it_is_not_believed(
    node: Node, liar: Liar, new: Callable[[], Channel]
) -> None:
    """The txid that the server shows commits to the value: a transaction with another value is misbehaviour."""
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    raw = node.rpc("getrawtransaction", outpoint.txid_hex)
    server_lists(liar, channel, (outpoint, 100_000), transaction=raw)
    refused = run_json("open", channel.name, "--no-wait", status=1)
    assert (refused["code"], refused["got"], refused["want"]) == ("server_misbehaved", 100_000, FUNDING_SAT)
    server_lists(liar, channel, (outpoint, FUNDING_SAT), transaction=raw)
    run_command("open", channel.name, "--no-wait", status=1)  # the liar does not know this funding
    assert noted(channel.name)["funding_source"] == "transaction"
    assert run_json("refund", channel.name)["checked"] is True


@pytest.mark.parametrize("rate", [300, 250])
def test_fault_17_a_fee_above_a_share_needs_confirmation(
    node: Node, new: Callable[[], Channel], own_node: list[str], rate: int
) -> None:
    """A refund's fee is at most 10 % and 200 sat per byte, unless --max-fee allows more."""
    channel = new()
    node.fund(channel.address, 200_000 if rate == 300 else 5_000_000)
    node.pass_median_time(channel.record.expiry)
    words = ("refund", channel.name, "--publish", "--fee-rate", rate, *own_node)
    refused = run_json(*words, status=1)
    assert refused["code"] == "fee_too_high"
    assert refused["got_sat"] > refused["most_sat"]
    assert node.rpc("getrawmempool") == []
    assert run_json(*words, "--max-fee", refused["got_sat"])["fee_sat"] == refused["got_sat"]


# --- 22: the value that is typed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compared", ["server", "transaction", "node"])
def test_fault_22_a_value_typed_too_small_is_refused(
    node: Node, liar: Liar, new: Callable[[], Channel], own_node: list[str], compared: str
) -> None:
    """`open --outpoint --value` is compared with server, transaction or node; a difference needs --unchecked."""
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    node.mine()
    server_lists(liar, channel, (outpoint, 60_000 if compared == "node" else FUNDING_SAT))
    more = {
        "server": [],
        "transaction": ["--transaction", node.rpc("getrawtransaction", outpoint.txid_hex)],
        "node": own_node,
    }[compared]
    words = ("open", channel.name, "--outpoint", outpoint, "--value", 60_000, *more)
    refused = run_json(*words, status=1)
    assert (refused["code"], refused["got_sat"], refused["want_sat"]) == ("funding_differs", 60_000, FUNDING_SAT)
    assert noted(channel.name)["signed_sat"] is None
    if compared == "node":  # the chain's value is kept, so that the next `open` does not sign for less
        assert (noted(channel.name)["funding_sat"], noted(channel.name)["funding_source"]) == (FUNDING_SAT, "chain")
        run_command("open", channel.name, "--no-wait", status=1)  # the liar does not know this funding
        assert noted(channel.name)["funding_sat"] == FUNDING_SAT
        assert noted(channel.name)["left_sat"] > 60_000
    if compared == "server":
        run_command(*words, "--unchecked", status=1)  # the liar does not know this funding
        assert (noted(channel.name)["funding_sat"], noted(channel.name)["funding_source"]) == (60_000, "typed")


# --- 19: all outputs at the address ---------------------------------------------------------------------------------


def test_fault_19_one_refund_takes_all_outputs_of_the_address(
    node: Node, liar: Liar, new: Callable[[], Channel], own_node: list[str]
) -> None:
    """Funding, second, short and unrecorded outputs are shown with the refund command, and refunded together."""
    channel = new()
    name = channel.name
    paid = [node.fund(channel.address, sat) for sat in (FUNDING_SAT, FUNDING_SAT, 5_000)]
    node.mine()
    server_lists(liar, channel, (paid[0], FUNDING_SAT), (paid[2], 5_000))
    run_command("open", name, "--no-wait", status=1)
    for words in (["list"], ["status", name, "--offline"]):
        shown = run_command(*words).stdout
        assert "5,000 sat" in shown
        assert f"paychan channel refund {name} --publish" in shown
    assert "5,000 sat" in run_command("key", name).stderr
    assert [each["value_sat"] for each in run_json("key", name)["outputs"]] == [FUNDING_SAT, 5_000]
    run_command("watch", "--once", *own_node)
    assert {each["outpoint"] for each in noted(name)["deposits"]} == {str(paid[1]), str(paid[2])}
    node.pass_median_time(channel.record.expiry)

    run_command("watch", "--once", *own_node)
    spent, fee = only_refund(node)
    assert spent == set(map(str, paid))
    assert fee < BUDGET_SAT
    node.mine(3)
    run_command("watch", "--once", *own_node)
    assert (noted(name)["state"], noted(name)["deposits"]) == ("refunded", [])


def test_fault_19_coinbase_that_is_not_mature_spoils_no_refund(
    node: Node, new: Callable[[], Channel], own_node: list[str]
) -> None:
    """A miner's payment to the address matures after a hundred blocks; the other outputs are refunded before."""
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    node.mine(to=channel.address)
    node.pass_median_time(channel.record.expiry)
    run_command("watch", "--once", *own_node)
    assert only_refund(node)[0] == {str(outpoint)}
    node.mine(100)
    run_command("watch", "--once", *own_node)
    spent, _ = only_refund(node)
    assert len(spent) == 1
    assert spent != {str(outpoint)}


def test_an_own_node_replaces_the_servers_list_of_outputs(
    node: Node, liar: Liar, new: Callable[[], Channel], own_node: list[str]
) -> None:
    """The payer's own chain finds the funding, and its value."""
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    node.mine()
    liar.info_lie = Lie(status=404, body=b"Not Found")
    assert run_json("open", channel.name, "--no-wait", status=1)["code"] == "funding_not_told"
    run_command("open", channel.name, "--no-wait", *own_node, status=1)  # the liar does not know this funding
    assert noted(channel.name)["funding_outpoint"] == str(outpoint)
    assert noted(channel.name)["funding_source"] == "chain"


def test_fault_19_a_channel_that_was_never_opened_and_one_that_ended_keep_their_addresses(
    node: Node, new: Callable[[], Channel], own_node: list[str]
) -> None:
    """Every late payment to an address that was given out is found and refunded, as often as it happens."""
    short, ended = new(), new()
    node.fund(short.address, 2_000)
    node.fund(ended.address, FUNDING_SAT)
    node.pass_median_time(max(short.record.expiry, ended.record.expiry))
    run_command("watch", "--once", *own_node)
    assert len(node.rpc("getrawmempool")) == 2
    node.mine(3)
    run_command("watch", "--once", *own_node)
    assert noted(ended.name)["end_seen"]

    late = node.fund(ended.address, 70_000)
    (seen,) = run_json("watch", ended.name, *own_node)
    assert seen["outputs"][0]["confirmations"] == 0  # it may still be replaced, so no refund depends on it
    assert "70,000 sat" in run_command("status", ended.name, "--offline").stdout
    node.mine()
    run_command("refund", ended.name, "--publish", *own_node)
    assert only_refund(node)[0] == {str(late)}


@pytest.mark.parametrize("signed", [False, True], ids=["not opened", "opening refused"])
def test_fault_19_a_funding_that_its_sender_replaced_is_found(
    node: Node, liar: Liar, new: Callable[[], Channel], own_node: list[str], signed: bool
) -> None:
    """After a fee bump the coins have another txid: the wallet records that one, and can open with it."""
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    server_lists(liar, channel, (outpoint, FUNDING_SAT), confirmations=int(signed))
    run_command("open", channel.name, "--no-wait", status=1)
    assert (noted(channel.name)["signed_sat"] is not None) == signed
    txid = node.rpc("bumpfee", outpoint.txid_hex)["txid"]
    node.mine()
    there = node.output(txid, channel.address)
    run_command("watch", "--once", *own_node)
    assert noted(channel.name)["funding_outpoint"] == str(there)
    assert noted(channel.name)["signed_sat"] is None
    node.pass_median_time(channel.record.expiry)
    run_command("watch", "--once", *own_node)
    assert only_refund(node)[0] == {str(there)}


def test_faults_17_and_19_hold_with_an_electrum_server(
    node: Node, liar: Liar, new: Callable[[], Channel], tmp_path: Path
) -> None:
    """The address history of an Electrum server decides as well: over a false outpoint, a false value, a second output."""
    elsewhere, less = new(), new()
    paid = [node.fund(each.address, sat) for each, sat in ((elsewhere, 300_000), (less, FUNDING_SAT), (less, 4_000))]
    node.mine()
    for channel, claimed in ((elsewhere, (OutPoint(bytes(32), 3), 300_000)), (less, (paid[1], 100_000))):
        server_lists(liar, channel, claimed)
        run_command("open", channel.name, "--no-wait", status=1)
    node.pass_median_time(max(elsewhere.record.expiry, less.record.expiry))
    with ElectrumX(node, tmp_path / "electrumx") as electrumx:
        source = ["--electrum", electrumx.tls_url, "--certificate", str(electrumx.certificate)]
        run_command("watch", "--once", *source)
    refunds = [inputs_and_fee(node, txid) for txid in node.rpc("getrawmempool")]
    assert sorted(map(sorted, (spent for spent, _ in refunds))) == sorted(
        map(sorted, ({str(paid[0])}, {str(paid[1]), str(paid[2])}))
    )
    assert all(fee < BUDGET_SAT for _, fee in refunds)


# --- 20: a refund with too low a fee ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-mempoolfullrbf=1", "-mempoolfullrbf=0"])
def test_fault_20_a_published_refund_is_replaced(
    node: Node, new: Callable[[], Channel], own_node: list[str], flag: str
) -> None:
    """--fee-rate signs a replacement to the same address; too small a rise, or too late, fails with a message."""
    node.stop()
    node.start(flag)
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    node.pass_median_time(channel.record.expiry)
    elsewhere = node.rpc("getnewaddress", "", "legacy")
    words = ("refund", channel.name, "--publish", *own_node)
    first = run_json(*words, "--fee-rate", 3, "--to", elsewhere)
    assert run_json(*words)["txid"] == first["txid"]
    assert "--fee-rate" in run_command(*words, "--fee-rate", 3, status=1).stderr
    (txid,) = node.rpc("getrawmempool")
    assert txid == first["txid"]

    second = run_json(*words, "--fee-rate", 9)
    assert only_refund(node) == ({str(outpoint)}, second["fee_sat"])
    assert second["fee_sat"] > 2 * first["fee_sat"]
    (output,) = node.rpc("getrawtransaction", second["txid"], True)["vout"]
    assert output["scriptPubKey"]["address"] == elsewhere
    for rate in (9, 20, 20):  # watch replaces it as well, but not at the same rate
        run_command("watch", "--once", "--fee-rate", rate, *own_node)
    spent, fee = only_refund(node)
    assert spent == {str(outpoint)}
    assert 2 * second["fee_sat"] < fee < 3 * second["fee_sat"]
    node.mine(3)
    assert "is in a block" in run_command(*words, "--fee-rate", 20, status=1).stderr
    run_command("watch", "--once", *own_node)
    assert noted(channel.name)["state"] == "refunded"


# --- 18: each channel separately --------------------------------------------------------------------------------------


def test_fault_18_one_bad_channel_stops_no_other(
    node: Node, new: Callable[[], Channel], own_node: list[str], wallet: Path
) -> None:
    """Empty, damaged, later and unreadable files, and a refused refund: the good channel's refund is published."""
    good, dust, empty, later, directory, cut = (new() for _ in range(6))
    outpoint = node.fund(good.address, FUNDING_SAT)
    node.fund(dust.address, 600)
    (wallet / f"{empty.name}.json").write_text("")
    path = wallet / f"{later.name}.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    (wallet / f"{directory.name}.json").unlink()
    (wallet / f"{directory.name}.json").mkdir()
    path = wallet / f"{cut.name}.json"
    path.write_text(path.read_text()[:200])
    node.pass_median_time(good.record.expiry)
    bad = {dust, empty, later, directory, cut}

    said = run_command("watch", "--once", *own_node, status=1)
    assert only_refund(node)[0] == {str(outpoint)}
    for channel in bad:
        assert channel.name in said.stderr
    assert "funding too small: got 600 sat" in said.stderr
    assert "it is empty" in said.stderr
    assert "Update paychan" in said.stderr
    shown = run_json("watch", *own_node, status=1)
    assert {each["name"] for each in shown if "code" in each} == {channel.name for channel in bad}
    listed = run_command("list", status=1)
    assert good.name in listed.stdout
    for channel in bad - {dust}:
        assert str(wallet / f"{channel.name}.json") in listed.stderr


def test_fault_18_a_channel_of_another_network_stops_no_other(
    node: Node, new: Callable[[], Channel], own_node: list[str], wallet: Path
) -> None:
    """One node serves one network: the channels of other networks are named and skipped."""
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    live = next(case for case in JS_CASES if case.network is Network.LIVE)
    Payer(wallet=wallet).wallet.create(record_of(live)).release()
    node.pass_median_time(channel.record.expiry)
    said = run_command("watch", "--once", *own_node, status=1)
    assert only_refund(node)[0] == {str(outpoint)}
    assert "vector  skipped: it is on the live network, your chain on regtest" in said.stderr
    (skipped,) = [each for each in run_json("watch", "--once", *own_node, status=1) if each["name"] == "vector"]
    assert skipped["code"] == "other_network"
    (wallet / "vector.json").write_text(json.dumps(json.loads((wallet / "vector.json").read_text()) | EMPTY))
    run_command("watch", "--once", *own_node)


def test_fault_19_watch_refunds_later_payments_too(
    node: Node, new: Callable[[], Channel], own_node: list[str], wallet: Path
) -> None:
    """A channel made and funded after `watch` began, and a payment after the first refund, are refunded."""
    first = new()
    node.fund(first.address, FUNDING_SAT)
    node.mine()
    program = Path(sys.executable).parent / "paychan"
    with (wallet.parent / "watch.out").open("wb") as log:
        process = subprocess.Popen([program, "channel", "watch", *own_node], stdout=log, stderr=log)
    try:
        wait_for(lambda: "unspent" in (wallet.parent / "watch.out").read_text(), "seen")
        second = new()
        paid = [node.fund(second.address, 30_000)]
        node.pass_median_time(max(first.record.expiry, second.record.expiry))
        wait_for(lambda: len(node.rpc("getrawmempool")) == 2, "two refunds")
        paid.append(node.fund(first.address, 20_000))
        node.mine()
        wait_for(lambda: len(node.rpc("getrawmempool")) == 1, "the late one")
        assert only_refund(node)[0] == {str(paid[1])}
        node.mine(3)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
