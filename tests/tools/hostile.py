"""Programs that try to leave their process, shared by the tests of all ways to run a program."""

import os
from pathlib import Path

import pytest

from jaxchat.tools import seccomp
from jaxchat.tools.python import possible

CONTAINED = seccomp.supported() and not possible()
needs_containment = pytest.mark.skipif(not CONTAINED, reason="this machine cannot contain programs")


def working_folder(process):
    """The working folder of a process, given by its folder in /proc; empty if it has none."""
    try:
        return os.readlink(process / "cwd")
    except OSError:
        return ""


def assert_nothing_stays(folder):
    """No file and no process of a program is left of those that ran in `folder`."""
    assert not list(folder.glob("jaxchat-*"))
    assert not [where for where in map(working_folder, Path("/proc").glob("[0-9]*")) if str(folder) in where]


def filled(program):
    """The program with this process, the user's home folder and a file of a package in it."""
    for name, value in {"process": os.getpid(), "home": str(Path.home()), "package": pytest.__file__}.items():
        program = program.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
    compile(program, "program.py", "exec")
    return program


# Each would run to its end if it did what it should not.
ESCAPES = {
    "user's file": "open('/etc/passwd').read()",
    "home": "import os\nos.listdir({home!r})",
    "root": "import os\nos.listdir('/')",
    "environment of the evaluator": "open('/proc/{process}/environ').read()",
    "its own environment": "import os\nassert os.environ['JAXCHAT_SECRET']",
    "memory of the evaluator": "open('/proc/{process}/mem', 'rb')",
    "jaxchat's own files": "import jaxchat.config",
    "file": "open('a', 'w')",
    "file, appended": "open('a', 'a')",
    "huge file": "with open('a', 'wb') as file:\n    while True: file.write(bytes(1 << 20))",
    "file elsewhere": "open('/dev/shm/jaxchat-mark', 'w')",
    "file by the system call": "import os\nos.open('a', os.O_CREAT | os.O_RDONLY)",
    "emptying a file": "import os\nos.open({package!r}, os.O_RDONLY | os.O_TRUNC)",
    "folder": "import os\nos.mkdir('d')",
    "nested folders": "import os\nfor i in range(1500):\n    os.mkdir('d'); os.chdir('d')",
    "link": "import os\nos.symlink('/', 'a')",
    "link out of its folder": "import os\nos.symlink('/etc/passwd', 'a')\nopen('a').read()",
    "hard link": "import os\nos.link({package!r}, 'a')",
    "file by a link of the kernel": "open('/proc/self/root/etc/passwd').read()",
    "pipe with a name": "import os\nos.mkfifo('a')",
    "renaming": "import os\nos.rename('../{folder}', '../jaxchat-b')",
    "removing": "import os\nos.rmdir(os.getcwd())",
    "permissions": "import os\nos.chmod('.', 0)",
    "times": "import os\nos.utime('.', (0, 0))",
    "file in memory": "import os\nos.memfd_create('a')",
    "shared memory": "from multiprocessing.shared_memory import SharedMemory\nSharedMemory('jaxchat', True, 99)",
    "socket": "import socket\nsocket.socket()",
    "TCP connection": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "TCP server": "import socket\nsocket.create_server(('127.0.0.1', 0))",
    "UDP datagram": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'a', ('127.0.0.1', 53))"
    ),
    "names of the network": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "abstract socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0jaxchat')",
    "socket of this machine": "import socket\nsocket.socket(socket.AF_UNIX)",
    "socket of the kernel": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "pair of sockets that reach others": "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "pair of sockets of another kind": "import socket\nsocket.socketpair(socket.AF_INET)",
    "connecting one of a pair": "import socket\nsocket.socketpair()[0].connect('/dev/log')",
    "sending by one of a pair": "import socket\nsocket.socketpair()[0].sendto(b'a', '/dev/log')",
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120)) >= 0",
    "fork": "import os\nif os.fork() == 0:\n    os._exit(0)",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "daemon": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        while True: open('a', 'w')\n    os._exit(0)"
    ),
    "child": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True)",
    "child in a session of its own": (
        "import subprocess, sys\nsubprocess.Popen([sys.executable], start_new_session=True)"
    ),
    "other program": "import os\nos.execv('/bin/true', ['true'])",
    "session": "import os\nos.setsid()",
    "thread": "import threading\nthreading.Thread(target=int).start()",
    "namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mounting": "import ctypes\nassert ctypes.CDLL(None).mount(b'a', b'.', b'tmpfs', 0, 0) == 0",
    "ptrace": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "signal to the evaluator": "import os\nos.kill({process}, 0)",
    "signal to the checker": "import os\nos.kill(os.getppid(), 0)",
    "signal to all": "import os\nos.kill(-1, 0)",
    "ending the evaluator": "import os\nos.kill({process}, 15)",
    "ending its parent": "import os\nos.kill(os.getppid(), 9)",
    "signal to its group": "import os\nos.killpg(0, 0)",
    "signal by a file": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], 8, {process})",
    "limits of the evaluator": "import resource\nresource.prlimit({process}, resource.RLIMIT_CPU, (1, 1))",
    "its own limits, lowered": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    "its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
    "priorities": "import os\nos.setpriority(os.PRIO_PROCESS, {process}, 19)",
    "processors of the evaluator": "import os\nos.sched_setaffinity({process}, [0])",
    "owner": "import os\nos.setuid(65534)",
    "memory": "x = bytearray(2 << 30)",
    "many open files": "import os\nx = [os.pipe() for _ in range(64)]",
    "input": "input()",
}  # fmt: skip
