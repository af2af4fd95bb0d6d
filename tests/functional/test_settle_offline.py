"""`paychan settle --offline`: after the loss of the server's disk, a backup, the signer and the chain recover the earnings."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from bitcoin.core import CTransaction
from msgspec import Struct

from paychan.cli.operator.settle_command import EXAMPLES
from paychan.protocol.types import UnixTime
from paychan.store.backup.create import create
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, market, wait_for
from tests.lib.electrumx import ElectrumX
from tests.lib.node import Node
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System

PAYCHAN = Path(sys.executable).with_name("paychan")
HOUR = 3600
TINY_SAT = 700
"""Less than the cost of any settlement."""

SECTIONS = {
    "open": "base_price_sat = 0\nadd_settlement_fee = false\nv2_price_sat = 0",
    "settlement": "batch_seconds = 36000",
}


def paychan(*arguments: object, status: int = 0) -> str:
    """Run the command as an operator does, and return its output."""
    command = [PAYCHAN, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env={"COLUMNS": "400", "PATH": "/usr/bin"}
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def settled(backup: Path, config: Path, *options: object, status: int = 0) -> dict[str, Any]:
    """Settle a backup, and return the command's JSON."""
    output = paychan("settle", "--offline", backup, "--config", config, "--json", *options, status=status)
    answer: dict[str, Any] = json.JSONDecoder().raw_decode(output)[0]  # before what the command says beside it
    return answer


def by_channel(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["channel"]: each for each in answer["channels"]}


def disaster(system: System) -> Path:
    """Back up the running server, then kill it and lose its store; return the backup."""
    backup = Path(system.manage("POST", "/backups").json()["path"])
    system.kill_server()
    shutil.rmtree(system.state / "store")
    return backup


def waiting(node: Node) -> set[str]:
    return set(node.rpc("getrawmempool"))


def pass_time(node: Node, unix_time: int) -> None:
    """Move the median time past beyond a time, in blocks without transactions of the mempool."""
    node.set_mock_time(unix_time + 60)
    while node.median_time <= unix_time:
        node.mine_only()


def outputs(raw: str) -> list[int]:
    return [out.nValue for out in CTransaction.deserialize(bytes.fromhex(raw)).vout]


def opened(customer: Customer, paid_sat: int = OPENING_SAT) -> Customer:
    customer.fund()
    customer.node.mine()
    wait_for(lambda: customer.open(paid_sat).status_code == 201, "opened")
    return customer


class AllKinds:
    """Channels of all kinds on one server."""

    def __init__(self, system: System, node: Node, late: int) -> None:
        self.first, self.second = opened(Customer(system, node)), opened(CustomerV2(system, node))
        self.drained, self.along, self.closing = (opened(Customer(system, node)) for _ in range(3))
        self.tiny, self.gone = opened(Customer(system, node), TINY_SAT), opened(Customer(system, node, late))
        assert self.first.pay(OPENING_SAT + 1).status_code == 200
        assert self.second.pay(OPENING_SAT + 2).status_code == 200
        assert self.along.pay(FUNDING_SAT).status_code == 202
        assert self.closing.close(OPENING_SAT).status_code == 202  # and settles the drained one as well
        assert self.drained.pay(FUNDING_SAT).status_code == 202
        self.stored = self.closing.record["settlement_txid"]
        self.received = {
            self.first: OPENING_SAT + 1,
            self.second: OPENING_SAT + 2,
            self.drained: FUNDING_SAT,
            self.closing: OPENING_SAT,
        }

    def check(self, found: dict[str, dict[str, Any]], raw: dict[str, str]) -> None:
        """Every satoshi of the published transactions goes to the client, the server, or the miner."""
        for customer, paid in self.received.items():
            fate = found[str(customer.outpoint)]
            assert (fate["outcome"], fate["received_sat"]) == ("published", paid)
            ours = paid - fate["fee_sat"] + (FUNDING_SAT if customer is self.closing else 0)
            assert outputs(raw[fate["txid"]]) == [value for value in (FUNDING_SAT - paid, ours) if value]
            assert fate["fee_sat"] >= 40 * 300


