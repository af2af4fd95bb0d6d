"""The program as installed by users: a wheel, in separate environments, outside this clone.

Packages come from pip's configured index; without one, these tests are skipped, with a message.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.requirements import Requirement

from paychan.running import read_running
from tests.lib.customer import wait_for

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "config" / "deploy" / "requirements.lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAYER = [Requirement(line) for line in PROJECT["dependencies"]]
SERVER = [Requirement(line) for line in PROJECT["optional-dependencies"]["server"]]
UV = Path(sys.executable).parent / "uv"

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(not UV.exists(), reason="uv is not installed")]


def run(*command: object, cwd: Path | None = None, status: int = 0, **environment: str) -> str:
    """Run a command outside this clone's environment, and return its output."""
    outside = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "PORT")}
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=cwd,
        env={**outside, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def from_json(text: str) -> Any:
    """Decode the JSON that a command printed before its warnings."""
    return json.JSONDecoder().raw_decode(text)[0]


def pythons() -> list[str]:
    """Return the interpreters to install on: this one, and those in PAYCHAN_PYTHONS, paths divided by colons."""
    return [sys.executable, *filter(None, os.environ.get("PAYCHAN_PYTHONS", "").split(":"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(UV, "build", "-q", "--wheel", "--out-dir", directory, ROOT)
    return next(directory.glob("paychan-*.whl"))


def environment(directory: Path, *packages: object, python: str = sys.executable) -> Path:
    """Make a virtual environment with these packages, and return the directory of its programs."""
    run(UV, "venv", "-q", "--python", python, directory)
    run(UV, "pip", "install", "-q", "--python", directory / "bin" / "python", *packages)
    return directory / "bin"


@pytest.fixture(scope="module")
def deployed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install like a deployment: the locked packages, each checked by its hash, and the wheel."""
    directory = tmp_path_factory.mktemp("deployed") / "venv"
    programs = environment(directory, "--require-hashes", "-r", LOCK)
    run(UV, "pip", "install", "-q", "--python", programs / "python", "--no-deps", wheel)
    return programs


@pytest.fixture(scope="module")
def payer(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install like a payer: the wheel, without extras."""
    return environment(tmp_path_factory.mktemp("payer") / "venv", wheel)


class Installation:
    """`paychan up debug` of an installation, run in an empty directory, on free ports."""

    def __init__(self, programs: Path, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        run(programs / "paychan", "init", "debug", cwd=directory)
        file = directory / "debug" / "server.toml"
        file.write_text(re.sub(r"(?m)^port = \d+", "port = 0", file.read_text()))
        outside = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PORT")}
        self.process = subprocess.Popen([programs / "paychan", "up", "debug"], cwd=directory, env=outside)
        self.state = directory / ".paychan" / "debug"

    def __enter__(self) -> str:
        wait_for(lambda: read_running(self.state) is not None, "server", seconds=60)
        running = read_running(self.state)
        assert running is not None
        wait_for(
            lambda: httpx.get(f"{running.management_url}/health", verify=False).status_code == 200, "health", seconds=60
        )
        return running.url

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0


def live_through(payer: Path, url: str, wallet: Path) -> str:
    """Make a channel, open it, pay by PUT and over the stream, and close it; return the output."""
    paychan = payer / "paychan"
    new = from_json(run(paychan, "channel", "new", url, "--debug", "--wallet", wallet, "--json"))
    name = new["name"]
    output = run(paychan, "channel", "open", name, "--wallet", wallet)
    output += run(paychan, "channel", "pay", name, 7, "--wallet", wallet)
    output += run(paychan, "channel", "pay", name, 1, "--times", 50, "--wallet", wallet)
    return output + run(paychan, "channel", "close", name, "--wallet", wallet)


def test_the_wheel_has_the_module_for_javascript(wheel: Path) -> None:
    """The ES module comes with the Python package, in the folder that its page names."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()

    assert {"paychan/js/paychan.js", "paychan/js/package.json"} <= set(names)


def test_fault_42_a_plain_install_pays(payer: Path, deployed: Path, tmp_path: Path):
    """An install without extras has only the payer's packages, and they suffice for a whole channel."""
    listed = from_json(run(UV, "pip", "list", "--python", payer / "python", "--format", "json"))
    installed = {each["name"].lower() for each in listed}
    with Installation(deployed, tmp_path / "shop") as url:
        live_through(payer, url, tmp_path / "wallet")

    assert installed.isdisjoint(requirement.name.lower() for requirement in SERVER)
    assert {requirement.name.lower() for requirement in PAYER} <= installed


@pytest.mark.parametrize("command", ["up debug", "serve server.toml", "backup list x", "settle --help"])
def test_fault_42_a_command_of_the_server_says_what_to_install(payer: Path, command: str, tmp_path: Path):
    """A command whose packages are missing ends with status 2 and the line that installs them, without a traceback."""
    if command == "up debug":  # starts the signer, which prints the message
        output = run(payer / "paychan-signer", "debug/signer.toml", cwd=tmp_path, status=2)
    else:
        output = run(payer / "paychan", *command.split(), cwd=tmp_path, status=2)

    assert "pip install 'paychan[server]'" in output
    assert "Traceback" not in output


def test_fault_42_every_command_is_listed_without_its_packages(payer: Path):
    """The help of a payer's installation lists all commands; the payer's own commands show their help."""
    listed = run(payer / "paychan", "--help")

    for name in ("up", "init", "channel", "channels", "backup", "node", "serve", "settle", "status", "withdraw"):
        assert re.search(rf"(?m)^  {name} ", listed)
    for names in (["channel"], ["channel", "watch"], ["channel", "refund"], ["node"], ["node", "start"]):
        assert "Usage" in run(payer / "paychan", *names, "--help")


ARM, X86 = "aarch64-unknown-linux-gnu", "x86_64-unknown-linux-gnu"
DISTRIBUTIONS = [(ARM, "3.11"), (ARM, "3.12"), (ARM, "3.13"), (X86, "3.13")]
"""Debian 12, Ubuntu 24.04 and Debian 13 by the version of their Python; x86-64, where plyvel has no wheel."""


PAYER_PLATFORMS = [*DISTRIBUTIONS, ("aarch64-apple-darwin", "3.13"), ("x86_64-pc-windows-msvc", "3.13")]

Resolving = Callable[[bool, str, str], Future[str]]


@pytest.fixture(scope="module")
def resolving() -> Iterator[Resolving]:
    """Resolve the packages for all platforms side by side, since each resolution waits for the index."""
    wheels = ("--only-binary", ":all:")
    server = ("--extra", "server", *wheels, "--no-binary", "plyvel")
    wanted = [(False, *each) for each in PAYER_PLATFORMS] + [(True, *each) for each in DISTRIBUTIONS]
    with ThreadPoolExecutor(4) as pool:
        running = {
            (is_server, platform, python): pool.submit(
                run, UV, "pip", "compile", "-q", ROOT / "pyproject.toml", *(server if is_server else wheels),
                "--python-platform", platform, "--python-version", python, "--no-header", "-o", os.devnull,
            )
            for is_server, platform, python in wanted
        }  # fmt: skip
        yield lambda *which: running[which]


@pytest.mark.parametrize(("platform", "python"), PAYER_PLATFORMS)
def test_fault_42_no_payer_needs_a_compiler(resolving: Resolving, platform: str, python: str):
    """Every package of a plain install has a wheel for each platform and Python version that the project names."""
    resolving(False, platform, python).result()


@pytest.mark.parametrize(("platform", "python"), DISTRIBUTIONS)
def test_fault_41_only_plyvel_is_ever_built(resolving: Resolving, platform: str, python: str):
    """On a Linux server, only plyvel may lack a wheel; the README's first line installs headers for it."""
    resolving(True, platform, python).result()


@pytest.mark.parametrize("python", pythons(), ids=lambda path: Path(path).parts[-3])
def test_fault_41_the_readme_s_first_line_works_on_each_python_here(python: str, wheel: Path, tmp_path: Path):
    """With the system packages of that line, the server installs and runs on this interpreter, too.

    plyvel is built from source, as on a platform without a wheel.
    """
    programs = environment(tmp_path / "venv", "--no-binary", "plyvel", f"{wheel}[server]", python=python)
    with Installation(programs, tmp_path / "shop") as url:
        live_through(programs, url, tmp_path / "wallet")


def test_fault_41_the_readme_names_the_packages_of_the_system():
    """README and tests/system-packages install the packages for building plyvel, and CI runs the README's lines."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "pip install" in line]
    packages = (ROOT / "tests" / "system-packages").read_text()

    for name in ("python3-venv", "python3-dev", "g++", "libleveldb-dev"):
        assert name in lines[0]
        assert name in packages
    assert "tests/system-packages" in lines[1]
    assert "pytest" in lines[1]


def test_fault_81_a_wheel_alone_starts(deployed: Path, tmp_path: Path):
    """The configurations are in the wheel: `paychan init` writes them anywhere, and never overwrites a file."""
    for network in ("debug", "regtest", "test", "live"):
        output = run(deployed / "paychan", "init", network, cwd=tmp_path)
        assert "Next" in output
        for name in ("server.toml", "signer.toml"):
            assert (tmp_path / network / name).read_text() == (ROOT / "config" / network / name).read_text()
    (tmp_path / "debug" / "server.toml").write_text("# mine")

    output = run(deployed / "paychan", "init", "debug", cwd=tmp_path, status=2)

    assert "debug/signer.toml exists" in output
    assert (tmp_path / "debug" / "server.toml").read_text() == "# mine"
    assert "choose one of" in run(deployed / "paychan", "init", "mainnet", cwd=tmp_path, status=2)


def test_fault_81_up_takes_the_name_of_a_network(deployed: Path, tmp_path: Path):
    """`paychan up NETWORK` uses the wheel's configuration if there is no such directory."""
    output = run(deployed / "paychan", "up", "nowhere", cwd=tmp_path, status=2)
    shipped = run(
        deployed / "python",
        "-c",
        "from paychan.shared.configfiles import shipped_directory as s; print(s('debug'))",
        cwd=tmp_path,
    ).strip()

    assert "nowhere: no such file" in output
    assert Path(shipped).is_relative_to(deployed.parent)
    assert (Path(shipped) / "server.toml").is_file()


def test_fault_72_every_package_is_bounded_at_both_ends():
    """Each runtime dependency has a lower and an upper bound; Tornado's lower bound has no pings that grow memory."""
    for requirement in (*PAYER, *SERVER):
        assert {clause.operator for clause in requirement.specifier} == {">=", "<"}, str(requirement)
    tornado = next(requirement for requirement in SERVER if requirement.name == "tornado")
    assert not any(tornado.specifier.contains(bad) for bad in ("6.5.7", "6.5.10", "6.4", "7.0"))


def _locked() -> dict[str, str]:
    entries = re.findall(r"(?m)^([a-z0-9-]+)==(\S+)", LOCK.read_text())
    return dict(entries)


def test_fault_72_the_lock_holds_every_package_with_hashes():
    """The lock file has the packages of pyproject.toml, within its bounds, each with its hashes."""
    locked = _locked()
    text = LOCK.read_text()

    for requirement in (*PAYER, *SERVER):
        assert requirement.specifier.contains(locked[requirement.name]), str(requirement)
    for block in re.split(r"(?m)^(?=[a-z0-9-]+==)", text)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]
    assert "://" not in text


def test_fault_72_the_bill_of_materials_is_the_lock_s():
    """config/deploy/sbom.json lists each locked package with its version, and nothing else."""
    bill = json.loads((LOCK.parent / "sbom.json").read_text())

    assert {each["name"]: each["version"] for each in bill["components"]} == _locked()
    assert all(each["purl"] == f"pkg:pypi/{each['name']}@{each['version']}" for each in bill["components"])


def test_fault_72_the_lower_bounds_hold(wheel: Path, tmp_path: Path):
    """With the lowest versions that pyproject.toml allows, the tests of core and interfaces pass."""
    least = tmp_path / "least.txt"
    run(UV, "pip", "compile", "-q", ROOT / "pyproject.toml", "--extra", "server", "--resolution", "lowest-direct",
        "--python-version", "3.11", "--no-header", "--no-annotate", "-o", least)  # fmt: skip
    tools = [
        f"{name}=={version(name)}"
        for name in ("pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist", "hypothesis", "psutil")
    ]
    programs = environment(tmp_path / "venv", "-r", least, *tools, "py-bitcoinkernel==0.1.0a5")
    run(UV, "pip", "install", "-q", "--python", programs / "python", "--no-deps", wheel)
    tests = ["tests/protocol/test_rest.py", "tests/actors/test_base.py", "tests/actors/test_payments.py",
             "tests/api/test_v2_life.py", "tests/signer/test_seed.py", "tests/client/test_streaming.py"]  # fmt: skip

    for requirement in (*PAYER, *SERVER):
        least_version = next(clause.version for clause in requirement.specifier if clause.operator == ">=")
        assert re.search(rf"(?m)^{requirement.name}=={re.escape(least_version)}(\.0)*$", least.read_text())
    run(
        programs / "python",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *tests,
        cwd=_clone(tmp_path / "clone"),
    )


def _clone(directory: Path) -> Path:
    """Copy the files that tests need beside an installed wheel, without the packages, which come from its environment."""
    directory.mkdir()
    for name in ("tests", "bench", "config", "paychan", "actors", "signer"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, directory / name)
    return directory


ON_WINDOWS = """
import asyncio, subprocess, sys, types
import httpx, rich.console, segno, typer, websockets.asyncio.client, websockets.sync.client
locked = set()
def locking(descriptor, mode, size):
    if descriptor in locked:
        raise OSError
    locked.add(descriptor)
sys.modules["fcntl"] = None
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_LOCK=1, LK_NBLCK=2)
sys.platform = "win32"
from pathlib import Path
from paychan.cli.payer import channel
from paychan.client import Payer
made = Payer(sys.argv[1], wallet=Path(sys.argv[2])).new_channel(hours=72)
made.fund_debug()
made.open()
print(made.pay(1000).paid_sat)
"""


def test_fault_42_the_payer_s_library_needs_nothing_of_posix(deployed: Path, tmp_path: Path):
    """Without fcntl, as on Windows, a program pays. The test replaces the lock of Windows; all else is real."""
    with Installation(deployed, tmp_path / "shop") as url:
        output = run(deployed / "python", "-c", ON_WINDOWS, url, tmp_path / "wallet", cwd=tmp_path)

    assert output.strip() == "1000"
