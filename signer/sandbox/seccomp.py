"""System calls that the signer does not need, refused by a seccomp filter. For `signer.sandbox.isolation`.

All other calls are allowed: the calls of Python, LevelDB and a token's library differ between versions, and a signer
that stops after an update of libc is worse than one that still may read the clock. The refused calls are those that an
attacker with code in the signer would need: to get out (sockets, programs), into other processes, into the kernel, and
around this filter.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

try:
    # Imported here, not where it is used: as another user, Python may not be able to read its modules.
    import pyseccomp
except (ImportError, RuntimeError, OSError) as error:  # libseccomp is missing, and the signer must start anyway
    pyseccomp = None
    _MISSING = str(error)

_CLONE_THREAD = 0x00010000  # linux/sched.h
_PROT_WRITE, _PROT_EXEC = 2, 4  # asm-generic/mman-common.h
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # asm-generic/ioctls.h
_32_BITS = 0xFFFFFFFF
_UNKNOWN = -1  # seccomp.h: __NR_SCMP_ERROR

REFUSED = (
    # programs: the signer starts none, see also `clone` below
    "execve", "execveat", "fork", "vfork",
    # other processes of the same user
    "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease", "kcmp",
    "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "get_robust_list",
    "migrate_pages", "move_pages", "mbind", "set_mempolicy", "set_mempolicy_home_node", "ioprio_set", "setpriority",
    "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler",
    # devices and other special files
    "mknod", "mknodat", "vhangup",
    # another user: user and rights never change from here on
    "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setfsuid", "setfsgid", "setgroups", "capset",
    # around this filter: io_uring opens sockets and files without a system call for it
    "io_uring_setup", "io_uring_enter", "io_uring_register", "io_setup", "io_submit", "io_getevents", "io_pgetevents",
    "io_cancel", "io_destroy",
    # another view of the machine
    "unshare", "setns", "chroot", "pivot_root", "mount", "umount2", "open_tree", "move_mount", "fsopen", "fsconfig",
    "fsmount", "fspick", "mount_setattr", "name_to_handle_at", "open_by_handle_at", "personality",
    # the kernel, and the entry points of its known bugs
    "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "bpf", "perf_event_open",
    "userfaultfd", "iopl", "ioperm", "modify_ldt", "vm86", "vm86old", "uselib", "lookup_dcookie", "nfsservctl",
    "fanotify_init", "fanotify_mark", "add_key", "request_key", "keyctl",
    # the machine
    "reboot", "swapon", "swapoff", "syslog", "acct", "quotactl", "quotactl_fd", "sethostname", "setdomainname",
    "settimeofday", "stime", "clock_settime", "clock_settime64", "clock_adjtime", "clock_adjtime64", "adjtimex",
)  # fmt: skip
"""Refused with EPERM for any arguments. Names that a machine does not have are skipped."""


REFUSED_WITHOUT_TOKEN = (
    # memory and queues that other processes can share; files without a path, which could hide or run code
    "shmget", "shmat", "shmctl", "shmdt", "semget", "semop", "semtimedop", "semctl", "msgget", "msgsnd", "msgrcv",
    "msgctl", "mq_open", "mq_unlink", "mq_timedsend", "mq_timedreceive", "mq_notify", "mq_getsetattr",
    "memfd_create", "memfd_secret",
)  # fmt: skip
"""Also refused without a token's library: some libraries use these calls to talk to their driver."""


class FilterError(Exception):
    """The filter could not be loaded; the text has the reason."""


def refuse_system_calls(*, sockets: bool) -> None:
    """Load the filter for all threads, current and later; it can't be removed.

    Args:
        sockets: allow sockets of other families than AF_UNIX.

    Raises:
        FilterError: the library is missing, or the kernel refuses the filter.
    """
    if pyseccomp is None:
        msg = f"libseccomp.so.2 is missing ({_MISSING})"
        raise FilterError(msg)
    try:
        _rules(sockets=sockets).load()
    except OSError as error:
        msg = f"the kernel refuses the filter ({error.strerror})"
        raise FilterError(msg) from None


def _rules(*, sockets: bool) -> Any:
    argument, refusal = pyseccomp.Arg, pyseccomp.ERRNO(errno.EPERM)
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.CTL_TSYNC, 1)
    # System calls of the machine's other ABIs (i386, x32) would bypass the rules below.
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for name in (*REFUSED, *(() if sockets else REFUSED_WITHOUT_TOKEN)):
        if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) != _UNKNOWN:
            rules.add_rule(refusal, name)
    # Refuse new processes; threads are needed.
    rules.add_rule(refusal, "clone", argument(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
    # Its flags are in memory, which no filter can read. ENOSYS: libc then uses clone instead.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    if not sockets:
        # Code comes from mapped files, never from written memory.
        writable = argument(2, pyseccomp.MASKED_EQ, _PROT_WRITE | _PROT_EXEC, _PROT_WRITE | _PROT_EXEC)
        rules.add_rule(refusal, "mmap", writable)
        for name in ("mprotect", "pkey_mprotect"):
            rules.add_rule(refusal, name, argument(2, pyseccomp.MASKED_EQ, _PROT_EXEC, _PROT_EXEC))
    for request in (_TIOCSTI, _TIOCLINUX):  # they type into the operator's terminal
        rules.add_rule(refusal, "ioctl", argument(1, pyseccomp.MASKED_EQ, _32_BITS, request))
    if not sockets:
        for name in ("socket", "socketpair"):
            rules.add_rule(refusal, name, argument(0, pyseccomp.NE, int(socket.AF_UNIX)))
    return rules
