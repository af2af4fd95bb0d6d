"""The plug-ins' packages load an SDK when it is used, and no earlier."""

from __future__ import annotations

import subprocess
import sys

from tests.lib.readme import ROOT


def test_importing_a_package_loads_no_sdk() -> None:
    """A program that imports the packages alone needs neither SDK; another name is an AttributeError."""
    program = """
import sys, paychan.mcp, paychan.mpp
assert not {"mcp", "mpp", "pydantic", "starlette"} & set(sys.modules), sorted(sys.modules)
for package in (paychan.mcp, paychan.mpp):
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    try:
        package.nothing
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError(package)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)
