"""Threat 42: no output of a full run holds a secret, neither in normal use, nor in a refusal, nor in a crash."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from bitcoin.base58 import encode as base58
from bitcoin.core import Hash
from coincurve import PrivateKey

from paychan.protocol.keytree import HARDENED, Node
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.wire.signer_messages import Health, KeyRequest, encode_frame
from paychan.running import read_running
from paychan.shared import words as mnemonic
from signer.keys.ring import CHANNEL_BRANCH, DESTINATION_BRANCH, IDENTITY_PATH, RESERVE_PATH, channel_words
from signer.secret.sources import Secret
from signer.seed.file import read_seeds
from tests.lib.rbpcp import V1, V2, Payer
from tests.lib.secretscan import Secrets
from tests.lib.softhsm import SoftHsm, find_module

PROGRAMS = Path(sys.executable).parent
PATIENCE_SECONDS = 120.0
PIN, WRONG_PIN = "83650174926153", "29461538076241"

SIGNER = """
network = "test"
debug = true
state_dir = "{state}"
[key]
mode = "hardened"
"""

SERVER = """
network = "test"
debug = true
state_dir = "{state}"
[chain]
backend = "debug"
[http]
port = 0
{fast_path}
[management]
port = 0
[log]
level = "debug"
access = true
"""


class Run:
    """The whole run with every output byte: `outputs` by a name that tells the source."""

    def __init__(self, directory: Path, signer: str = SIGNER, *, opened_by_passphrase: bool = True) -> None:
        self.directory = directory
        self.opened_by_passphrase = opened_by_passphrase
        self.state = directory / "state"
        self.outputs: dict[str, bytes] = {}
        self.secrets = Secrets()
        self.signer_file, self.server_file = directory / "signer.toml", directory / "server.toml"
        self.signer_file.write_text(signer.format(state=self.state))
        self.server_file.write_text(SERVER.format(state=self.state, fast_path=""))
        self.passphrase, self.wrong = (f"{secrets.token_urlsafe(9)} ä {secrets.token_urlsafe(9)}" for _ in range(2))
        self.secrets.add("passphrase", self.passphrase)
        self.secrets.add("a wrong passphrase", self.wrong)
        self.environment = {
            **os.environ, "PORT": "", "PYTHONFAULTHANDLER": "1", "COLUMNS": "250",
            "PAYCHAN_WALLET": str(directory / "wallet"),
        }  # fmt: skip
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    # --- programs ---

    def run_command(self, *words: str | Path, passphrase: str = "", typed: str = "", status: int = 0) -> None:
        """Run a command to its end and store its output."""
        command = [PROGRAMS / words[0], *words[1:]]
        with self.descriptor(passphrase) as (options, descriptors):
            ended = subprocess.run(
                [*command, *options], capture_output=True, check=False, timeout=PATIENCE_SECONDS,
                input=typed.encode(), pass_fds=descriptors, env=self.environment, cwd=self.directory,
            )  # fmt: skip
        self.outputs[f"{len(self.outputs)}: {' '.join(map(str, words))}"] = ended.stdout + ended.stderr
        assert ended.returncode == status, (ended.stdout + ended.stderr).decode()

    def start(self, name: str, *words: str | Path, passphrase: str = "") -> subprocess.Popen[bytes]:
        """Start a process that keeps running; its output goes to a file of the run."""
        with self.descriptor(passphrase) as (options, descriptors), (self.directory / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [*words, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=descriptors, env=self.environment, cwd=self.directory,
            )  # fmt: skip
        return self.daemons[name]

    def start_signer(self, name: str = "signer") -> None:
        self.open_seed(name, PROGRAMS / "paychan-signer")
        self.wait(self.signer_listens, name)

    def open_seed(self, name: str, *words: str | Path) -> subprocess.Popen[bytes]:
        """Start a signer of a kind, which gets the passphrase if it needs one."""
        return self.start(name, *words, self.signer_file, passphrase=self.passphrase * self.opened_by_passphrase)

    def signer_listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.state / "signer.sock")) == 0

    def start_server(self) -> None:
        process = self.start("server", PROGRAMS / "paychan", "serve", self.server_file)
        self.wait(lambda: (running := read_running(self.state)) is not None and running.pid == process.pid, "server")

    def wait(self, true: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true():
            assert time.monotonic() < deadline
            assert self.daemons[name].poll() is None, (self.directory / f"{name}.log").read_text()
            time.sleep(0.05)

    def end(self, name: str, number: signal.Signals) -> int:
        process = self.daemons[name]
        self.outputs[f"{name}: command line and environment"] = b"".join(
            Path(f"/proc/{process.pid}/{what}").read_bytes() for what in ("cmdline", "environ")
        )
        process.send_signal(number)
        return process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        for process in self.daemons.values():
            process.kill()
            process.wait()

    def descriptor(self, passphrase: str) -> _Descriptor:
        return _Descriptor(passphrase)

    def text(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")

    # --- secrets to search for ---

    def learn_seed(self, words: list[str]) -> None:
        """Add every secret that the seed file protects."""
        with Secret(bytearray(self.passphrase.encode())) as passphrase:
            (seed,) = read_seeds(self.state / "signer.seed", passphrase)
        assert words == list(mnemonic.to_words(seed.secret))
        header = json.loads((self.state / "signer.seed").read_bytes())
        self.root = Node.from_seed(seed.master)
        extended = b"\x04\x35\x83\x94" + bytes(9) + self.root.chain_code + b"\x00" + self.root.key.secret
        self.secrets.add("entropy", seed.secret)
        self.secrets.add("seed", seed.master)
        self.secrets.add_words("words", words)
        self.secrets.add("root key", self.root.key.secret)
        self.secrets.add("root chain code", self.root.chain_code)
        self.secrets.add("root xprv", base58(extended + Hash(extended)[:4]))
        self.secrets.add("reserve key", self.root.descend(RESERVE_PATH).key.secret)
        self.secrets.add("identity key", self.root.descend(IDENTITY_PATH).key.secret)
        derived = hashlib.scrypt(
            self.passphrase.encode(), salt=base64.b64decode(header["salt"]), n=header["n"], r=header["r"], p=header["p"],
            maxmem=2**30, dklen=32,
        )  # fmt: skip
        self.secrets.add("key of the seed file", derived)

    def learn_payer(self, name: str, public_key: bytes, expiry: int) -> None:
        """Add the server's secrets of one channel."""
        below = [word | HARDENED for word in channel_words(public_key, expiry)]
        for branch, what in ((CHANNEL_BRANCH, "channel"), (DESTINATION_BRANCH, "destination")):
            node = self.root.child(branch).descend(below)
            self.secrets.add(f"{what} key of {name}", node.key.secret)
            self.secrets.add(f"{what} chain code of {name}", node.chain_code)

    def learn_token(self) -> str:
        token = (self.state / "management.token").read_text()
        self.secrets.add("management token", token.strip())
        return token

    # --- HTTP ---

    def http(self) -> httpx.Client:
        """Return a client whose responses are outputs, from the status line to the last byte of the body."""

        def keep(response: httpx.Response) -> None:
            head = "".join(f"{name}: {value}\n" for name, value in response.headers.items())
            name = f"{len(self.outputs)}: answer to {response.request.method} {response.request.url.path}"
            self.outputs[name] = f"{response.status_code}\n{head}\n".encode() + response.read()

        return httpx.Client(event_hooks={"response": [keep]}, timeout=PATIENCE_SECONDS, verify=False)

    @property
    def url(self) -> str:
        running = read_running(self.state)
        assert running is not None
        return running.url

    @property
    def management_url(self) -> str:
        running = read_running(self.state)
        assert running is not None
        return running.management_url


