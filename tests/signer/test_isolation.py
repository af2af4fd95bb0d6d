"""The kernel's protections of the signer, observed from outside or tried from inside, in separate processes."""

from __future__ import annotations

import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyseccomp
import pytest

from signer.sandbox.seccomp import REFUSED, REFUSED_WITHOUT_TOKEN
from tests.signer.isolated import AS_NOBODY, NOBODY, Isolated

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")

STARTED_BY = pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])


@pytest.fixture
def public_tmp() -> Iterator[Path]:
    """A directory of root's that other users can enter, like /var/lib."""
    with_parents = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    with_parents.chmod(0o755)
    yield with_parents
    subprocess.run(["rm", "-rf", with_parents], check=True)


# --- applied protections ----------------------------------------------------------------------------------------------


@needs_root
def test_root_gets_everything_but_a_user() -> None:
    """Started as root without a user to switch to, all other protections apply, and the text says that it stays root."""
    with Isolated({}) as child:
        assert child.said == [
            "private files",
            "core files off",
            "memory locked",
            "no user of its own: runs as root, though without capabilities, set isolation.user",
            "not dumpable",
            "privileges locked",
            "seccomp",
            "network out of reach (namespace, seccomp)",
        ]


@needs_root
def test_other_users_get_what_needs_no_rights() -> None:
    """Started as another user, all protections apply that need no rights, such as the filter."""
    with Isolated({}, nobody=True) as child:
        assert [text for text in child.said if "memory" not in text] == [
            "private files",
            "core files off",
            f"own user (uid {NOBODY})",
            "not dumpable",
            "privileges locked",
            "seccomp",
            "network out of reach (seccomp)",
        ]
        assert set(child.status()["CapEff"] + child.status()["CapPrm"] + child.status()["CapInh"]) == {"0"}


@needs_root
@STARTED_BY
def test_the_kernel_says_the_same(nobody: bool) -> None:
    """/proc shows the filter, the lock of privileges, and a core limit of zero, soft and hard."""
    with Isolated({}, nobody=nobody) as child:
        status = child.status()
        limits = Path(f"/proc/{child.pid}/limits").read_text().splitlines()

    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    assert next(line.split()[4:6] for line in limits if line.startswith("Max core file size")) == ["0", "0"]


# --- network --------------------------------------------------------------------------------------------------------


