"""Architecture: which modules a package loads at run time, where the packages come from, and limits of code size.

Import contracts in `pyproject.toml` check static imports; an import inside `paychan/__init__.py`, which the signer runs
too, is detected only here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import actors
import paychan
import signer
from tests.lib.looped import looped

ROOT = Path(paychan.__file__).parents[1]
SERVER_PACKAGES = {"tornado", "pykka", "plyvel", "httpx", "uvloop", "psycopg", "typer", "rich"}
OPENSSL = "bitcoin.core.key"
"""python-bitcoinlib's keys load OpenSSL through ctypes when they are imported (threat 43)."""


def modules_of(package: str) -> list[str]:
    """Dotted names of a package's modules and of the packages inside it."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


PROTOCOL = [name for name in modules_of("paychan/protocol") if name != "paychan.protocol"]
SIGNER = [name for name in modules_of("signer") if name != "signer"]
SHARED = modules_of("paychan/shared")

WORDS = {"mnemonic"}
"""BIP39's list of words, for the signer's seed and for a payer's wallet: pure Python, without a dependency."""

PURE = {
    *(
        "base64",
        "binascii",
        "abc",
        "collections.abc",
        "enum",
        "functools",
        "hashlib",
        "hmac",
        "itertools",
        "json",
        "operator",
        "re",
        "struct",
        "tomllib",
        "typing",
        "zlib",
        "__future__",
    ),
    *("bitcoin.base58", "bitcoin.core", "bitcoin.core.script", "coincurve", "msgspec"),
}
"""The modules that the core may import: no clock, no randomness, no file, no socket, no thread, no log."""

MODULE_LINES = 400
FUNCTION_LINES = 60
SOURCES = sorted(path for folder in ("paychan", "actors", "signer", "bench") for path in (ROOT / folder).rglob("*.py"))


def loaded_by(*modules: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after it imported these."""
    program = f"import sys, {', '.join(modules)}; print('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def imports_of(module: str) -> set[str]:
    """Dotted names of the modules that the source of a module imports."""
    path = ROOT / module.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    return {
        name
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }


def packages(modules: set[str]) -> set[str]:
    """Top-level packages of modules."""
    return {name.partition(".")[0] for name in modules}


def test_the_core_loads_no_server_package() -> None:
    """All modules of the protocol core together load no server, event loop or OpenSSL."""
    loaded = loaded_by("paychan", *PROTOCOL)

    assert not packages(loaded) & (SERVER_PACKAGES | {"actors", "signer", "structlog", "logging"})
    assert OPENSSL not in loaded
    assert not {"asyncio", "ssl", "random"} & loaded
    assert {name for name in loaded if name.startswith("paychan.")} <= {"paychan.protocol", *PROTOCOL}


@looped("module", PROTOCOL)
def test_the_core_imports_pure_modules_alone(module: str) -> None:
    """A module of the core imports only pure modules and modules of the core."""
    assert imports_of(module) <= PURE | set(PROTOCOL)


@looped("module", SHARED)
def test_threat_43_what_server_and_signer_share_imports_the_standard_library_alone(module: str) -> None:
    """A module that both processes run brings no package into the one that holds the keys, but `WORDS` (threat 43)."""
    imported = imports_of(module)

    assert packages(imported - set(SHARED)) <= sys.stdlib_module_names | WORDS


def test_threat_43_the_signer_loads_the_protocol_core_alone() -> None:
    """The process that holds the keys loads no server package and no OpenSSL (threat 43)."""
    loaded = loaded_by("signer", *SIGNER)

    assert not packages(loaded) & ((SERVER_PACKAGES - {"typer", "rich", "plyvel"}) | {"actors"})
    assert OPENSSL not in loaded
    assert {name for name in loaded if name.startswith("paychan.")} <= {"paychan.protocol", *PROTOCOL, *SHARED}
    assert not {f"paychan.protocol.{name}" for name in ("channel", "state_machine", "record", "wire.rbpcp")} & loaded


def test_all_packages_come_from_one_install() -> None:
    """PyPI has other packages called `actors` and `signer`: the imported ones are those beside `paychan`."""
    roots = {Path(package.__file__ or "").parents[1] for package in (paychan, actors, signer)}

    assert roots == {ROOT}


def test_the_root_package_is_empty() -> None:
    """The signer executes `paychan/__init__.py` too, so the file is empty."""
    assert not (ROOT / "paychan" / "__init__.py").read_text().strip()


@looped("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    """No module is longer than 400 lines, and no function longer than 60."""
    source = path.read_text()
    functions = [
        (node.name, (node.end_lineno or 0) - node.lineno + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]

    assert len(source.splitlines()) <= MODULE_LINES
    assert [function for function in functions if function[1] > FUNCTION_LINES] == []


def test_no_module_is_a_drawer() -> None:
    """A module has the name of its subject, not a name for a mixed collection."""
    names = {path.stem for path in SOURCES}

    assert not names & {"utils", "util", "helpers", "common", "misc"}
