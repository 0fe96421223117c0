"""The manifest of a data folder: which files were downloaded, where from, and their checksums.

`manifest.json` is next to `pretrain/`, `chat/` and `eval/`. It also pins the validation shard, so that downloading more
shards never turns it into training data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from jaxchat.errors import UserError, check
from jaxchat.storage import AnyPath, size_of

FILE_NAME = "manifest.json"
VERSION = 1
_READ_BYTES = 1 << 20
_HASHING_THREADS = 4  # hashing releases the interpreter lock


@dataclass(frozen=True)
class Origin:
    """Where a data set of the folder comes from.

    Attributes:
      source: the hub's path or an address.
      revision: a commit, or the checksum of an archive.
      validation: the file that is never trained on, for pretraining text.
    """

    source: str
    revision: str
    validation: str | None = None


@dataclass(frozen=True)
class Record:
    """A file as it was written: its data set, size in bytes and checksum, and the downloaded files it was made from."""

    dataset: str
    size: int
    sha256: str
    made_of: tuple[str, ...]


@dataclass
class Manifest:
    """The data sets and files of a data folder; the keys of `files` are paths inside it, with slashes."""

    folder: AnyPath
    datasets: dict[str, Origin] = field(default_factory=dict)
    files: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: AnyPath) -> Manifest:
        """Reads the folder's manifest; an empty one if it has none.

        Raises:
          UserError: it is damaged, or from a later version.
        """
        path = folder / FILE_NAME
        try:
            data = json.loads(path.read_bytes())
            version = data["version"]
            check(
                version == VERSION,
                f"{path} has version {version}; use the version of jaxchat that wrote it",
            )
            datasets = {name: Origin(**origin) for name, origin in data["datasets"].items()}
            files = {name: Record(**record | {"made_of": tuple(record["made_of"])})
                     for name, record in data["files"].items()}  # fmt: skip
        except FileNotFoundError:
            return cls(folder)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged ({problem}); restore it, or use another folder") from None
        return cls(folder, datasets, files)

    def write(self) -> None:
        """Writes `manifest.json`, replacing it in one step."""
        data = {
            "version": VERSION,
            "datasets": {name: dataclasses.asdict(origin) for name, origin in sorted(self.datasets.items())},
            "files": {name: dataclasses.asdict(record) for name, record in sorted(self.files.items())},
        }
        part = self.folder / f".{FILE_NAME}.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / FILE_NAME)

    def of(self, dataset: str) -> dict[str, Record]:
        """The files of one data set."""
        return {name: record for name, record in self.files.items() if record.dataset == dataset}

    def has(self, name: str) -> bool:
        """Whether a file is recorded and there with the recorded size; its bytes are not read."""
        try:
            return name in self.files and size_of(self.folder / name) == self.files[name].size
        except OSError:
            return False

    def damage(self, names: list[str]) -> dict[str, str]:
        """Reads all bytes of recorded files; returns what is wrong with the damaged ones, by name."""
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            found = zip(names, pool.map(self._damage, names), strict=True)
            return {name: wrong for name, wrong in found if wrong}

    def _damage(self, name: str) -> str | None:
        record, path = self.files[name], self.folder / name
        try:
            if (size := size_of(path)) != record.size:
                return f"has {size:,} bytes, not {record.size:,}"
            return None if file_sha256(path) == record.sha256 else "has different bytes from those that were downloaded"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"


def pinned_shard(text_folder: AnyPath) -> AnyPath | None:
    """The validation shard that a manifest pins for the text in a folder, or None.

    The folder is a data folder, or its `pretrain/`.

    Raises:
      UserError: the manifest is damaged.
    """
    pinned = (m.folder / origin.validation for m in _manifests(text_folder) for origin in m.datasets.values()
              if origin.validation is not None)  # fmt: skip
    return next((path for path in pinned if path.parent == text_folder), None)


def recorded_shards(text_folder: AnyPath) -> list[AnyPath]:
    """The files of text that a manifest lists for a folder, given as to `pinned_shard`."""
    paths = (m.folder / name for m in _manifests(text_folder) for name, record in m.files.items()
             if m.datasets[record.dataset].validation is not None)  # fmt: skip
    return [path for path in paths if path.parent == text_folder]


def _manifests(text_folder: AnyPath) -> list[Manifest]:
    folders = (text_folder, text_folder.parent) if text_folder.name == "pretrain" else (text_folder,)
    return [Manifest.read(folder) for folder in folders]


def file_sha256(path: AnyPath) -> str:
    return _hash_file(path, hashlib.sha256())


def git_sha1(path: AnyPath) -> str:
    """The id that git gives to the contents of a file: SHA-1 of `blob SIZE\\0` and the bytes."""
    start = f"blob {size_of(path)}\0".encode()
    return _hash_file(path, hashlib.sha1(start, usedforsecurity=False))


def _hash_file(path: AnyPath, digest) -> str:
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
