"""Paths on this machine, or in the storage of a cloud: gs://, s3://, az://, hf://."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
from etils import epath

from jaxchat.config import UserError, check, closest

AnyPath = Path | epath.Path
# The fsspec protocol that epath takes for a scheme, and the package that has it.
_SCHEMES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs"), "az": ("az", "adlfs"), "hf": ("hf", "huggingface_hub")}


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


def is_folder(path: AnyPath) -> bool:
    """Whether there is a folder.

    Raises:
      UserError: the storage does not answer, or not to this user.
    """
    if isinstance(path, Path):
        return path.is_dir()
    try:
        return path.is_dir()
    except Exception as error:  # each storage has errors of its own
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be reached ({problem}); check the name and your credentials") from None


def size_of(path: AnyPath) -> int:
    """Bytes of a file."""
    return path.stat().st_size if isinstance(path, Path) else path.stat().length
