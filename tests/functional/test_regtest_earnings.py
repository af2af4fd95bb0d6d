"""Earnings end in the operator's own wallet: settlements pay there, or a sweep brings them; a real node mines both."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bitcoin.core import CTransaction

from paychan.protocol.address import decode_address, encode_address
from paychan.protocol.types import Network
from signer.config import load_signer_config
from signer.keys.payout import GAP_LIMIT, Wallet, checksum, parse_payout
from tests.lib.customer import OPENING_SAT, Customer, CustomerV2
from tests.lib.electrumx import ElectrumX
from tests.lib.node import Node
from tests.lib.pseudoterminal import PseudoTerminal
from tests.lib.softhsm import SoftHsm, find_module
from tests.lib.system import SIGNER, System

SCRIPTS = Path(sys.executable).parent
KINDS = ("pkh(", "wpkh(", "sh(wpkh(", "tr(")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node")) as running:
        yield running


@contextmanager
def running(directory: Path, node: Node, change: tuple[str, str] = ("", "")) -> Iterator[System]:
    """Signer and server, with a change of the signer's file."""
    system = System(directory, node=node)
    system.signer_file.write_text(system.signer_file.read_text().replace(*change))
    with system:
        yield system


@contextmanager
def set_environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that the block starts."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def settled(system: System, node: Node, kinds: tuple[type[Customer], ...] = (Customer, CustomerV2)) -> list[int]:
    """Settle a channel of each kind; return what the settlements pay to the server, in satoshi."""
    paid = []
    for kind in kinds:
        customer = kind(system, node)
        customer.opened()
        assert customer.close(OPENING_SAT).status_code in (200, 202)
        record = customer.record
        paid.append(OPENING_SAT - record["settlement_fee"])
        node.mine(2)
        customer.ends("closed")
    return paid