class _Descriptor:
    """A pipe with a passphrase in it, and the options that name it."""

    def __init__(self, passphrase: str) -> None:
        self.passphrase = passphrase

    def __enter__(self) -> tuple[list[str], tuple[int, ...]]:
        self.out, into = os.pipe()
        os.write(into, self.passphrase.encode() + b"\n")
        os.close(into)
        if not self.passphrase:
            return [], ()
        return ["--passphrase-fd", str(self.out)], (self.out,)

    def __exit__(self, *_: object) -> None:
        os.close(self.out)


# --- the run ----------------------------------------------------------------------------------------------------------


def make_the_seed(run: Run, home: Path) -> None:
    """`init` into a file of words, `verify` with right and wrong ones, and all other commands that read words or seed."""
    words_file = home / "words"
    run.run_command(
        "paychan-signer",
        "init",
        run.signer_file,
        "--destination",
        "seed",
        "--words-file",
        words_file,
        passphrase=run.passphrase,
    )
    words = words_file.read_text().split()
    run.learn_seed(words)
    verify = ("paychan-signer", "verify", run.signer_file, "--words-file", "-")
    run.run_command(*verify, passphrase=run.passphrase, typed=" ".join(words))
    run.run_command(*verify, passphrase=run.passphrase, typed=" ".join([*words[:-1], "paychan"]), status=2)
    run.run_command(*verify, passphrase=run.wrong, typed=" ".join(words), status=2)
    run.run_command("paychan-signer", "init", run.signer_file, passphrase=run.passphrase, status=2)
    run.run_command(
        "paychan-signer", "recover", run.signer_file, typed=" ".join(words), passphrase=run.passphrase, status=2
    )
    run.run_command("paychan-signer", "export-xpub", run.signer_file, passphrase=run.passphrase)
    run.run_command("paychan-signer", "encrypt", run.signer_file, passphrase=run.passphrase, status=2)
    run.run_command("paychan-signer", run.signer_file, passphrase=run.wrong, status=2)
    run.run_command("paychan-signer", run.signer_file, status=2)


