"""`paychan node`: a temporary regtest bitcoind, with which a user can try the whole life of a channel in minutes.

Its directory holds everything: bitcoin.conf, from which the other commands read the ports, the chain and a wallet.
After `pass` it also holds `clock`: a node whose newest block lies ahead of its clock mines no more, and does not start.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from paychan.cli.terminal import command, completed, fail, keep_option, next_command, say, show_facts, whole
from paychan.shared.holders import holder_of_port
from paychan.shared.layout import Value
from paychan.shared.wording import moment

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)

_WALLET = "miner"
_DEFAULT_RPC_PORT = 18443
_FIRST_BLOCKS = 140
"""A coinbase output can be spent after 100 blocks.

Against fee sniping, a wallet sets the lock time of some transactions up to 99 blocks back, and Bitcoin Knots refuses
lock time 21 as spam: up to height 120 it would refuse one payment in a thousand.
"""

_MARGIN_SECONDS = 60
"""Time by which the clock is set beyond the median time to reach."""

_PATIENCE_SECONDS = 60.0
_CALL_SECONDS = 60.0

_CONF = """\
# A temporary node, written by paychan node start.
chain=regtest
server=1
fallbackfee=0.0001
keypool=20
unsafesqlitesync=1
[regtest]
listen=0
dnsseed=0
fixedseeds=0
dbcache=16
par=1
rpcbind=127.0.0.1
rpcallowip=127.0.0.1
rpcport={rpc_port}
zmqpubhashblock=tcp://127.0.0.1:{zmq_port}
zmqpubsequence=tcp://127.0.0.1:{zmq_port}
"""

DirOption = Annotated[Path, typer.Option("--dir", help="Directory of the node.", callback=keep_option)]
DEFAULT_DIR = Path(".paychan/node")


class _Stopped(Exception):
    """SIGINT or SIGTERM arrived."""


def find_bitcoind(given: Path | None = None) -> Path | None:
    """Find a bitcoind: the given one, $PAYCHAN_BITCOIND, the one on PATH, or the one that tests/fetch-bitcoind unpacked."""
    named = given or os.environ.get("PAYCHAN_BITCOIND") or shutil.which("bitcoind")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    program = Path(os.path.expanduser(named or cache / "paychan/bitcoind/bitcoind"))  # noqa: PTH111 - Path's own raises
    return program if program.is_file() else None


class _Node:
    """The node of a directory, running or not."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.conf = self.directory / "bitcoin.conf"
        self.cookie = self.directory / "regtest" / ".cookie"
        self._clock = self.directory / "clock"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._setting('rpcport')}"

    @property
    def zmq(self) -> str:
        return self._setting("zmqpubhashblock")

    @property
    def ahead(self) -> int:
        """Unix time of the node's clock while it is ahead of the system clock; 0 while the node uses the system clock."""
        time_set = int(self._clock.read_text()) if self._clock.is_file() else 0
        return time_set if time_set > time.time() else 0

    def set_ahead(self, unix_time: int) -> None:
        """Set the node's clock to a time, for later starts as well."""
        self._clock.write_text(f"{unix_time}\n")

    def rpc(self, method: str, *params: Any, wallet: str = "") -> Any:
        """Call a method. Raises like `JsonRpc.call`."""
        import asyncio

        return asyncio.run(self._call(method, params, wallet))

    def runs(self) -> bool:
        """Return whether the node of this directory's cookie answers."""
        from paychan.chain.base import ChainFailed

        try:
            return self.conf.is_file() and self.rpc("getblockcount") is not None
        except ChainFailed:
            return False

    def _setting(self, name: str) -> str:
        found = re.search(rf"^{name}=(\S+)$", self.conf.read_text(), re.MULTILINE) if self.conf.is_file() else None
        if found is None:
            fail(f"no node in {self.directory}. `paychan node start` starts one", status=2)
        return found[1]

    async def _call(self, method: str, params: tuple[Any, ...], wallet: str) -> Any:
        import msgspec

        from paychan.chain.bitcoind.rpc import JsonRpc

        rpc = JsonRpc(self.url, self.cookie, _CALL_SECONDS)
        try:
            return await rpc.call(msgspec.json.Decoder(Any), method, *params, wallet=wallet)
        finally:
            await rpc.close()


