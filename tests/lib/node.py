"""A real bitcoind for one test, on free ports.

The test may stop it, kill it, cut its mempool, and reorganise its chain.
"""

from __future__ import annotations

import json
import subprocess
import time
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from paychan.cli.node import find_bitcoind
from paychan.protocol.types import OutPoint
from tests.lib.ports import free_ports

_PATIENCE_SECONDS = 90.0
_WALLET = "miner"

_FIRST_BLOCKS = 140
"""Coinbase outputs are spendable after 100 blocks: this makes 40 coins, each good for 25 payments between two blocks.

Against fee sniping, a wallet gives some transactions a lock time up to 99 blocks back, and Bitcoin Knots treats lock
time 21 as spam ("parasite-cat21"): up to height 120, one payment in a thousand would not enter the mempool. The other
blocks are for reorgs.
"""

_FLAGS = (
    "-server",
    "-rpcbind=127.0.0.1",
    "-rpcallowip=127.0.0.1",
    "-listen=0",
    "-connect=0",
    "-dnsseed=0",
    "-fixedseeds=0",
    "-fallbackfee=0.0001",
    "-dbcache=16",
    "-par=1",
    "-printtoconsole=0",
    "-keypool=20",
    "-unsafesqlitesync=1",
)
"""Flags of a node without peers that uses few resources. The last one: wallets wait for no disk, at each block otherwise.

A killed node still finds its wallets as they were; only a power cut would not leave them so.
"""


class NodeError(Exception):
    """The node answered with an error."""

    def __init__(self, method: str, code: int, reason: str) -> None:
        super().__init__(f"{method}: {reason} ({code})")
        self.code = code