def raw_channels(run: Run) -> None:
    """A channel of each version, including refusals, over HTTP as clients do."""
    with run.http() as http:
        for name, kind in (("a v1 channel", V1), ("a v2 channel", V2)):
            payer = Payer()
            v1 = V1(run.url, payer, http)
            key = v1.funding_info().json()["server_pubkey"]
            payer.terms = make_terms(bytes.fromhex(key), payer.public_key, payer.expiry)
            run.learn_payer(name, payer.public_key, payer.expiry)
            ways = kind(run.url, payer, http)
            assert ways.open(payer.payment(100_000)).is_success
            if isinstance(ways, V2):
                run.secrets.add("secret of a v2 channel", bytes.fromhex(ways.secret))
                refused = http.put(ways.resource(secret="ab" * 32), content=ways.body(payer.payment(110_000)))
                assert refused.status_code == 404
            assert ways.pay(payer.payment(120_000)).is_success
            assert ways.pay(payer.payment(110_000)).is_error
            assert ways.close(payer.payment(120_000)).is_success
            assert ways.pay(payer.payment(140_000)).is_error
        http.get(f"{run.url}/v1/fundingInfo?client_pubkey=zz&exp_time=1")
        http.get(f"{run.url}/nothing")


def a_payers_commands(run: Run) -> None:
    """A channel by the payer's commands; its secrets may be in the wallet."""
    wallet = run.directory / "wallet"
    run.run_command("paychan", "channel", "new", run.url, "--hours", "100", "--debug")
    (record,) = (json.loads(file.read_text()) for file in wallet.glob("*.json"))
    name = record["name"]
    public_key = PrivateKey.from_hex(record["private_key"]).public_key.format()
    run.learn_payer("the payer's channel", public_key, record["expiry"])
    run.secrets.add("the payer's key", bytes.fromhex(record["private_key"]))
    run.run_command("paychan", "channel", "open", name)
    opened = json.loads((wallet / f"{name}.json").read_text())
    run.secrets.add("secret of the payer's channel", bytes.fromhex(opened["secret"]))
    for words in (["pay", name, "1000"], ["status", name], ["refund", name], ["close", name], ["list"]):
        run.run_command("paychan", "channel", *words)


