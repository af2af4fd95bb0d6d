"""Run a program under a unit's restrictions, without systemd: `python -m tests.lib.sandbox UNIT PROGRAM ARGUMENT…`.

It applies the restrictions that can stop a program at work: system calls, socket families, writable and executable
memory, network, umask, limits. It follows systemd (src/core/execute.c), but sets them by hand.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pyseccomp

_PR_SET_NO_NEW_PRIVS, _PR_SET_MDWE = 38, 65  # linux/prctl.h
_CLONE_NEWNET = 0x40000000


def read_unit(unit: Path) -> dict[str, list[str]]:
    """Return the values of each key of [Service], in their order."""
    values: dict[str, list[str]] = {}
    section = ""
    for line in unit.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif "=" in line and not line.startswith("#") and section == "Service":
            key, value = line.split("=", 1)
            values.setdefault(key.strip(), []).append(value.strip())
    return values


def allowed_calls(filters: list[str]) -> set[str]:
    """Return the system calls that SystemCallFilter= lines allow; the first line must be an allow list."""
    groups = _groups()

    def expand(names: list[str]) -> set[str]:
        calls: set[str] = set()
        for name in names:
            calls |= expand(groups[name]) if name.startswith("@") else {name}
        return calls

    allowed = expand(["@default"])
    for line in filters:
        if line.startswith("~"):
            allowed -= expand(line[1:].split())
        else:
            allowed |= expand(line.split())
    return allowed


def _groups() -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    members: list[str] = []
    listing = subprocess.check_output(["systemd-analyze", "syscall-filter", "--no-pager"], text=True)
    for line in listing.splitlines():
        word = line.split("#")[0].strip()
        if word and not line[0].isspace():
            members = groups.setdefault(word, [])
        elif word:
            members.append(word)
    return groups


def _enter(service: dict[str, list[str]]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    os.umask(int(service["UMask"][0], 8))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if service.get("PrivateNetwork") == ["yes"] and libc.unshare(_CLONE_NEWNET):
        sys.exit("no network namespace")
    if service["NoNewPrivileges"] == ["yes"] and libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        sys.exit("no NoNewPrivileges")
    if service["MemoryDenyWriteExecute"] == ["yes"] and libc.prctl(_PR_SET_MDWE, 1, 0, 0, 0):
        print("kernel before 6.3: no MemoryDenyWriteExecute", file=sys.stderr)
    _load(allowed_calls(service["SystemCallFilter"]), service["RestrictAddressFamilies"][0].split())


def _load(calls: set[str], families: list[str]) -> None:
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in sorted(calls - {"socket"}):
        if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) != -1:
            rules.add_rule(pyseccomp.ALLOW, name)
    for family in families:
        rules.add_rule(pyseccomp.ALLOW, "socket", pyseccomp.Arg(0, pyseccomp.EQ, int(getattr(socket, family))))
    rules.load()


if __name__ == "__main__":
    _enter(read_unit(Path(sys.argv[1])))
    os.execv(sys.argv[2], sys.argv[2:])