@needs_root
def test_network_of_root_is_an_empty_namespace() -> None:
    """The only interface is a loopback of this namespace, which is down; a Unix socket is still reached by path."""
    with Isolated({}) as child:
        assert Path(f"/proc/{child.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
        devices = Path(f"/proc/{child.pid}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in devices] == ["lo"]
        assert Path(f"/proc/{child.pid}/net/route").read_text().splitlines()[1:] == []


@needs_root
@STARTED_BY
def test_unix_sockets_work(nobody: bool, public_tmp: Path) -> None:
    """A Unix socket outside is reached by path from inside, and one inside from outside."""
    outside, inside = public_tmp / "outside", public_tmp / "inside"
    public_tmp.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as listener, Isolated({}, nobody=nobody) as child:
        listener.bind(str(outside))
        outside.chmod(0o666)
        listener.listen()
        child.ask("globals().update(a=socket.socket(socket.AF_UNIX), b=socket.socket(socket.AF_UNIX))")
        assert child.ask(f"a.connect({str(outside)!r})") is None
        assert child.ask(f"b.bind({str(inside)!r}) or b.listen()") is None
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(inside))


FAMILIES = ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG"]


@needs_root
@STARTED_BY
def test_other_sockets_are_refused(nobody: bool) -> None:
    """No socket of any family but AF_UNIX can be made, with any high half of the number, in any thread."""
    with Isolated({}, nobody=nobody) as child:
        for family in FAMILIES:
            assert child.ask(f"socket.socket(socket.{family}, socket.SOCK_DGRAM)") == "EPERM"
        child.ask("globals().update(number=ctypes.c_ulong((1 << 32) + 2))")
        assert child.ask("[libc.socket(number, 1, 0), errno.errorcode[ctypes.get_errno()]]") == [-1, "EPERM"]
        child.ask("globals().update(result=[])")
        child.ask(
            "[t := threading.Thread(target=lambda: result.append(libc.socket(2, 1, 0))), t.start(), t.join()][1:]"
        )
        assert child.ask("result") == [-1]
        assert child.ask("[each.family for each in socket.socketpair()]") == [1, 1]


@needs_root
def test_a_token_keeps_its_network() -> None:
    """A token's library may open sockets; the text says so, and the rest of the filter applies."""
    with Isolated({}, token=True) as child:
        assert child.said[-2:] == ["seccomp", "no network isolation: the token's library may need it"]
        assert Path(f"/proc/{child.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink()
        assert child.ask("socket.socket(socket.AF_INET).family") == 2
        assert child.ask("os.fork()") == "EPERM"
    with Isolated({"require": ["network"]}, token=True) as child:
        assert child.said == [
            "isolation.require",
            "'network' is not available: no network isolation: the token's library may need it",
        ]


# --- system calls ---------------------------------------------------------------------------------------------------


@needs_root
@STARTED_BY
def test_no_program_and_no_process_is_started(nobody: bool) -> None:
    """Neither fork nor exec works, nor both in one call; threads do."""
    with Isolated({}, nobody=nobody) as child:
        assert child.ask("os.fork()") == "EPERM"
        assert child.ask("os.execv('/bin/true', ['true'])") == "EPERM"
        assert child.ask("os.posix_spawn('/bin/true', ['true'], {})") == "EPERM"
        assert child.ask("os.system('true')") != 0
        assert child.ask("[t := threading.Thread(target=int), t.start(), t.join(), t.is_alive()][3]") is False


def called_by_number(name: str) -> str:
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    return f"[libc.syscall({number}, 0, 0, 0, 0, 0, 0), errno.errorcode.get(ctypes.get_errno())]"


CALLABLE = [
    name
    for name in (*REFUSED, *REFUSED_WITHOUT_TOKEN)
    if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) >= 0 and name not in ("fork", "vfork")
]


@needs_root
def test_every_system_call_of_the_list_is_refused() -> None:
    """Each call of the list fails with EPERM even for root; without the filter none fails so."""
    with Isolated({}) as child:
        answers = {name: child.ask(called_by_number(name)) for name in CALLABLE}
        assert child.ask("[libc.ioctl(0, ctypes.c_ulong(0x5412 + (1 << 32)), 0), ctypes.get_errno()]") == [-1, 1]
        assert child.ask("[libc.syscall(435, 0, 0), errno.errorcode[ctypes.get_errno()]]") == [-1, "ENOSYS"]
    with Isolated(None) as plain:
        harmless = ("ptrace", "keyctl", "io_uring_setup", "mount", "execve", "bpf", "unshare", "kcmp")
        unfiltered = [plain.ask(called_by_number(name)) for name in harmless]

    assert [name for name, answer in answers.items() if answer != [-1, "EPERM"]] == []
    assert {"execve", "ptrace", "io_uring_setup", "bpf", "keyctl", "userfaultfd"} <= set(CALLABLE)
    assert [-1, "EPERM"] not in unfiltered


@needs_root
def test_fault_80_what_the_unit_refuses_the_filter_refuses() -> None:
    """Special files, signals by descriptor, files without a path, other users, and code in written memory."""
    with Isolated({}) as child:
        assert child.ask("os.mknod('/dev/shm/paychan-test', 0o600 | 0o020000, 0x103)") == "EPERM"
        assert child.ask("os.mkfifo('/dev/shm/paychan-test')") == "EPERM"
        assert child.ask("os.memfd_create('x')") == "EPERM"
        assert child.ask("os.pidfd_open(os.getpid())") == "EPERM"
        assert child.ask("os.setresuid(0, 0, 0)") == "EPERM"
        assert child.ask("os.setgroups([0])") == "EPERM"
        assert child.ask("__import__('mmap').mmap(-1, 4096, prot=7)") == "EPERM"
        assert child.ask("__import__('mmap').mmap(-1, 4096, prot=3).close()") is None
        assert child.ask(MADE_EXECUTABLE) == -1
        assert {"mknod", "mknodat", "memfd_create", "pidfd_open", "pidfd_send_signal", "io_setup"} <= set(CALLABLE)


MADE_EXECUTABLE = (
    "[m := __import__('mmap').mmap(-1, 4096), a := ctypes.addressof(ctypes.c_char.from_buffer(m)), "
    "libc.mprotect(ctypes.c_void_p(a), ctypes.c_size_t(4096), 5)][2]"
)


# --- memory ---------------------------------------------------------------------------------------------------------

SPY = f"""
import ctypes, os, sys
pid, libc = int(sys.argv[1]), ctypes.CDLL(None, use_errno=True)
{AS_NOBODY}
try:
    open("/proc/%d/mem" % pid, "rb").close()
    print("mem", end=" ")
except PermissionError:
    pass
if libc.ptrace(16, pid, None, None) == 0:  # PTRACE_ATTACH
    os.waitpid(pid, 0)
    print("ptrace", end=" ")
try:
    os.listdir("/proc/%d/fd" % pid)
    print("fd", end=" ")
except PermissionError:
    pass
"""


def seen_by_a_spy(pid: int) -> str:
    """Objects of a process that another process of user nobody can open."""
    return subprocess.check_output([sys.executable, "-c", SPY, str(pid)], text=True, timeout=30)


@needs_root
@pytest.mark.parametrize(
    ("settings", "nobody"), [({}, True), ({"user": "nobody"}, False)], ids=["started-as-nobody", "became-nobody"]
)
def test_memory_is_closed_to_the_same_user(settings: dict[str, str], nobody: bool) -> None:
    """Only without isolation can a process of the same user open the memory, attach a debugger or list files."""
    with Isolated(settings, nobody=nobody) as child, Isolated(None, nobody=True) as plain:
        assert seen_by_a_spy(child.pid) == ""
        assert child.ask("1 + 1") == 2
        assert seen_by_a_spy(plain.pid).split() == ["mem", "ptrace", "fd"]


UNLIMITED = "h = resource.getrlimit(resource.RLIMIT_CORE)[1]; resource.setrlimit(resource.RLIMIT_CORE, (h, h))"


def crash(child: Isolated) -> int:
    """Wait status of a child after SIGSEGV."""
    os.kill(child.pid, signal.SIGSEGV)
    status = os.waitpid(child.pid, 0)[1]
    child.process.returncode = -signal.SIGSEGV
    assert os.WTERMSIG(status) == signal.SIGSEGV
    return status


def test_a_crash_leaves_no_core(tmp_path: Path) -> None:
    """After SIGSEGV there is no core file, and the kernel reports none; without isolation there is one."""
    with Isolated({}, before=UNLIMITED, cwd=tmp_path) as child:
        status = crash(child)
    left = list(tmp_path.iterdir())
    with Isolated(None, before=UNLIMITED, cwd=tmp_path) as plain:
        plain_status = crash(plain)

    assert not os.WCOREDUMP(status)
    assert left == []
    if resource.getrlimit(resource.RLIMIT_CORE)[1] and Path("/proc/sys/kernel/core_pattern").read_text()[0] != "|":
        assert os.WCOREDUMP(plain_status)


def test_files_are_private(tmp_path: Path) -> None:
    """A file that is made without a mode can be used by its owner only."""
    file = tmp_path / "file"
    with Isolated({}, before="os.umask(0)") as child:
        assert child.ask(f"open({str(file)!r}, 'w').close()") is None

    assert stat.S_IMODE(file.stat().st_mode) == 0o600


GROW = (
    "[len(bytearray(1 << 28)), [t.start() or t.join() for t in [threading.Thread(target=int) for _ in range(64)]]][0]"
)


@needs_root
def test_locked_memory_can_still_grow() -> None:
    """The kernel counts the memory as locked; much more memory and many threads can still be allocated."""
    with Isolated({}) as child:
        before = int(child.status()["VmLck"].split()[0])
        assert child.has("memory locked")
        assert before > 1000
        assert child.ask(GROW) == 1 << 28
        child.ask("globals().update(kept=bytearray(1 << 24))")
        assert int(child.status()["VmLck"].split()[0]) >= before + (1 << 14)


@needs_root
def test_memory_under_a_limit_is_not_locked() -> None:
    """If the limit is too small, the text says so with the remedy, and no later allocation fails because of it."""
    limit = "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))"
    with Isolated({}, before=limit, nobody=True) as child:
        assert child.has("no memory lock: limit is 64 KiB, set LimitMEMLOCK=infinity")
        assert child.ask(GROW) == 1 << 28
    with Isolated({"require": ["memory"]}, before=limit, nobody=True) as child:
        assert child.said[0] == "isolation.require"
        assert "set LimitMEMLOCK=infinity" in child.said[1]


@needs_root
def test_a_user_whose_limit_can_be_raised_has_locked_memory() -> None:
    """After a change of user, memory is locked if the limit could be raised before; the kernel agrees with the text."""
    with Isolated({"user": "nobody"}) as child:
        assert child.has("memory locked") == (int(child.status()["VmLck"].split()[0]) > 0)
        assert child.ask(GROW) == 1 << 28


# --- user -----------------------------------------------------------------------------------------------------------


@needs_root
def test_root_becomes_the_user(public_tmp: Path) -> None:
    """All ids, groups and capabilities are the user's, without a way back, and missing directories belong to the user."""
    state, link = public_tmp / "paychan" / "live", public_tmp / "run"
    with Isolated({"user": "nobody"}, directories=(state, link)) as child:
        status = child.status()
        assert any(text.startswith("own user (nobody)") for text in child.said)
        assert child.ask("os.setuid(0)") == "EPERM"
        assert child.ask("os.setgroups([0])") == "EPERM"
        assert child.ask(f"open({str(state / 'file')!r}, 'w').close()") is None

    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(NOBODY)}
    assert set(status["Groups"].split()) <= {str(NOBODY)}
    capabilities = [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
    assert set("".join(capabilities)) == {"0"}
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    for made in (state, state.parent, link):
        assert (made.stat().st_uid, stat.S_IMODE(made.stat().st_mode)) == (NOBODY, 0o700)


@needs_root
def test_directories_of_others_are_left_alone(public_tmp: Path) -> None:
    """A directory that the user can't write ends the start with the setting and the remedy; its owner stays."""
    state = public_tmp / "state"
    state.mkdir(mode=0o755)
    with Isolated({"user": "nobody"}, directories=(state,)) as child:
        key, reason = child.said

    assert key == "isolation.user"
    assert f"{state} can't be used by nobody: `chown -R nobody {state}`" in reason
    assert state.stat().st_uid == 0


@needs_root
@pytest.mark.parametrize(
    ("user", "reason"), [("no-such-user", "there is no user 'no-such-user'"), ("root", "'root' is root")]
)
def test_users_that_are_refused(user: str, reason: str) -> None:
    """A user that does not exist, and root, are refused with the setting's name."""
    with Isolated({"user": user}) as child:
        assert child.said == ["isolation.user", reason]


@needs_root
def test_only_root_changes_the_user() -> None:
    """Another user can't switch to the configured one; the text says so."""
    with Isolated({"user": "daemon"}, nobody=True) as child:
        assert child.has(f"no change of user: started as uid {NOBODY}")
    with Isolated({"user": "nobody"}, nobody=True) as child:
        assert child.has(f"own user (uid {NOBODY})")


def capabilities(child: Isolated) -> set[str]:
    status = child.status()
    return {status[name].lstrip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}


@needs_root
def test_fault_80_root_without_a_user_has_no_capabilities(public_tmp: Path) -> None:
    """Root stays root, for its files, without other rights of root; the socket can still be given to a group."""
    theirs = public_tmp / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, NOBODY, NOBODY)
    for group in ("", "daemon"):
        with Isolated({}, directories=(public_tmp / "state",), group=group) as child:
            # CAP_IPC_LOCK alone where the limit of locked memory can't be raised
            assert capabilities(child) <= {"", "4000"}
            assert child.ask(f"open({str(public_tmp / 'state' / 'socket')!r}, 'w').close()") is None
            assert child.ask(f"os.listdir({str(theirs)!r})") == "EACCES"
            assert child.ask(f"os.chown({str(public_tmp / 'state')!r}, 1, 1)") == "EPERM"
            given = child.ask(f"os.chown({str(public_tmp / 'state' / 'socket')!r}, -1, grp.getgrnam('daemon').gr_gid)")
            assert given == (None if group else "EPERM")