def an_operators_commands(run: Run) -> None:
    """All of an operator's requests to server and signer, with the right token and a wrong one."""
    token = run.learn_token()
    with run.http() as http:
        for path in ("/health", "/totals", "/channels", "/nothing", f"/channels/{'02' + '11' * 32}/info"):
            for given in (token, "wrong"):
                http.get(run.management_url + path, headers={"Authorization": f"Bearer {given}"})
        right = {"Authorization": f"Bearer {token}"}
        closed = http.get(f"{run.management_url}/channels?state=closed", headers=right).json()["channels"]
        assert len(closed) == 3
        for channel in closed:
            where = channel["funding_source"].replace(":", "/")
            assert http.get(f"{run.management_url}/channels/{where}", headers=right).is_success
    run.run_command("paychan", "status", run.server_file)
    run.run_command("paychan", "channels", "list", run.server_file)
    run.run_command("paychan", "backup", "create", run.server_file)


def the_signers_commands(run: Run) -> None:
    """The signer's own commands."""
    run.run_command("paychan-signer", "status", run.signer_file)
    run.run_command("paychan-signer", "status", "--json", run.signer_file)
    run.run_command("paychan-signer", "heartbeat", run.signer_file)
    run.run_command("paychan-signer", "audit", "verify", run.signer_file)
    run.run_command("paychan-signer", "audit", "show", run.signer_file)


def a_strangers_requests(run: Run) -> None:
    """The signer's replies on its socket, to right and wrong requests."""
    for message in (encode_frame(Health(1)), encode_frame(KeyRequest(2, b"\x02" * 33, 2_000_000_000)), b"\xff" * 64):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_SECONDS)
            connection.connect(str(run.state / "signer.sock"))
            connection.sendall(message + b"\xff" * 4)  # garbage at the end, so that the signer closes the connection
            with connection.makefile("rb") as file:
                run.outputs[f"{len(run.outputs)}: the signer's reply"] = file.read()


IN_THE_MIDDLE = """
import asyncio, gc, sys, traceback
import signer.service
from rich.pretty import pretty_repr

begin = asyncio.run

async def served_for_a_second(main):
    task = asyncio.create_task(main)
    await asyncio.sleep(1)
    assert not task.done()
    then()
    task.cancel()
    try:
        await task
    except asyncio.CancelledError as error:
        raise RuntimeError("provoked") from error

asyncio.run = lambda main: begin(served_for_a_second(main))
"""
"""The signer, which does something unusual once it has its keys and listens."""

CRASH = f"""{IN_THE_MIDDLE}
def then():
    pass

try:
    signer.service.main()
except BaseException as error:
    print("".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))
    sys.exit(1)
"""
"""It fails, and the traceback shows every variable of every frame."""

SHOW_ALL = f"""{IN_THE_MIDDLE}
def then():
    seen, todo = set(), [sys._getframe(), *gc.get_objects()]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or thing is seen or thing is todo:
            continue
        seen.add(id(thing))
        todo += gc.get_referents(thing)
        module = type(thing).__module__
        if isinstance(module, str) and module.split(".")[0] in ("signer", "paychan", "coincurve"):
            print(type(thing).__qualname__, repr(thing), str(thing), pretty_repr(thing), format(thing))

signer.service.main()
"""
"""It shows every reachable object of the project's types."""


def crashes(run: Run) -> None:
    """SIGABRT with faulthandler, an error with a traceback, SIGINT while the seed is opened."""
    assert run.end("signer", signal.SIGABRT) == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in run.text("signer")
    for name, script in (("crash", CRASH), ("objects", SHOW_ALL)):
        process = run.open_seed(name, sys.executable, "-c", script)
        assert process.wait(PATIENCE_SECONDS) == 1
        assert "RuntimeError: provoked" in run.text(name)
    assert "keys = <signer.keys.ring.KeyRing object" in run.text("crash")
    assert "\nKeyRing <signer.keys.ring.KeyRing object" in run.text("objects")
    process = run.open_seed("interrupted", PROGRAMS / "paychan-signer")
    run.wait(lambda: "event=isolation" in run.text("interrupted"), "interrupted")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE_SECONDS)