class Node:
    """A node with an empty mempool, its own chain of 140 blocks (regtest), and a wallet with coins to spend.

    `flags` are bitcoind's. `login` ("user:password") replaces the cookie. `born` is the time of the first blocks: the
    node's clock stays there until `set_mock_time`; 0 means now. Restarts keep directory and ports.
    """

    def __init__(
        self, directory: Path, *flags: str, network: str = "regtest", zmq: bool = True, login: str = "", born: int = 0
    ) -> None:
        program = find_bitcoind()
        if program is None:
            pytest.skip("no bitcoind: run tests/fetch-bitcoind, or set PAYCHAN_BITCOIND")
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.network = network
        self._born = born
        self.port, zmq_port = free_ports(2)
        self.zmq = f"tcp://127.0.0.1:{zmq_port}" if zmq else ""
        self.url = f"http://127.0.0.1:{self.port}"
        self.credentials = directory / network / ".cookie"
        self._command = [
            str(program),
            f"-chain={network}",
            f"-datadir={directory}",
            *_FLAGS,
            f"-rpcport={self.port}",
            *([f"-zmqpubhashblock={self.zmq}", f"-zmqpubsequence={self.zmq}"] if zmq else []),
            *flags,
        ]
        if login:
            user, password = login.split(":")
            self.credentials = directory / "login"
            self.credentials.write_text(login + "\n")
            self._command += [f"-rpcuser={user}", f"-rpcpassword={password}"]
        self._client = httpx.Client(trust_env=False, timeout=60, verify=False)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        if self.network == "regtest" and "-disablewallet" not in self._command:
            self.set_mock_time(self._born)
            load_on_startup = None if "-nosettings" in self._command else True
            self.rpc("createwallet", _WALLET, False, False, "", False, True, load_on_startup)
            self.mine(_FIRST_BLOCKS)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._client.close()

    # --- the process ------------------------------------------------------------------------------------------------

    def start(self, *flags: str) -> None:
        """Start, with extra flags for this run, and wait until it answers."""
        with (self.directory / "bitcoind.log").open("ab") as log:
            self._process = subprocess.Popen([*self._command, *flags], stdout=log, stderr=log)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.rpc("getblockcount")
            except (httpx.HTTPError, OSError, NodeError, json.JSONDecodeError):
                time.sleep(0.02)
            else:
                return
        raise AssertionError((self.directory / "bitcoind.log").read_text(errors="replace"))

    def stop(self) -> None:
        """Stop in an orderly manner; the node keeps its mempool."""
        self._end(terminate=True)

    def kill(self) -> None:
        """Kill the node, as a power cut would; its mempool is lost."""
        self._end(terminate=False)

    def _end(self, *, terminate: bool) -> None:
        if self._process is not None:
            (self._process.terminate if terminate else self._process.kill)()
            self._process.wait(_PATIENCE_SECONDS)
            self._process = None

    # --- requests ----------------------------------------------------------------------------------------------------

    def rpc(self, method: str, *params: Any, wallet: str = "") -> Any:
        """Call a method; amounts are returned as Decimal. Raises NodeError."""
        user, password = self.credentials.read_text().strip().split(":")
        response = self._client.post(
            f"{self.url}/wallet/{wallet}" if wallet else self.url,
            json={"method": method, "params": params},
            auth=(user, password),
        )
        reply = json.loads(response.text, parse_float=Decimal)
        if reply["error"]:
            raise NodeError(method, reply["error"]["code"], reply["error"]["message"])
        return reply["result"]

    @property
    def url_with_credentials(self) -> str:
        """Credentials for programs that take no file."""
        return self.url.replace("://", f"://{self.credentials.read_text().strip()}@")

    @property
    def height(self) -> int:
        return int(self.rpc("getblockcount"))

    @property
    def best(self) -> str:
        return str(self.rpc("getbestblockhash"))

    @property
    def median_time(self) -> int:
        return int(self.rpc("getblockchaininfo")["mediantime"])

    # --- changes of the chain ----------------------------------------------------------------------------------------

    def address(self) -> str:
        """Return a new address of the node's wallet."""
        return str(self.rpc("getnewaddress", wallet=_WALLET))

    def mine(self, blocks: int = 1, to: str = "") -> list[str]:
        """Mine blocks with the transactions of the mempool, and return their hashes."""
        hashes: list[str] = self.rpc("generatetoaddress", blocks, to or self.address())
        return hashes

    def mine_only(self, *transactions: str) -> str:
        """Mine one block with only these transactions: txids of the mempool, or raw transactions."""
        return str(self.rpc("generateblock", self.address(), transactions)["hash"])

    def fund(self, address: str, sat: int) -> OutPoint:
        """Pay to an address; the transaction stays in the mempool until a block is mined."""
        txid = self.rpc("sendtoaddress", address, str(Decimal(sat).scaleb(-8)), wallet=_WALLET)
        self.rpc("getmempoolentry", txid)  # the wallet also keeps transactions that its node refused
        self._tell_wallets()
        return self.output(txid, address)

    def fund_in_block(self, address: str, sat: int, data: bytes) -> OutPoint:
        """Pay to an address in a block, by a transaction with an output of data, which may be larger than nodes relay."""
        coin = max(self.rpc("listunspent", wallet=_WALLET), key=lambda coin: coin["amount"])
        paid = Decimal(sat).scaleb(-8)
        change = Decimal(str(coin["amount"])) - paid - Decimal("0.01")
        outputs = [{address: str(paid)}, {"data": data.hex()}, {self.address(): f"{change:.8f}"}]
        unsigned = self.rpc("createrawtransaction", [{"txid": coin["txid"], "vout": coin["vout"]}], outputs)
        signed = self.rpc("signrawtransactionwithwallet", unsigned, wallet=_WALLET)["hex"]
        self.mine_only(signed)
        return OutPoint.parse(self.rpc("decoderawtransaction", signed)["txid"], 0)

    def output(self, txid: str, address: str) -> OutPoint:
        """Return the output of a wallet transaction that pays to an address."""
        decoded = self.rpc("gettransaction", txid, True, True, wallet=_WALLET)["decoded"]
        (vout,) = (each["n"] for each in decoded["vout"] if each["scriptPubKey"].get("address") == address)
        return OutPoint.parse(txid, vout)

    def replace(self, outpoint: OutPoint) -> str:
        """Double-spend a payment in the mempool, by a transaction to the node's own wallet with ten times its fee."""
        mine = [{self.address(): "0.1"}]
        bumped = self.rpc("bumpfee", outpoint.txid_hex, {"fee_rate": 100, "outputs": mine}, wallet=_WALLET)
        self._tell_wallets()
        return str(bumped["txid"])

    def send_raw(self, transaction: bytes) -> str:
        """Broadcast a transaction that the wallet did not make; return its txid."""
        txid = self.rpc("sendrawtransaction", transaction.hex(), 0)
        self._tell_wallets()
        return str(txid)

    def invalidate(self, depth: int) -> None:
        """Invalidate the newest blocks: their transactions become unconfirmed."""
        self.rpc("invalidateblock", self.rpc("getblockhash", self.height - depth + 1))

    def reorg(self, depth: int, *transactions: str) -> None:
        """Replace the newest blocks by one more.

        The first new block holds only these transactions, the others hold none. Transactions of the old branch return
        to the mempool, unless the new branch spends their inputs.
        """
        self.invalidate(depth)
        self.mine_only(*transactions)
        for _ in range(depth):
            self.mine_only()

    def _tell_wallets(self) -> None:
        """Wait until all wallets know the present mempool: the node notifies the other wallets a moment later."""
        self.rpc("syncwithvalidationinterfacequeue")

    def set_mock_time(self, unix_time: int) -> None:
        """Set the node's clock, which then stands still; 0 lets it run again."""
        self.rpc("setmocktime", unix_time)

    def pass_median_time(self, unix_time: int) -> None:
        """Mine until the median time past (BIP113) is later than a time; the node's clock is set slightly beyond it."""
        self.set_mock_time(unix_time + 60)
        while self.median_time <= unix_time:
            self.mine()