@needs_root
def test_fault_80_only_locked_memory_under_a_limit_needs_a_capability() -> None:
    """If the limit can't be raised, root locks memory by a capability, keeps only that one, and can still allocate."""
    limit = (
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536)); "
        "ctypes.CDLL(None).prctl(24, 24, 0, 0, 0); "  # without CAP_SYS_RESOURCE
        "ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), "
        "(ctypes.c_uint32 * 6)(0xfeffffff, 0xfeffffff, 0, 0x1ff, 0x1ff, 0))"
    )
    with Isolated({}, before=limit) as child:
        if not child.has("memory locked"):
            pytest.skip("capabilities can't be dropped here")
        assert int(child.status()["CapEff"], 16) in (0, 1 << 14)
        assert child.ask(GROW) == 1 << 28


# --- missing protections ----------------------------------------------------------------------------------------------

WITHOUT_LIBRARY = "sys.modules['pyseccomp'] = None"


@needs_root
def test_without_the_library_there_is_no_filter() -> None:
    """Without libseccomp, the text says so and the namespace remains; if the filter is required, the start fails."""
    with Isolated({}, before=WITHOUT_LIBRARY) as child:
        assert child.said[-2].startswith("no seccomp: libseccomp.so.2 is missing")
        assert child.said[-1] == "network out of reach (namespace)"
        assert child.status()["Seccomp"] == "0"
    with Isolated({"require": ["seccomp"]}, before=WITHOUT_LIBRARY) as child:
        assert child.said[0] == "isolation.require"
        assert child.said[1].startswith("'seccomp' is not available: no seccomp: libseccomp.so.2 is missing")


@needs_root
def test_without_library_and_rights_the_network_stays() -> None:
    """Without filter and namespace, the text says so; if the network protection is required, the start fails."""
    with Isolated({}, before=WITHOUT_LIBRARY, nobody=True) as child:
        assert child.said[-1] == "no network isolation: neither namespace nor seccomp"
    with Isolated({"require": ["network"]}, before=WITHOUT_LIBRARY, nobody=True) as child:
        assert child.said[0] == "isolation.require"


@needs_root
def test_all_available_protections_can_be_required() -> None:
    """With every protection required and available, it starts."""
    with Isolated({"require": ["seccomp", "network", "memory", "dumpable"]}) as child:
        assert child.said[0] == "private files"


def test_isolation_comes_before_threads() -> None:
    """A thread that already runs would not be protected, so `isolate` raises an error."""
    before = "t = threading.Thread(target=threading.Event().wait, daemon=True); t.start()"
    with pytest.raises(AssertionError, match="ended with status 1"):
        Isolated({}, before=before)
