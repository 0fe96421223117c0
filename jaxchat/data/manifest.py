"""The manifest of a data folder: which files were downloaded, from where, and what their bytes are.

`manifest.json` lies beside `pretrain/`, `chat/` and `eval/`. It also pins the validation shard, so that no number of
further shards ever turns it into training data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from jaxchat.errors import UserError, check
from jaxchat.storage import AnyPath

FILE_NAME = "manifest.json"
VERSION = 1
_HASHED_AT_ONCE = 1 << 20
_HASHING_THREADS = 4  # hashing lets other threads run


@dataclass(frozen=True)
class Source:
    """Where a data set of the folder is from. `revision` is a commit, or the checksum of an archive; `validation` is
    the file that is never trained on."""

    source: str
    revision: str
    validation: str | None = None


@dataclass(frozen=True)
class Record:
    """A file as it was written: its data set, its size in bytes, its checksum, and the files it was made of."""

    dataset: str
    size: int
    sha256: str
    made_of: tuple[str, ...]


@dataclass
class Manifest:
    """What a data folder has; the keys of `files` are paths inside it, with slashes."""

    folder: AnyPath
    datasets: dict[str, Source] = field(default_factory=dict)
    files: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: AnyPath) -> Manifest:
        """The folder's manifest, an empty one if it has none.

        Raises:
          UserError: it is damaged, or of a later version.
        """
        path = folder / FILE_NAME
        try:
            data = json.loads(path.read_bytes())
            version = data["version"]
            check(version == VERSION, f"{path} is of version {version}; use the version of jaxchat that wrote it")
            datasets = {name: Source(**source) for name, source in data["datasets"].items()}
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
        """Replaces the file as a whole."""
        data = {
            "version": VERSION,
            "datasets": {name: dataclasses.asdict(source) for name, source in sorted(self.datasets.items())},
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
        """Whether a recorded file is there with its size; its bytes are not read."""
        try:
            return name in self.files and (self.folder / name).stat().st_size == self.files[name].size
        except OSError:
            return False

    def damage(self, names: list[str]) -> dict[str, str]:
        """What is wrong with recorded files, by name, after reading all their bytes; those in order are left out."""
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            found = zip(names, pool.map(self._damage, names), strict=True)
            return {name: wrong for name, wrong in found if wrong}

    def _damage(self, name: str) -> str | None:
        record, path = self.files[name], self.folder / name
        try:
            if (size := path.stat().st_size) != record.size:
                return f"has {size:,} bytes, not {record.size:,}"
            return None if file_sha256(path) == record.sha256 else "has other bytes than were downloaded"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"


def pinned_shard(text_folder: AnyPath) -> AnyPath | None:
    """The validation shard that a manifest pins for the text in a folder; None where none does.

    The folder is a data folder, or its `pretrain/`.

    Raises:
      UserError: a damaged manifest.
    """
    pinned = (m.folder / source.validation for m in _manifests(text_folder) for source in m.datasets.values()
              if source.validation is not None)  # fmt: skip
    return next((path for path in pinned if path.parent == text_folder), None)


def recorded_shards(text_folder: AnyPath) -> list[AnyPath]:
    """The files of text that a manifest says are in a folder, which is as for `pinned_shard`."""
    paths = (m.folder / name for m in _manifests(text_folder) for name, record in m.files.items()
             if m.datasets[record.dataset].validation is not None)  # fmt: skip
    return [path for path in paths if path.parent == text_folder]


def _manifests(text_folder: AnyPath) -> list[Manifest]:
    folders = (text_folder, text_folder.parent) if text_folder.name == "pretrain" else (text_folder,)
    return [Manifest.read(folder) for folder in folders]


def file_sha256(path: Path) -> str:
    return _hash_file(path, hashlib.sha256())


def git_sha1(path: Path) -> str:
    """The id that git gives to the bytes of a file: SHA-1 over `blob SIZE\\0` and the bytes."""
    start = f"blob {path.stat().st_size}\0".encode()
    return _hash_file(path, hashlib.sha1(start, usedforsecurity=False))


def _hash_file(path: Path, digest) -> str:
    with path.open("rb") as file:
        while piece := file.read(_HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()