def run(command: str, *arguments: str | Path, status: int = 0) -> str:
    """Run a command as a script does; return what it prints, or its error."""
    done = subprocess.run(
        [SCRIPTS / command, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if status else done.stdout


def said_beside(system: System, addresses: Path) -> str:
    """Return what `paychan coins` says beside its table."""
    command = [SCRIPTS / "paychan", "coins", system.server_file, addresses, "--out", addresses.with_suffix(".coins")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def found_coins(system: System, directory: Path) -> Path:
    addresses, coins = directory / "addresses.txt", directory / "coins.txt"
    addresses.write_text(run("paychan-signer", "earnings", system.signer_file, "--addresses"))
    run("paychan", "coins", system.server_file, addresses, "--out", coins)
    return coins


@pytest.mark.parametrize("mode", ["hardened", "rbpcp-v2"])
def test_fault_47_earnings_on_derived_addresses_are_listed_and_swept(mode: str, node: Node, tmp_path: Path) -> None:
    """Beside the running signer: the list has what the settlements paid, and the node mines the sweep."""
    with running(tmp_path / "system", node, ('mode = "hardened"', f'mode = "{mode}"')) as system:
        paid = settled(system, node)
        table = run("paychan-signer", "earnings", system.signer_file)
        coins, sweep, to = found_coins(system, tmp_path), tmp_path / "sweep.txt", node.address()
        order = ["sweep", system.signer_file, to, "--fee-rate", "3", "--coins", coins, "--out", sweep]
        run("paychan-signer", *order, "--yes")
        transaction = CTransaction.deserialize(bytes.fromhex(sweep.read_text()))
        run("paychan", "coins", system.server_file, "--publish", sweep)
        (txid,) = node.rpc("getrawmempool")
        twice = run("paychan", "coins", system.server_file, "--publish", sweep)
        swept = run("paychan-signer", "earnings", system.signer_file)
        entry = node.rpc("getmempoolentry", txid)
        node.mine(1)
        left = run("paychan", "coins", system.server_file, tmp_path / "addresses.txt")
        again = run("paychan", "coins", system.server_file, "--publish", sweep)
        none = said_beside(system, tmp_path / "addresses.txt")
        (tmp_path / "one.txt").write_text(to)
        one = said_beside(system, tmp_path / "one.txt")

    fee_sat = sum(paid) - transaction.vout[0].nValue
    assert [f"{value:,}" in table for value in paid] == [True] * len(paid)
    assert len(transaction.vin) == len(paid)
    assert txid == transaction.GetTxid()[::-1].hex()
    assert bytes(transaction.vout[0].scriptPubKey) == decode_address(to, Network.REGTEST)
    assert 3 * entry["vsize"] <= fee_sat <= 3 * entry["vsize"] + 3 * 2 * len(paid)
    assert node.rpc("gettxout", txid, 0)["confirmations"] == 1
    assert not left
    assert twice == f"{txid} is in the mempool already, and waits for a block: nothing was broadcast\n"
    assert swept.count(f"all swept, by {txid}") == len(paid)
    assert "Next" not in swept
    assert again == f"{txid} is confirmed already: nothing was broadcast\n"
    assert "0 coins of 0 sat" in none
    assert "To spend" not in none
    assert "1 coin of " in one
    assert "on 1 address; 0 wait" in one
    assert "To spend them" in one


def test_fault_47_a_sweep_shows_what_it_signs_and_asks(node: Node, tmp_path: Path) -> None:
    """Inputs, destination, amount and fee are shown; only a yes signs, and a line about it is kept; without a terminal --yes is needed."""
    with running(tmp_path / "system", node) as system:
        (paid,) = settled(system, node, (CustomerV2,))
        coins, sweep, to = found_coins(system, tmp_path), tmp_path / "sweep.txt", node.address()
    order = ["sweep", system.signer_file, to, "--fee-rate", "2", "--coins", coins, "--out", sweep]
    outpoint = coins.read_text().split()[0]
    kept = load_signer_config(system.signer_file).sweeps_path
    for answer, status in (("no", 2), ("perhaps", 2), ("Y", 0)):
        with PseudoTerminal([SCRIPTS / "paychan-signer", *map(str, order)]) as terminal:
            terminal.read_until("Sign this")
            assert not sweep.exists()
            assert not kept.exists()
            terminal.enter(answer)
            if answer == "perhaps":
                terminal.read_until("Type yes or no.*yes or no: ")
                terminal.enter("")
                terminal.read_until("Type yes or no.*yes or no: ")
                terminal.enter("n")
            assert terminal.wait() == status
        for fact in (outpoint, f"{paid:,} sat", to, "SIGHASH_ALL"):
            assert fact in terminal.text
    assert node.rpc("testmempoolaccept", [sweep.read_text().strip()])[0]["allowed"]
    (line,) = map(json.loads, kept.read_text().splitlines())
    assert line["txid"] == CTransaction.deserialize(bytes.fromhex(sweep.read_text())).GetTxid()[::-1].hex()
    assert (line["spends"], line["pays"], line["pays_sat"] + line["fee_sat"]) == ([outpoint], to, paid)
    assert "--yes" in run("paychan-signer", *order, status=2)


def test_fault_47_coins_are_believed_only_with_their_transaction(node: Node, tmp_path: Path) -> None:
    """A value that no transaction proves would become fee; foreign coins and a fee above half are refused."""
    with running(tmp_path / "system", node) as system:
        settled(system, node, (CustomerV2,))
        coins, to = found_coins(system, tmp_path), node.address()
        outpoint, raw = coins.read_text().split()
        foreign = node.fund(to, 50_000)
        foreign_raw = node.rpc("getrawtransaction", foreign.txid_hex)
    for text, rate, reason in (
        (f"{outpoint} {foreign_raw}", 2, "has another txid, or no such output"),
        (f"{outpoint.split(':')[0]}:7 {raw}", 2, "has another txid, or no such output"),
        (str(foreign), 2, "this signer has not signed that transaction"),
        (f"{foreign} {foreign_raw}", 2, "none of these coins is on an address that this signer derived"),
        (f"{outpoint} {raw[:-8]}", 2, "line 1"),
        (outpoint.split(":")[0], 2, "want TXID:VOUT"),
        ("", 2, "none of these coins"),
        (f"{outpoint} {raw}", 500, "more than half"),
    ):
        coins.write_text(text + "\n")
        order = ["sweep", system.signer_file, to, "--fee-rate", str(rate), "--coins", coins, "--yes"]
        assert reason in run("paychan-signer", *order, status=2)
    coins.write_text(f"\n# the signer has the transaction itself\n{outpoint}\n{outpoint} {raw}\n")
    order = ["sweep", system.signer_file, to, "--fee-rate", "2", "--coins", coins, "--yes"]
    signed = run("paychan-signer", *order).strip()
    assert node.rpc("testmempoolaccept", [signed])[0]["allowed"]
    assert "ADDRESS" in run("paychan-signer", *[*order[:2], "1M8iwBs5XD7ZJQJCDC7BdLEpSivRQZJ2Hg", *order[3:]], status=2)


@pytest.mark.parametrize("kind", KINDS)
def test_fault_47_settlements_pay_to_the_operator_s_own_wallet(kind: str, node: Node, tmp_path: Path) -> None:
    """With the descriptor of a wallet of Bitcoin Core, the wallet finds the earnings by itself."""
    (descriptor,) = [
        each["desc"]
        for each in node.rpc("listdescriptors", wallet="miner")["descriptors"]
        if each["desc"].startswith(kind) and not each["internal"] and each["active"]
    ]
    place = f'[settlement]\ndestination_address = "{descriptor}"\n[policy]'
    with running(tmp_path / "system", node, ("[policy]", place)) as system:
        paid = settled(system, node)
        table = run("paychan-signer", "earnings", system.signer_file)
        addresses = run("paychan-signer", "earnings", system.signer_file, "--addresses")

    unspent = [each for each in node.rpc("listunspent", wallet="miner") if round(each["amount"] * 100_000_000) in paid]
    assert len(unspent) >= len(paid)
    assert all(each["desc"].startswith(kind) for each in unspent if each["address"] in table)
    assert table.count("yours, configured") == len({each["address"] for each in unspent if each["address"] in table})
    assert not addresses


def test_own_wallets_have_the_addresses_that_bitcoin_core_derives(node: Node) -> None:
    """Each script type, with origin, path and choice of branch, in all spellings of a descriptor."""
    for each in node.rpc("listdescriptors", wallet="miner")["descriptors"]:
        descriptor = each["desc"]
        wallet = parse_payout(descriptor, Network.REGTEST)
        assert isinstance(wallet, Wallet)
        derived = node.rpc("deriveaddresses", descriptor, [0, GAP_LIMIT - 1])
        assert [encode_address(wallet.at(index), Network.REGTEST) for index in range(GAP_LIMIT)] == derived
        bare = descriptor.split("#")[0]
        assert f"{bare}#{checksum(bare)}" == descriptor
        forked = parse_payout(bare.replace("/0/*", "/<0;1>/*").replace("/1/*", "/<1;0>/*"), Network.REGTEST)
        assert isinstance(forked, Wallet)
        assert forked.at(3) == wallet.at(3)


@pytest.mark.parametrize("mode", ["hardened", "pkcs11"])
def test_fault_47_coins_of_the_reserve_come_back(mode: str, node: Node, tmp_path: Path) -> None:
    """The operator's own coins there are swept with --reserve only; a token signs with the key that never leaves it."""
    environment, keys = {}, ""
    if mode == "pkcs11":
        if find_module() is None:
            pytest.skip("SoftHSM is not installed")
        token = SoftHsm(tmp_path / "token")
        environment = token.environment
        keys = "[key]" + token.signer_config.split("[key]")[1]
    system = System(tmp_path / "system", node=node)
    if keys:
        text = system.signer_file.read_text().split("[key]")[0]
        system.signer_file.write_text(text + keys)
    with set_environment(environment):
        with system:
            settled(system, node, (CustomerV2,))
            assert system.signer is not None
            (address,) = set(re.findall(r"reserve=(\w+)", system.signer.text()))
        reserve = node.fund(address, 200_000)
        node.mine(1)
        coins, to, addresses = tmp_path / "coins.txt", node.address(), tmp_path / "addresses.txt"
        addresses.write_text(address + "\n")
        run("paychan", "coins", system.server_file, addresses, "--out", coins)
        order = ["sweep", system.signer_file, to, "--fee-rate", "2", "--coins", coins, "--yes"]
        refused = run("paychan-signer", *order, status=2)
        signed = run("paychan-signer", *order, "--reserve").strip()

    assert str(reserve) in coins.read_text()
    assert "none of these coins" in refused
    assert node.rpc("testmempoolaccept", [signed])[0]["allowed"]


def test_fault_47_an_electrum_server_shows_the_coins(tmp_path: Path) -> None:
    """Without a node of its own, the operator finds and broadcasts through the server's Electrum server."""
    with Node(tmp_path / "node", "-txindex=1") as node, ElectrumX(node, tmp_path / "electrumx") as electrumx:
        system = System(tmp_path / "system", node=node)
        text = system.server_file.read_text().replace('backend = "bitcoind"', 'backend = "electrum"')
        system.server_file.write_text(text.replace(node.url, electrumx.tcp_url))
        with system:
            paid = settled(system, node)
            coins, sweep, to = found_coins(system, tmp_path), tmp_path / "sweep.txt", node.address()
            order = ["sweep", system.signer_file, to, "--fee-rate", "2", "--coins", coins, "--out", sweep, "--yes"]
            run("paychan-signer", *order)
            run("paychan", "coins", system.server_file, "--publish", sweep)
        entry = node.rpc(
            "getmempoolentry", CTransaction.deserialize(bytes.fromhex(sweep.read_text())).GetTxid()[::-1].hex()
        )

    assert len(coins.read_text().splitlines()) == len(paid)
    assert entry["vsize"] > 148 * len(paid)


def test_fault_47_wrong_files_and_networks_are_sentences(tmp_path: Path, node: Node) -> None:
    """Each mistake of the order of commands is named, without a traceback."""
    with running(tmp_path / "system", node) as system:
        settled(system, node, (CustomerV2,))
    signer, server, to, coins = system.signer_file, system.server_file, node.address(), tmp_path / "coins.txt"
    debug = tmp_path / "debug.toml"
    debug.write_text(SIGNER.format(state=system.state))
    coins.write_text("")
    (tmp_path / "wrong").write_text("no address\n")
    (tmp_path / "hex").write_text("zz")
    rate = ("--fee-rate", "2", "--yes", "--coins")
    for command, order, reason in (
        ("paychan-signer", ["sweep", signer, to, *rate, tmp_path / "none"], "can't be read"),
        ("paychan-signer", ["sweep", signer, to, *rate, coins], "none of these coins"),
        ("paychan-signer", ["sweep", debug, "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY", *rate, coins], "no earnings"),
        ("paychan", ["coins", server], "give a file of addresses"),
        ("paychan", ["coins", server, tmp_path / "none"], "No such file"),
        ("paychan", ["coins", server, tmp_path / "wrong"], "address"),
        ("paychan", ["coins", server, "--publish", tmp_path / "hex"], "hex"),
    ):
        assert reason in run(command, *order, status=2)
    (system.state / "signer.ledger").rename(tmp_path / "away")
    assert "has signed nothing yet" in run("paychan-signer", "earnings", signer, status=2)


def test_fault_47_coins_of_a_lost_ledger_are_swept(node: Node, tmp_path: Path) -> None:
    """A settlement names its channels, so seed and settlement suffice: on another machine, with the seed file alone."""
    with running(tmp_path / "system", node) as system:
        paid = settled(system, node)
        coins = found_coins(system, tmp_path)
    (system.state / "signer.ledger").rename(tmp_path / "away")
    order = ["sweep", system.signer_file, node.address(), "--fee-rate", "2", "--coins", coins, "--yes"]
    signed = run("paychan-signer", *order).strip()

    assert len(CTransaction.deserialize(bytes.fromhex(signed)).vin) == len(paid)
    assert node.rpc("testmempoolaccept", [signed])[0]["allowed"]
