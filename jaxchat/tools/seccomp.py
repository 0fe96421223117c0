"""A seccomp filter: the system calls that a program needs to compute and to read files, and no others.

Linux, x86-64 and ARM64. No privilege is needed, only `PR_SET_NO_NEW_PRIVS`. No call that is let through starts a
process or a thread, opens a socket to anything outside, signals a process or changes a file. One that is not listed
fails with ENOSYS, so that the C library falls back to an older one where it can. See seccomp(2); linux/filter.h has the
instructions.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

# Numbers of the calls on x86-64 and on ARM64, from asm/unistd_64.h and asm-generic/unistd.h; None: there is none.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233),
    # open files and pipes
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62), "fadvise64": (221, 223), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "select": (23, None),
    "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    # what there is in the file system
    "fstat": (5, 80), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "statfs": (137, 43), "fstatfs": (138, 44),
    # time, chance, and the process itself
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "setitimer": (38, 103),
    "getitimer": (36, 102), "alarm": (37, None), "getrandom": (318, 278), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156), "uname": (63, 160),
    "sysinfo": (99, 179), "getrusage": (98, 165), "getrlimit": (97, 163), "getcpu": (309, 168),
    "sched_getaffinity": (204, 123), "sched_yield": (24, 124), "futex": (202, 98), "set_robust_list": (273, 99),
    "rseq": (334, 293), "membarrier": (324, 283), "umask": (95, 166), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "wait4": (61, 260), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
# The checker ends the program; a program has no call that signals another process.
_KILL = {"kill": (62, 129)}
# Calls that are allowed by their arguments: words of 32 bits, two an argument, and the values that each may have.
_BY_VALUE: dict[str, tuple[tuple[int, int], dict[int, tuple[int, ...]]]] = {
    "fcntl": ((72, 25), {2: (0, 1, 2, 3, 4, 1030)}),  # duplicating, and reading and setting flags; not the owner
    "ioctl": ((16, 29), {2: (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)}),  # whether it is a terminal, flags
    "prlimit64": ((302, 261), {0: (0,), 4: (0,), 5: (0,)}),  # reading its own limits; a superuser could raise them
    # Two streams of AF_UNIX that are connected to each other, and can be to nothing else: asyncio's. Used as pipes.
    "socketpair": ((53, 199), {0: (1,), 2: (0x1, 0x801, 0x80001, 0x80801)}),
}
_OPEN = (("open", (2, None), 1), ("openat", (257, 56), 2))  # the index of the flags
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # linux/audit.h

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; arguments have 8 bytes
_ALLOW, _FAIL, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


def supported() -> bool:
    """Whether this machine has a filter of its own here."""
    return sys.platform == "linux" and sys.byteorder == "little" and os.uname().machine in _ARCHITECTURES


def build_filter(machine: str, *, may_kill: bool = False) -> bytes:
    """The filter's instructions, 8 bytes each, for `machine`, x86_64 or aarch64."""
    which, architecture = _ARCHITECTURES[machine]
    write = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, alike on both
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL_PROCESS)]
    code.append((_LOAD, 0, 0, _NUMBER))
    for numbers in (_CALLS | (_KILL if may_kill else {})).values():
        if (number := numbers[which]) is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for numbers, words in _BY_VALUE.values():
        body = []
        for word, values in words.items():
            body.append((_LOAD, 0, 0, _FIRST_ARGUMENT + 4 * word))
            body += [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
            body.append((_RETURN, 0, 0, _FAIL | errno.EPERM))
        body.append((_RETURN, 0, 0, _ALLOW))
        code += [(_EQUAL, 0, len(body), numbers[which]), *body]
    for _, numbers, argument in _OPEN:
        if (number := numbers[which]) is not None:
            body = [
                (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * argument),
                (_ANY_BIT, 0, 1, write),
                (_RETURN, 0, 0, _FAIL | errno.EACCES),
                (_RETURN, 0, 0, _ALLOW),
            ]
            code += [(_EQUAL, 0, len(body), number), *body]
    code.append((_RETURN, 0, 0, _FAIL | errno.ENOSYS))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(libc: ctypes.CDLL, *, may_kill: bool = False) -> bool:
    """Filters the calls of this process from now on, for good; False if the machine does not let it."""
    if not supported():
        return False
    code = ctypes.create_string_buffer(build_filter(os.uname().machine, may_kill=may_kill))
    program = _Program((len(code) - 1) // 8, ctypes.addressof(code))
    return libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) == 0
