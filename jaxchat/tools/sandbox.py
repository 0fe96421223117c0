"""Gives up, for good, what a program that a model wrote does not need: files, network, processes, memory, time.

Each layer is taken where the machine has it, and none needs a privilege: limits of resources (POSIX), Landlock (Linux
5.13 and later) and seccomp (Linux, x86-64 and ARM64). They run in a new process, before it reads what it is to run.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Sequence

from jaxchat.tools import seccomp

MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
OPEN_FILES = 64

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on all machines
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3  # linux/landlock.h
# Rights of the file system by version of Landlock, of which each governs all up to its number.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_TCP = 0b11  # bind and connect, from version 4
_ABSTRACT_SOCKETS, _SIGNALS = 1 << 0, 1 << 1  # kept to this process and its children, from version 6
_SYSTEM_FILES = (
    "/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
    "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom",
)  # fmt: skip


def contain(cpu_seconds: int, packages: Sequence[str], *, may_kill: bool = False) -> None:
    """Contains this process as well as the machine allows; `tools.python.containment` tells how well that is.

    Args:
      cpu_seconds: of processor time, after which the process is ended.
      packages: folders of installed packages, which the process may read besides Python's own files.
      may_kill: it may signal other processes, as the checker does to end the program.
    """
    _limit(cpu_seconds)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _restrict_files(libc, [*python_files(), *packages, *_SYSTEM_FILES], may_kill=may_kill)
        seccomp.install(libc, may_kill=may_kill)


def die_with_parent(parent: int) -> None:
    """Ends this process when its parent, which has the id `parent`, ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def python_files() -> list[str]:
    """What Python reads to run: its executable, its standard library and the folders of its shared libraries."""
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.join(sys.base_prefix, "lib")]
    paths += os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [path for path in (*paths, os.path.realpath(sys.executable)) if path]


def _limit(cpu_seconds: int) -> None:
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,  # no further process or thread; a superuser is not held by it
    }
    for kind, value in limits.items():
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            pass  # macOS has no limit of the address space


def _restrict_files(libc: ctypes.CDLL, readable: Sequence[str], *, may_kill: bool) -> bool:
    """Leaves reading of `readable` and of what lies in them; False if there is no Landlock. See landlock(7)."""
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = [(1 << _FILE_RIGHTS.get(version, 16)) - 1]
    handled += [_TCP] if version >= 4 else []
    handled += [_ABSTRACT_SOCKETS | (0 if may_kill else _SIGNALS)] if version >= 6 else []
    attributes = struct.pack(f"={len(handled)}Q", *handled)
    rules = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return False
    for path in readable:
        try:
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        libc.syscall(_LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights, file), 0)
        os.close(file)
    done = libc.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return done