def test_threat_12_a_backup_and_the_signer_settle_everything_without_a_server(tmp_path: Path) -> None:
    """Open, drained and closing channels are settled to the satoshi; tiny and refunded ones are reported; once only."""
    with market(tmp_path, SECTIONS) as (system, node):
        late = int(time.time()) + 22 * HOUR
        channels = AllKinds(system, node, late)
        tiny, gone = channels.tiny, channels.gone
        backup = disaster(system)
        node.stop()
        node.start("-persistmempool=0", "-walletbroadcast=0")  # otherwise it would broadcast its transactions again
        pass_time(node, late)
        refund = node.send_raw(gone.refund().transaction)
        node.mine_only(refund)

        transactions = tmp_path / "transactions"
        looked = settled(backup, system.server_file, "--sign", "--out", transactions)
        assert not waiting(node)
        assert transactions.read_text().split() == looked["transactions"]
        found = by_channel(looked)
        assert (
            found[str(channels.closing.outpoint)]["txid"]
            == found[str(channels.along.outpoint)]["txid"]
            == channels.stored
        )
        assert {found[str(customer.outpoint)]["outcome"] for customer in channels.received} == {"signed"}
        assert found[str(tiny.outpoint)]["outcome"] == "too small"
        assert found[str(gone.outpoint)]["outcome"] == "refunded"
        assert found[str(gone.outpoint)]["fee_sat"] is None

        published = settled(backup, system.server_file, "--publish")
        found = by_channel(published)
        assert found[str(gone.outpoint)] | {"outcome": "refunded", "txid": refund} == found[str(gone.outpoint)]
        assert found[str(tiny.outpoint)]["received_sat"] == TINY_SAT
        raw = {node.rpc("decoderawtransaction", each)["txid"]: each for each in published["transactions"]}
        assert waiting(node) == set(raw)
        assert set(looked["transactions"]) == set(published["transactions"])
        channels.check(found, raw)

        again = settled(backup, system.server_file, "--publish")
        assert {each["outcome"] for each in again["channels"]} == {"waiting", "too small", "refunded"}
        assert waiting(node) == set(raw)
        node.mine()
        output = paychan("settle", "--offline", backup, "--config", system.server_file, "--publish")
        assert f"1 channel of {TINY_SAT} sat: not worth settling" in output
        assert "for fees of" not in output
        assert output.count(" settled: 1 confirmation ") == len(channels.received) + 1
        assert re.search(rf"{gone.outpoint} .* refunded: .* {refund}", output)
        for customer in channels.received:
            assert re.search(
                rf"{customer.outpoint} .* settled: 1 confirmation .* {found[str(customer.outpoint)]['txid']}", output
            )
        assert not waiting(node)
        assert node.rpc("gettxout", tiny.outpoint.txid_hex, tiny.outpoint.vout) is not None


def test_a_plan_signs_nothing_and_closes_no_channel(tmp_path: Path) -> None:
    """Without --sign and --publish the signer logs and remembers no signature: the server goes on with its channels."""
    with market(tmp_path) as (system, node):
        customer, other = opened(Customer(system, node)), opened(Customer(system, node))
        backup = Path(system.manage("POST", "/backups").json()["path"])
        system.kill_server()

        answer = settled(backup, system.server_file)
        assert answer["transactions"] == []
        for each in (customer, other):
            fate = by_channel(answer)[str(each.outpoint)]
            assert (fate["outcome"], fate["txid"], fate["received_sat"]) == ("planned", None, OPENING_SAT)
            assert fate["fee_sat"] > 0
            assert node.rpc("validateaddress", fate["destination"])["isvalid"]
        assert '"signed"' not in (system.state / "signer.audit").read_text()

        system.start_server()
        wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code == 200, "paid")
        assert other.record["status"] == "open"
        assert system.server is not None
        assert "older than the signer's claim" not in system.server.text()


def test_fee_rate_raises_fees_but_never_lowers_them(tmp_path: Path) -> None:
    """A higher rate replaces transactions in the mempool, also a stored settlement; a lower one changes nothing."""
    with market(tmp_path) as (system, node):
        customer, closing = opened(Customer(system, node)), opened(Customer(system, node))
        assert closing.close(OPENING_SAT).status_code == 202
        backup = disaster(system)

        fees = []
        for rate in (10, 60, 60, 20):
            found = by_channel(settled(backup, system.server_file, "--publish", "--fee-rate", rate))
            fees.append({each: node.rpc("getmempoolentry", found[each]["txid"])["fees"]["base"] for each in found})
            assert waiting(node) == {fate["txid"] for fate in found.values()}
        mine, stored = str(customer.outpoint), str(closing.outpoint)
        assert fees[0][mine] < fees[0][stored] < min(fees[1].values())
        assert fees[1] == fees[2] == fees[3]
        assert {fate["outcome"] for fate in found.values()} == {"waiting"}