def _examples(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  {line}" for line in lines)


@app.command(epilog=_examples("paychan node start", "paychan node start --bitcoind ~/bitcoin-29.0/bin/bitcoind"))
def start(
    directory: DirOption = DEFAULT_DIR,
    bitcoind: Annotated[
        Path | None, typer.Option(help="The bitcoind program. \\[default: $PAYCHAN_BITCOIND, or the one on PATH]")
    ] = None,
    rpc_port: Annotated[
        int, typer.Option(min=1, max=65535, help="RPC port; config/regtest expects the default.")
    ] = _DEFAULT_RPC_PORT,
    zmq_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the node's notifications.")] = 28332,
) -> None:
    """Start a regtest node with coins to spend, in the foreground; Ctrl-C stops it, and the directory keeps its chain."""
    program = find_bitcoind(bitcoind)
    if program is None:
        fail(
            "no bitcoind found. Give its path with --bitcoind or PAYCHAN_BITCOIND, put it on PATH, or on Debian run "
            "tests/fetch-bitcoind",
            status=2,
        )
    node = _Node(directory)
    if node.runs():
        fail(f"a node is already running in {node.directory}. `paychan node info` shows it")
    for port, option in ((rpc_port, "--rpc-port"), (zmq_port, "--zmq-port")):
        if holder := holder_of_port(port):
            fail(f"port {port} is held by {holder}. Stop that, or choose another port with {option}")
    node.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    node.conf.write_text(_CONF.format(rpc_port=rpc_port, zmq_port=zmq_port))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    log = node.directory / "bitcoind.log"
    with log.open("wb") as errors:
        child = subprocess.Popen(  # noqa: S603 - the program that the user chose
            [program, f"-datadir={node.directory}", "-printtoconsole=0", f"-mocktime={node.ahead}"],
            stdout=errors,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches this process only, which stops the node
        )
    try:
        _wait_until_up(node, child, log)
        _provide_money(node)
        _show(node)
        child.wait()
    except _Stopped:
        pass
    finally:
        child.terminate()
        child.wait()


@app.command(epilog=_examples("paychan node mine", "paychan node mine 6"))
def mine(
    blocks: Annotated[int, typer.Argument(metavar="[BLOCKS]", min=1, max=10_000, help="Number of blocks.")] = 1,
    directory: DirOption = DEFAULT_DIR,
) -> None:
    """Mine blocks; they confirm the waiting transactions."""
    node = _Node(directory)
    with _reported(node):
        _mine(node, blocks)
        say(f"height {node.rpc('getblockcount'):,}")


@app.command(
    name="pass", epilog=_examples("paychan node pass 170   (more than the 7 days that a channel lasts by default)")
)
def pass_(
    hours: Annotated[int, typer.Argument(metavar="HOURS", min=1, max=10_000, help="Number of hours.")],
    directory: DirOption = DEFAULT_DIR,
) -> None:
    """Let time pass: advance the node's clock, and mine until the chain's median time has passed, too.

    The node's clock then stands still, also after a restart, until the system clock reaches it. The server uses the
    later of its clock and the median time: it settles channels near that time, and new channels need correspondingly
    more hours: paychan channel new --hours.
    """
    node = _Node(directory)
    with _reported(node):
        until = max(node.ahead, int(time.time())) + hours * 3600
        node.set_ahead(until + _MARGIN_SECONDS)
        while (chain := node.rpc("getblockchaininfo"))["mediantime"] <= until:
            _mine(node, 1)
        say(f"height {chain['blocks']:,}, median time {moment(chain['mediantime'])}")


@app.command(epilog=_examples("paychan node fund 2N8hwP1WmJrFF5QWABn38y63uYLhnJYJYTF 500000"))
def fund(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="A funding address, as `paychan channel new` prints it.")
    ],
    sat: Annotated[int, typer.Argument(metavar="SAT", min=1, max=21_000_000 * 100_000_000, help="Amount in satoshi.")],
    directory: DirOption = DEFAULT_DIR,
) -> None:
    """Pay to an address from the node's own wallet, and print the new output."""
    node = _Node(directory)
    with _reported(node):
        coins = f"{sat // 100_000_000}.{sat % 100_000_000:08d}"
        txid = node.rpc("sendtoaddress", address, coins, wallet=_WALLET)
        node.rpc("getmempoolentry", txid)  # the wallet keeps transactions that its node refused
        outputs = node.rpc("gettransaction", txid, True, True, wallet=_WALLET)["decoded"]["vout"]
        vout = next(each["n"] for each in outputs if each["scriptPubKey"].get("address") == address)
        say(f"{txid}:{vout}")
        next_command("node", "mine")


