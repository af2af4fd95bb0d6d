"""Isolation: kernel protections that keep the keys inside, even if an attacker runs code as the same user or in here.

`signer.service` calls `isolate` once, before any key is read and any thread is started; `signer.token.process` does the
same for a token's library. Each protection is applied if the kernel and the rights at the start allow it; the results
are returned as text, for the log and `paychan-signer status`.

The order is forced: steps that need root come before the change of user, and the ban of system calls comes after all
steps that use them. Only root gets a network namespace: another user would need a user namespace, in which the kernel
reports uid 65534 for every peer (SO_PEERCRED), so the signer could not check the peer's user. The seccomp filter
forbids sockets there.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import resource
import signal
from collections.abc import Sequence
from pathlib import Path

from signer.config import Isolation
from signer.sandbox.seccomp import FilterError, refuse_system_calls

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38  # linux/prctl.h
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # asm-generic/mman.h
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
_CAP_CHOWN, _CAP_IPC_LOCK = 0, 14

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


class IsolationError(Exception):
    """A required protection is not available: names the setting, and says how to mend it."""

    def __init__(self, *, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


def keep_private() -> None:
    """Keep files and memory from other users; every command that may see a secret calls it."""
    os.umask(0o077)
    _no_core_files()
    _not_dumpable()


def end_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this process when its parent ends. Call it after any change of user, which undoes it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0)


def isolate(
    settings: Isolation, *, token: bool = False, directories: Sequence[Path] = (), group: str = ""
) -> tuple[str, ...]:
    """Apply every protection that is available, for the rest of the process's life.

    Args:
        settings: the user to switch to, and the protections that are required.
        token: this process runs a token's library, which may need a network; it keeps the network.
        directories: directories that `settings.user` must be able to write; missing ones are made for that user.
        group: group that gets the socket; as root, this process joins the group, which is enough to give it the socket.

    Returns:
        One text per protection. A text that begins with "no " names a missing protection and the reason.

    Raises:
        IsolationError: a required protection is not available, or the user can't be used.
        RuntimeError: threads run already; most protections would not cover them.
    """
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        msg = "isolate comes before any thread"
        raise RuntimeError(msg)
    os.umask(0o077)
    texts = {"files": "private files", "core": _no_core_files()}
    emptied = not token and _leave_network()
    texts["memory"], capabilities = _lock_memory(stays_root=not settings.user and os.geteuid() == 0)
    texts["user"] = _become(settings.user, directories, group, capabilities)
    texts["dumpable"] = _not_dumpable()
    texts["privileges"] = _no_new_privileges()
    texts["seccomp"] = _filter(sockets=token)
    texts["network"] = _network(token=token, emptied=emptied, filtered=not _missing(texts["seccomp"]))
    for name in settings.require:
        if _missing(texts[name]):
            raise IsolationError(key="isolation.require", reason=f"{name!r} is not available: {texts[name]}")
    return tuple(texts.values())


def _missing(text: str) -> bool:
    return text.startswith("no ")


def _error() -> str:
    return os.strerror(ctypes.get_errno())


# --- memory ---------------------------------------------------------------------------------------------------------


def _no_core_files() -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # every process may lower it
    return "core files off"


def _not_dumpable() -> str:
    """Keep memory out of core dumps sent to a program, and out of reach of a debugger of the same user.

    Called after the change of user, at which the kernel sets its own value (fs.suid_dumpable).
    """
    if _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        return f"no protection from debuggers: {_error()}"
    return "not dumpable"


def _lock_memory(*, stays_root: bool) -> tuple[str, int]:
    """Keep memory out of swap; return the capabilities that this needs from now on, as bits.

    Only without a limit: the kernel counts addresses, not pages in use. Under a limit, the stack of another thread or a
    reservation of the allocator could fail at any later time. MCL_ONFAULT: unused addresses take no memory.
    """
    needed = 0
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):  # Python raises ValueError for EPERM here
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        if not (stays_root and _is_capable(_CAP_IPC_LOCK)):
            return f"no memory lock: limit is {limit // 1024} KiB, set LimitMEMLOCK=infinity", 0
        needed = 1 << _CAP_IPC_LOCK  # otherwise the limit would apply to later allocations
    if _LIBC.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        return f"no memory lock: {_error()}", 0
    return "memory locked", needed


# --- network and system calls ---------------------------------------------------------------------------------------


def _leave_network() -> bool:
    """Move to an empty network namespace. Unix sockets are still found by path."""
    return bool(_LIBC.unshare(_CLONE_NEWNET) == 0)


def _network(*, token: bool, emptied: bool, filtered: bool) -> str:
    ways = ["namespace"] * (emptied or _only_loopback()) + ["seccomp"] * (filtered and not token)
    if ways:
        return f"network out of reach ({', '.join(ways)})"
    return "no network isolation: " + ("the token's library may need it" if token else "neither namespace nor seccomp")


def _only_loopback() -> bool:
    """Return whether the parent process has given this one an empty network (systemd's PrivateNetwork)."""
    try:
        lines = Path("/proc/self/net/dev").read_text(encoding="utf8").splitlines()[2:]
    except OSError:
        return False
    return [line.split(":")[0].strip() for line in lines] == ["lo"]


def _no_new_privileges() -> str:
    """Lock privileges: a program that an attacker starts from here gets no more rights, setuid or not."""
    if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return f"no lock of privileges: {_error()}"
    return "privileges locked"


def _filter(*, sockets: bool) -> str:
    try:
        refuse_system_calls(sockets=sockets)
    except FilterError as error:
        return f"no seccomp: {error}"
    return "seccomp"


# --- user -----------------------------------------------------------------------------------------------------------


def _become(name: str, directories: Sequence[Path], group: str, capabilities: int) -> str:
    """Switch to a user without capabilities. Without a name, or if not root, keep the user and these capabilities."""
    if os.geteuid() != 0:
        _drop_capabilities()
        is_it = not name or _find(name).pw_uid == os.geteuid()
        return f"own user (uid {os.geteuid()})" if is_it else f"no change of user: started as uid {os.geteuid()}"
    user = _find(name) if name else pwd.getpwuid(0)
    for directory in directories:
        _make(directory, user)
    _drop_bounding_set()
    if not name:
        _drop_capabilities(capabilities | _join(group))
        return "no user of its own: runs as root, though without capabilities, set isolation.user"
    os.initgroups(name, user.pw_gid)
    _join(group)
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    _drop_capabilities()
    for directory in directories:
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            reason = f"{directory} can't be used by {name}: `chown -R {name} {directory}`, and allow it to enter the directories above"
            raise IsolationError(key="isolation.user", reason=reason)
    if not os.access(os.__file__, os.R_OK):  # a Python below /root: later imports would fail
        return f"own user ({name}), who can't read {Path(os.__file__).parent}: use a Python that all users can read"
    return f"own user ({name})"


def _find(name: str) -> pwd.struct_passwd:
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise IsolationError(key="isolation.user", reason=f"there is no user {name!r}") from None
    if user.pw_uid == 0:
        raise IsolationError(key="isolation.user", reason=f"{name!r} is root")
    return user


def _join(group: str) -> int:
    """Join a group; if that is not allowed, return the capability that is needed to give it the socket, as bits."""
    try:
        if group:
            os.setgroups(sorted({*os.getgroups(), grp.getgrnam(group).gr_gid}))
    except KeyError:
        return 0  # `socket_file` refuses a group that does not exist
    except PermissionError:
        return 1 << _CAP_CHOWN
    return 0


def _make(directory: Path, user: pwd.struct_passwd) -> None:
    """Make missing directories for the user. Existing ones keep their owner: other users may have put files there."""
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        for each in reversed(missing):
            try:
                each.mkdir(mode=0o700)
            except FileExistsError:  # the server, started at the same time, was first
                continue
            descriptor = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            os.fchown(descriptor, user.pw_uid, user.pw_gid)
            os.close(descriptor)
    except OSError as error:
        raise IsolationError(key="isolation.user", reason=f"{directory} can't be made: {error.strerror}") from None


def _is_capable(number: int) -> bool:
    status = Path("/proc/self/status").read_text(encoding="utf8")
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> number & 1)


def _drop_bounding_set() -> None:
    """Drop the capabilities of later child processes; the kernel returns EINVAL after the last one that it knows."""
    number = 0
    while _LIBC.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1


def _drop_capabilities(kept: int = 0) -> None:
    """Drop effective, permitted, inheritable and ambient capabilities except these bits; this is always allowed."""
    _LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _LIBC.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0))
