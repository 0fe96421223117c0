"""Whether a folder that a command is to write to can be one, found out before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

from jaxchat.errors import UserError, check
from jaxchat.storage import is_remote


def check_place(directory: str, option: str) -> None:
    """Checks that `directory`, the value of `option`, is a folder that can be written, or can be created.

    Raises:
      UserError: it is a file or inside one, cannot be written, or is a folder for other things.
    """
    if is_remote(directory):
        return
    choose = f"choose another {option}"
    try:
        path = Path(directory).absolute()
        there = next(place for place in (path, *path.parents) if os.path.lexists(place))
        check(there.exists(), f"{there} is a link to what does not exist; {choose}")
        what = f"{there} is a file" if there == path else f"{directory} is inside {there}, which is a file"
        check(there.is_dir(), f"{what}; {choose}")
        whose = _others().get(str(path.resolve()))
        check(whose is None, f"{directory} is {whose}; give {option} a folder of its own, such as runs/mine")
        check(os.access(there, os.W_OK | os.X_OK), f"{there} cannot be written; {choose}")
    except OSError as error:
        raise UserError(f"{directory} cannot be created ({error.strerror}); {choose}") from None


def _others() -> dict[str, str]:
    """Folders that are for other things than one run."""
    return {
        os.path.realpath(os.path.expanduser("~")): "the home folder",
        str(Path(__file__).resolve().parents[2]): "the checkout",
        os.path.realpath(os.sep): "the root folder",
    }