@app.command(epilog=_examples("paychan node info"))
def info(directory: DirOption = DEFAULT_DIR) -> None:
    """Show the node's addresses and its height."""
    node = _Node(directory)
    with _reported(node):
        _show(node)


@app.command(epilog=_examples("paychan node stop"))
def stop(directory: DirOption = DEFAULT_DIR) -> None:
    """Stop the node; `paychan node start` continues with the same chain."""
    node = _Node(directory)
    with _reported(node):
        say(node.rpc("stop"))


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise _Stopped


@contextmanager
def _reported(node: _Node) -> Iterator[None]:
    """Report an error of the node in one sentence."""
    from paychan.chain.base import ChainFailed
    from paychan.chain.bitcoind.rpc import RpcError, Unauthorized, Unreachable

    try:
        yield
    except (Unreachable, Unauthorized):
        fail(f"no node runs in {node.directory}. `paychan node start` starts it")
    except RpcError as error:
        fail(error.reason)
    except ChainFailed as error:
        fail(str(error))


def _wait_until_up(node: _Node, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            said = log.read_text(errors="replace").strip()
            fail(f"bitcoind ended: {said}")
        if node.runs():
            return
        time.sleep(0.05)
    fail(
        f"no answer of bitcoind within {_PATIENCE_SECONDS:.0f} seconds; {node.directory}/regtest/debug.log has the reason"
    )


def _provide_money(node: _Node) -> None:
    """Mine the first coins; later one block, because a node whose newest block is a day old considers itself not synced."""
    if _WALLET not in {each["name"] for each in node.rpc("listwalletdir")["wallets"]}:
        load_on_startup = True
        node.rpc("createwallet", _WALLET, False, False, "", False, True, load_on_startup)
    _mine(node, max(1, _FIRST_BLOCKS - node.rpc("getblockcount")))


def _mine(node: _Node, blocks: int) -> None:
    node.rpc("setmocktime", node.ahead)
    node.rpc("generatetoaddress", blocks, node.rpc("getnewaddress", wallet=_WALLET))


def _show(node: _Node) -> None:
    own = node.cookie == _Node(DEFAULT_DIR).cookie and node.url.endswith(f":{_DEFAULT_RPC_PORT}")
    chain = node.rpc("getblockchaininfo")
    show_facts(
        "paychan node",
        ("RPC", Value(node.url, "bold")),
        ("Cookie", whole(node.cookie)),
        ("ZMQ", node.zmq),
        ("Height", f"{chain['blocks']:,}, median time {moment(chain['mediantime'])}"),
        *([("Clock", f"stands at {moment(node.ahead)}")] if node.ahead else []),
        ("Wallet", f"{node.rpc('getbalance', wallet=_WALLET):.8f} BTC to spend"),
        ("Fund", completed("`paychan node fund ADDRESS SAT` pays from this wallet; regtest coins have no value")),
        ("Mine", command("node", "mine")),
        ("Server", "its settings [chain] need this RPC and Cookie; those of regtest have them" if own else ""),
        ("Next", command("up", "regtest") if own else ""),
    )