def test_the_fee_falls_to_what_the_signer_allows(tmp_path: Path) -> None:
    """The signer's cap is below the requested rate: the settlement pays the cap, as the server's settlements do."""
    with market(tmp_path, {"settlement": "max_fee_sat_per_vb = 50"}) as (system, node):
        customer, closing = opened(Customer(system, node)), opened(Customer(system, node))
        assert closing.close(OPENING_SAT).status_code == 202
        backup = disaster(system)

        found = by_channel(settled(backup, system.server_file, "--publish", "--fee-rate", 80))
        for each in (customer, closing):
            fate = found[str(each.outpoint)]
            entry = node.rpc("getmempoolentry", fate["txid"])
            assert (fate["outcome"], fate["reason"]) == ("published", None)
            assert 49 * entry["vsize"] <= fate["fee_sat"] <= 50 * (entry["vsize"] + 2)


def test_past_expiry_a_settlement_replaces_the_refund(tmp_path: Path) -> None:
    """The client's refund is in the mempool: the settlement pays more and replaces it, within the budget."""
    with market(tmp_path) as (system, node):
        customer = opened(Customer(system, node))
        backup = disaster(system)
        pass_time(node, customer.terms.expiry.lock_time)
        refund = node.send_raw(customer.refund(fee_sat=20_000).transaction)
        assert waiting(node) == {refund}

        found = by_channel(settled(backup, system.server_file, "--publish", "--fee-rate", 1))
        fate = found[str(customer.outpoint)]
        assert (fate["outcome"], waiting(node)) == ("published", {fate["txid"]})
        assert 20_000 < fate["fee_sat"] < OPENING_SAT // 2


def test_a_refusal_of_the_node_is_shown_with_its_reason(tmp_path: Path) -> None:
    """A node refuses the low rate: exit status 1, the reason, and the next step; the raw transactions are printed."""
    with market(tmp_path) as (system, node):
        customer = opened(Customer(system, node))
        backup = disaster(system)
        node.stop()
        node.start("-minrelaytxfee=0.0005")
        options = ("settle", "--offline", backup, "--config", system.server_file, "--publish")
        output = paychan(*options, "--fee-rate", 2, status=1)
        assert re.search(rf"{customer.outpoint} .*refused: .*min relay fee not met", output)
        assert "--fee-rate SAT_PER_VB raises it" in output
        assert re.search(
            rf"{customer.outpoint} .* published ", paychan(*options)
        )  # at the floor, which the node reports


# --- a server that is gone, without Bitcoin ---------------------------------------------------------------------------


class AfterDisaster(Struct):
    """After the loss of the disk: a running signer, a backup, the configuration; and a directory for files."""

    system: System
    backup: Path
    place: Path

    def says(self, *options: object, status: int = 0) -> str:
        return paychan("settle", *options, status=status)

    @property
    def config(self) -> Path:
        return self.system.server_file

    @property
    def socket(self) -> Path:
        return self.system.state / "signer.sock"


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AfterDisaster]:
    place = tmp_path_factory.mktemp("rest")
    with System(place / "system") as system, httpx.Client(verify=False) as http:
        for payer in (Payer(), Payer()):
            assert V1(system.url, payer, http).open(payer.payment(OPENING_SAT)).status_code == 201
        yield AfterDisaster(system, disaster(system), place)


EXAMPLE_LINES = [line.split()[1:] for line in EXAMPLES.splitlines() if line.startswith("  paychan ")]


@pytest.mark.parametrize("words", EXAMPLE_LINES, ids=" ".join)
def test_the_examples_of_the_help_text_work(rest: AfterDisaster, words: list[str]) -> None:
    """Each line of `--help`, with the files of this server, ends with exit status 0 and both channels settled."""
    ours = {
        "NEWEST.backup": rest.backup,
        "config/live/server.toml": rest.config,
        "signer.sock": rest.socket,
        "live": "debug",
        "transactions.txt": rest.place / "transactions.txt",
    }
    output = paychan(*(ours.get(word, word) for word in words))
    outcome = "published" if "--publish" in words else "signed" if "--sign" in words else "planned"
    assert output.count(f" {outcome} ") == 2
    assert ("nothing was broadcast" in output) == (outcome == "signed")
    assert ("nothing was signed or broadcast" in output) == (outcome == "planned")
    if "--out" in words:
        lines = (rest.place / "transactions.txt").read_text().split()
        assert [len(CTransaction.deserialize(bytes.fromhex(line)).vin) for line in lines] == [1, 1]


