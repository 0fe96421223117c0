"""Whether a checkpoint's files are as they were written: `manifest.json` lists the size and CRC-32 of each."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath

from jaxchat.devices.processes import exchange
from jaxchat.runs.files import Damaged, Object, read_json
from jaxchat.storage import readable

MANIFEST = "manifest.json"
COMPLETE = "commit_success.txt"  # written last where a folder cannot be renamed
CHUNK = 1 << 22


def write_manifest(folder: epath.Path, items: tuple[str, ...]) -> None:
    """Writes the manifest of a step's folder, for the files in these subfolders."""
    paths = [path for item in items for path in _files(folder / item)]
    with ThreadPoolExecutor(4) as pool:
        sums = pool.map(_size_and_crc, paths)
    files = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, sums, strict=True)}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n")


def find_damage(folder: epath.Path, items: tuple[str, ...]) -> str | None:
    """What is wrong with the files in these subfolders of a step's folder; None if they match the manifest.

    All processes must call it together: each verifies a share of the files, and all return the same.
    """
    return next(filter(None, exchange(_find_own_damage(folder, items) or "")), None)


def _find_own_damage(folder: epath.Path, items: tuple[str, ...]) -> str | None:
    """What is wrong with this process's share of the files."""
    try:
        manifest = read_json(folder / MANIFEST, Object(others=[int]), "")
    except Damaged:
        return f"{MANIFEST} is unreadable"
    if manifest is None:
        return f"{MANIFEST} is missing"
    listed = {name: tuple(entry) for name, entry in manifest.items() if name.split("/")[0] in items}
    with readable(folder):
        files = [path for item in items if (folder / item).exists() for path in _files(folder / item)]
    names = {path.relative_to(folder).as_posix() for path in files if path.name != COMPLETE}
    if unlisted := sorted(names - listed.keys()):
        return f"{MANIFEST} does not list {unlisted[0]}"
    names = list(listed)[jax.process_index() :: jax.process_count()]
    with readable(folder):
        missing = next((name for name in names if not (folder / name).is_file()), None)
        if missing is not None:
            return f"{missing} is missing"
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda name: tuple(_size_and_crc(folder / name)), names))
    changed = next((name for name, entry in zip(names, found, strict=True) if entry != listed[name]), None)
    return None if changed is None else f"{changed} is not what was written"


def _files(folder: epath.Path) -> list[epath.Path]:
    found = []
    for path in sorted(folder.iterdir()):
        found.extend(_files(path) if path.is_dir() else [path])
    return found


def _size_and_crc(path: epath.Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