def files(run: Run) -> Iterator[tuple[str, bytes]]:
    for path in sorted(run.directory.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(run.directory)), path.read_bytes()


def at_home(where: str, names: list[str]) -> frozenset[str]:
    """Return the secrets that may be in this output."""
    channel_secrets = frozenset(name for name in names if name.startswith("secret of "))
    if where.startswith("wallet/"):
        return channel_secrets | {"the payer's key"}
    if where.startswith(("state/store/", "state/backups/")):
        return channel_secrets
    if where == "state/management.token":
        return frozenset({"management token"})
    if "answer to POST /v2/channels/" in where:  # Location gives the payer the channel's address
        return channel_secrets
    return frozenset()


def leaks(run: Run) -> list[str]:
    everything = [*run.outputs.items(), *files(run)]
    names = run.secrets.names
    return [
        f"{name} in {where}" for where, data in everything for name in run.secrets.found_in(data, at_home(where, names))
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A whole run of signer and server, from `init` to crashes; the words are kept outside of the run's directory."""
    run = Run(tmp_path_factory.mktemp("run"))
    try:
        make_the_seed(run, tmp_path_factory.mktemp("home"))
        run.start_signer()
        run.start_server()
        raw_channels(run)
        a_payers_commands(run)
        an_operators_commands(run)
        the_signers_commands(run)
        a_strangers_requests(run)
        crashes(run)
        assert run.end("server", signal.SIGABRT) == -signal.SIGABRT
        yield run
    finally:
        run.kill()


@pytest.mark.timeout(600)
def test_threat_42_no_output_of_a_full_run_holds_a_secret(run: Run) -> None:
    """Logs, responses, files, terminals, tracebacks, variables of crashed frames, `repr` of all objects: no secret."""
    outputs = [*run.outputs, *(where for where, _ in files(run))]

    assert len(run.secrets.names) > 20
    assert len(outputs) > 60
    assert "state/signer.audit" in outputs
    assert any(where.startswith("state/signer.ledger/") for where in outputs)
    assert leaks(run) == []


@pytest.mark.timeout(600)
def test_a_planted_leak_is_found(run: Run) -> None:
    """One line in a log, in any of the usual encodings, makes the scan fail; so does half a key."""
    root = run.root.key.secret
    planted = (
        root.hex(), root.hex().upper(), root.hex()[:32], str(int.from_bytes(root, "big")), repr(root),
        str(list(root)), base64.b64encode(b"k=" + root).decode(), f"Node(key={root!r})",
    )  # fmt: skip
    log = run.directory / "planted.log"
    for text in planted:
        assert run.secrets.found_in(f"level=info event={text}\n".encode()) == ["root key"], text
    log.write_text(f"passphrase={run.passphrase}")
    assert leaks(run) == ["passphrase in planted.log"]
    log.unlink()


@pytest.mark.skipif(find_module() is None, reason="no SoftHSM: apt install softhsm2 (tests/system-packages)")
@pytest.mark.timeout(600)
def test_threat_42_a_tokens_pin_stays_inside(tmp_path: Path) -> None:
    """With keys in a token, its PIN is in no output either, nor is a wrong one."""
    token = SoftHsm(tmp_path / "token", pin=PIN)
    (tmp_path / "run").mkdir()
    text = token.signer_config.replace('network = "regtest"', 'state_dir = "{state}"\nnetwork = "regtest"')
    run = Run(tmp_path / "run", text, opened_by_passphrase=False)
    run.environment.update(token.environment)
    run.secrets.add("PIN", PIN)
    run.secrets.add("a wrong PIN", WRONG_PIN)
    try:
        token.pin_file.write_text(WRONG_PIN)
        run.run_command("paychan-signer", run.signer_file, status=2)
        token.pin_file.write_text(PIN)
        run.start_signer()
        a_strangers_requests(run)
        the_signers_commands(run)
        crashes(run)
    finally:
        run.kill()

    assert leaks(run) == []
