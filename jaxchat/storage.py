"""Paths on this machine, or in the storage of a cloud: gs://, s3://, az://, hf://."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath

from jaxchat.errors import UserError, check, closest

AnyPath = Path | epath.Path
# The fsspec protocol that epath takes for a scheme, and the package that has it.
_SCHEMES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs"), "az": ("az", "adlfs"), "hf": ("hf", "huggingface_hub")}
_FOR_RUNS = ("gs", "s3")  # what TensorStore, which writes the arrays of checkpoints, knows
# What the libraries of a storage raise beside the system's errors.
_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "google.auth.exceptions": ("GoogleAuthError",),
    "google.api_core.exceptions": ("GoogleAPIError",),
    "gcsfs.retry": ("HttpError",),
    "aiohttp": ("ClientError",),
}
# A listing that is remembered does not show what other processes, or TensorStore, have written since.
for _scheme in _FOR_RUNS:
    fsspec.config.conf.setdefault(_SCHEMES[_scheme][0], {}).setdefault("use_listings_cache", False)


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def to_path(path: str | os.PathLike) -> AnyPath:
    """The path, of `pathlib` if it is on this machine, else of `etils.epath`, whose methods have the same names.

    Raises:
      UserError: a scheme that is not known, or whose package is not installed.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return Path(text)
    scheme = text.partition("://")[0]
    known = ", ".join(f"{name}://" for name in _SCHEMES)
    check(scheme in _SCHEMES, f"{text}: no such storage{closest(scheme, _SCHEMES)} There are: {known}")
    protocol, package = _SCHEMES[scheme]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        raise UserError(f"{text} needs {package}, which is not installed; pip install {package}") from None
    return epath.Path(text)


def to_run_directory(path: str | os.PathLike) -> epath.Path:
    """The path of a run, on this machine or in storage that checkpoints can be written to.

    Raises:
      UserError: other storage, a bucket that does not exist, or as `to_path` and `is_folder`.
    """
    if not is_remote(path):
        return epath.Path(path)
    scheme, _, name = os.fspath(path).partition("://")
    runs = " and ".join(f"{name}://" for name in _FOR_RUNS)
    check(scheme in _FOR_RUNS, f"{path}: runs live on this machine, or in {runs}; choose such a --run-dir")
    found = to_path(path)
    bucket = f"{scheme}://{name.partition('/')[0]}"
    check(bucket != f"{scheme}://", f"{path} names no bucket; write {scheme}://BUCKET/RUN")
    check(is_folder(epath.Path(bucket)), f"there is no bucket {bucket}; create it, or correct the name")
    return found


def storage_errors() -> tuple[type[Exception], ...]:
    """What reading and writing may raise where the storage, not the program, is at fault."""
    loaded = [(sys.modules[module], names) for module, names in _ERRORS.items() if module in sys.modules]
    return OSError, *(getattr(module, name) for module, names in loaded for name in names)


def of_the_cloud(error: BaseException) -> bool:
    """Whether a storage is at fault: an error of its library, or one of the system's that such a library has raised."""
    if not isinstance(error, storage_errors()):
        return False
    kinds = tuple(kind for kind in storage_errors() if kind is not OSError)
    modules = ("s3fs", "gcsfs", "adlfs", "fsspec.asyn")
    return isinstance(error, kinds) or any(
        frame.f_globals.get("__name__", "").startswith(modules) for frame, _ in traceback.walk_tb(error.__traceback__)
    )


@contextlib.contextmanager
def readable(path: AnyPath) -> Iterator[None]:
    """Errors of storage, which may pass, are no damage, but a line for the user."""
    # TensorStore raises ValueError, whatever has gone wrong in a storage.
    errors = (*storage_errors(), ValueError) if is_remote(path) else storage_errors()
    try:
        yield
    except FileNotFoundError:
        raise
    except errors as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); put that right, and try again") from error


def reason(error: Exception) -> str:
    """What went wrong, in the system's words where they are among those of the libraries."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r"No space left on device|Read-only file system|Permission denied|File too large", str(error))
    return found[0] if found else str(error).partition("\n")[0]


def is_folder(path: AnyPath) -> bool:
    """Whether there is a folder.

    Raises:
      UserError: the storage does not answer, or not to this user.
    """
    if not is_remote(path):
        return path.is_dir()
    files, name = fsspec.core.url_to_fs(os.fspath(path))
    try:
        # Not `isdir`, for which a storage that refuses to answer has no folder.
        if "/" in name.strip("/"):
            return files.info(name)["type"] == "directory"
        files.ls(name)  # a bucket, which may be empty
        return True
    except FileNotFoundError:
        return False
    except Exception as error:  # each storage has errors of its own
        problem = first_line(error)
        raise UserError(f"{path} cannot be reached ({problem}); check the name and your credentials") from None


def append_bytes(path: AnyPath, data: bytes) -> None:
    """Appends to a file, which is made if it is not there; in storage it is read and written as a whole."""
    if not is_remote(path):
        with path.open("ab") as file:
            file.write(data)
        return
    # Not by a file object: where writing fails, its end would try again, and complain on stderr.
    files, name = fsspec.core.url_to_fs(os.fspath(path))
    files.pipe_file(name, (files.cat_file(name) if files.exists(name) else b"") + data)


def first_line(error: Exception) -> str:
    """Of its message; the name of its type if it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def size_of(path: AnyPath) -> int:
    """Bytes of a file."""
    return path.stat().st_size if isinstance(path, Path) else path.stat().length
