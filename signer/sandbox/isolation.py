"""What keeps the keys in this process, should somebody run code as the same user or even inside: the kernel's protections.

`signer.service` calls `isolate` once, before any key is read and any thread is started; `signer.token.process` does the same
where a token's library runs. Each protection is had where the kernel and the rights we were started with allow it; what could be
had is returned as text, for the log and `paychan-signer status`.

The order is forced: what needs root comes before the user is changed, and what forbids system calls comes after all that use
them. There is no network namespace for other users than root: it would need a user namespace, in which the kernel tells uid
65534 for every peer (SO_PEERCRED), so that the list of users could not be kept. The seccomp filter refuses them sockets.
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
    """A protection that was asked for can't be had: which setting asks for it, and what to do."""

    def __init__(self, *, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


def keep_private() -> None:
    """Keep files and memory from others, as every command does that may see a secret."""
    os.umask(0o077)
    _no_core_files()
    _not_dumpable()


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it ends. After any change of user, which undoes it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def isolate(
    settings: Isolation, *, token: bool = False, directories: Sequence[Path] = (), group: str = ""
) -> tuple[str, ...]:
    """Apply every protection that can be had, for the rest of the process's life.

    Args:
        settings: whose user we become, and what we must not start without.
        token: this process runs a token's library, which may need a network; it stays.
        directories: where we have to write as `settings.user`; missing ones are made for that user.
        group: that the socket is given to; where we are root, we become a member, which is all that giving needs.

    Returns:
        One text per protection. Those begun with "no " could not be had, and say why.

    Raises:
        IsolationError: a required protection can't be had, or the user can't be used.
        RuntimeError: threads run already; most of this would not hold for them.
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
            raise IsolationError(key="isolation.require", reason=f"{name!r} can't be had: {texts[name]}")
    return tuple(texts.values())


def _missing(text: str) -> bool:
    return text.startswith("no ")


def _error() -> str:
    return os.strerror(ctypes.get_errno())


# --- memory ---------------------------------------------------------------------------------------------------------


def _no_core_files() -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # lowering is everybody's right
    return "core files off"


def _not_dumpable() -> str:
    """Keep memory out of core dumps sent to a program, and out of reach of a debugger of the same user.

    After the change of user, which the kernel answers with a value of its own (fs.suid_dumpable).
    """
    if _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        return f"no protection from debuggers: {_error()}"
    return "not dumpable"


def _lock_memory(*, stays_root: bool) -> tuple[str, int]:
    """Keep memory out of swap; say which capabilities that needs from now on, as bits.

    Only without a limit: the kernel counts addresses, not pages in use, so that under a limit the stack of one thread more, or
    what the allocator reserves for it, could fail at any later time. MCL_ONFAULT: what is never used takes no memory.
    """
    needed = 0
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):  # ValueError is Python's word for EPERM here
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        if not (stays_root and _is_capable(_CAP_IPC_LOCK)):
            return f"no memory lock: limit is {limit // 1024} KiB, set LimitMEMLOCK=infinity", 0
        needed = 1 << _CAP_IPC_LOCK  # else the limit would hold for what is allocated later
    if _LIBC.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        return f"no memory lock: {_error()}", 0
    return "memory locked", needed


# --- network and system calls -------------------------------------------------------------------------------------------


def _leave_network() -> bool:
    """Go where there is no network. Unix sockets are found by path as before."""
    return bool(_LIBC.unshare(_CLONE_NEWNET) == 0)


def _network(*, token: bool, emptied: bool, filtered: bool) -> str:
    ways = ["namespace"] * (emptied or _only_loopback()) + ["seccomp"] * (filtered and not token)
    if ways:
        return f"network out of reach ({', '.join(ways)})"
    return "no network isolation: " + ("the token's library may need it" if token else "neither namespace nor seccomp")


def _only_loopback() -> bool:
    """Tell whether whoever started us has given us an empty network (systemd's PrivateNetwork)."""
    try:
        lines = Path("/proc/self/net/dev").read_text(encoding="utf8").splitlines()[2:]
    except OSError:
        return False
    return [line.split(":")[0].strip() for line in lines] == ["lo"]


def _no_new_privileges() -> str:
    """No program that we might be brought to start has more rights than we, setuid or not."""
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
    """Become a user without any capability. Without a name, or not root, the user stays, with no more than these."""
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
            reason = f"{directory} can't be used by {name}: `chown -R {name} {directory}`, and let it pass those above"
            raise IsolationError(key="isolation.user", reason=reason)
    if not os.access(os.__file__, os.R_OK):  # a Python below /root: what it imports from now on it does not find
        return f"own user ({name}), who can't read {Path(os.__file__).parent}: use a Python that all can read"
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
    """Become a member of a group; where that is not allowed, return the capability that giving it the socket needs, as bits."""
    try:
        if group:
            os.setgroups(sorted({*os.getgroups(), grp.getgrnam(group).gr_gid}))
    except KeyError:
        return 0  # `socketfile` refuses a group that does not exist
    except PermissionError:
        return 1 << _CAP_CHOWN
    return 0


def _make(directory: Path, user: pwd.struct_passwd) -> None:
    """Make what is missing of a path for the user. What is there keeps its owner: others may have put something in it."""
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
    """Take the capabilities from whatever would be started; the kernel says EINVAL after the last one it knows."""
    number = 0
    while _LIBC.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1


def _drop_capabilities(kept: int = 0) -> None:
    """Give up effective, permitted, inheritable and ambient capabilities, but for these bits. Less is never refused."""
    _LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _LIBC.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0))
