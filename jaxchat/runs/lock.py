"""One training at a time in a run directory.

The lock is the kernel's (`flock` on RUN/.lock), so that it ends with its process, however that ends. It holds between
the processes of one machine, and between machines where the file system passes locks on, as NFS does. Cloud storage has
no locks: there two starts in one run directory are not noticed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from jaxchat.errors import UserError, check
from jaxchat.runs.files import LOCK, parse_json
from jaxchat.storage import is_remote, reason

try:
    import fcntl
except ImportError:  # Windows, outside WSL
    fcntl = None


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of a run directory, which is created if it does not exist.

    The directory may be renamed while it is held: the lock goes with it.

    Raises:
      UserError: another process holds it; the message says which. The directory cannot be created, or written to.
    """
    if is_remote(directory) or fcntl is None:
        yield
        return
    path = Path(directory) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, in the way of the run's lock; move it aside, and try again") from None
    except OSError as error:
        what = "written to" if path.parent.is_dir() else "created"
        raise UserError(f"{directory} cannot be {what} ({reason(error)}); choose another --run-dir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{directory} is in use by {_holder(file.read())}; wait for it or stop it, or choose another --run-dir"
            ) from None
        except OSError as error:  # a file system without locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        # Between opening the file and locking it, another start may have renamed the directory.
        moved = not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()))
        check(not moved, f"{directory} was renamed by another start with --fresh; try again")
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}).encode())
        file.flush()
        yield


def _holder(data: bytes) -> str:
    try:
        holder = parse_json(data)
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']} since {since}"
    except (ValueError, TypeError, KeyError, OverflowError):
        return "another process"