def test_without_a_configuration_the_signer_alone_is_enough(rest: AfterDisaster) -> None:
    """At a given rate, both forms sign the same transactions: no server, no store, no node."""
    options = ("--offline", rest.backup, "--sign", "--fee-rate", 50, "--json")
    with_config = json.loads(rest.says(*options, "--config", rest.config))
    without = json.loads(rest.says(*options, "--signer", rest.socket, "--network", "debug"))
    assert without == with_config
    assert len(without["transactions"]) == 2
    assert not (rest.system.state / "store").exists()


def empty_backup(place: Path, network: str) -> Path:
    return create(lambda: nullcontext(iter(())), place / network, network, UnixTime(1_700_000_000))[0]


def test_mistakes_get_one_sentence_with_the_next_step(rest: AfterDisaster, tmp_path: Path) -> None:
    """Wrong network, a damaged backup, no node for publishing, existing files: the problem, and the next step."""
    damaged, there = tmp_path / "damaged.backup", tmp_path / "there"
    damaged.write_bytes(rest.backup.read_bytes()[:-100])
    there.write_text("mine")
    offline, config = ("--offline", rest.backup), ("--config", rest.config)
    at = ("--signer", rest.socket)
    for options, status, sentence in (
        (
            (*offline, *at, "--network", "live"),
            1,
            "holds channels of the debug network, not of live: give the matching",
        ),
        (
            ("--offline", empty_backup(tmp_path, "live"), *at, "--network", "live"),
            1,
            "the signer serves the debug network",
        ),
        ((*offline, *at, "--network", "moon"), 2, "give --config FILE, or both --signer SOCKET and --network NAME"),
        (offline, 2, "give --config FILE, or both --signer SOCKET and --network NAME"),
        ((*offline, *at, "--network", "debug", "--publish"), 2, "--publish needs --config FILE"),
        (("--offline", damaged, *config), 1, f"{damaged} is not a backup, or is damaged"),
        (("--offline", tmp_path / "none", *config), 1, "none: No such file or directory; check the path"),
        ((*offline, "--config", tmp_path / "none"), 2, "none: no such file. This command reads"),
        ((*offline, *config, "--out", tmp_path / "new"), 2, "--out writes signed transactions: add --sign"),
        ((*offline, *config, "--out", there), 1, f"{there} exists and is not overwritten: give another file"),
        (
            (*offline, *config, "--signer", there),
            1,
            f"no signer at {there}: Connection refused. Start it: `",
        ),
    ):
        output = rest.says(*options, status=status)
        assert sentence in output
        assert output.count("\n") == 1
    assert there.read_text() == "mine"


def test_a_running_server_prevents_offline_settling(tmp_path: Path) -> None:
    """It takes payments that the backup lacks: the command says how to settle through it."""
    with System(tmp_path) as system:
        backup = system.manage("POST", "/backups").json()["path"]
        output = paychan("settle", "--offline", backup, "--config", system.server_file, status=1)
        assert "the server is running" in output
        assert "stop the server first" in output


def test_a_stopped_signer_is_named(tmp_path: Path) -> None:
    """With the signer stopped like the server, the command ends at once, and says how to start it."""
    with System(tmp_path) as system:
        backup = disaster(system)
        assert system.signer is not None
        system.signer.stop()
        output = paychan("settle", "--offline", backup, "--config", system.server_file, "--publish", status=1)
        assert re.search(r"no signer at .*signer.sock: .*\. Start it: `\S*paychan-signer \S+`", output)


# --- an Electrum server ---------------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "node", "-txindex=1") as node:
        yield node


def test_an_electrum_server_publishes_as_well(tmp_path: Path, node: Node) -> None:
    """If the server had no node of its own, its Electrum server gets the settlements, and reports the results."""
    with ElectrumX(node, tmp_path / "electrumx") as electrumx:
        system = System(tmp_path / "system", node=node)
        text = system.server_file.read_text().replace('backend = "bitcoind"', 'backend = "electrum"')
        system.server_file.write_text(text.replace(node.url, electrumx.tcp_url))
        with system:
            customers = [opened(Customer(system, node)), opened(CustomerV2(system, node))]
            backup = disaster(system)
            found = by_channel(settled(backup, system.server_file, "--publish"))
            assert waiting(node) == {found[str(customer.outpoint)]["txid"] for customer in customers}
            node.mine()
            wait_for(lambda: "published" not in str(again(backup, system)), "seen")
            assert {key: fate["txid"] for key, fate in again(backup, system).items()} == {
                key: fate["txid"] for key, fate in found.items()
            }
            assert {fate["outcome"] for fate in again(backup, system).values()} == {"settled"}


def again(backup: Path, system: System) -> dict[str, dict[str, Any]]:
    return by_channel(settled(backup, system.server_file, "--publish"))
