"""Files of `torch.save`, read without PyTorch and without running what they contain.

Such a file is a zip archive: `NAME/data.pkl`, a pickle in which each tensor is a view of a storage, and
`NAME/data/KEY`, the numbers of each storage, which are not compressed.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxchat.errors import UserError, check
from jaxchat.export.pickles import Made, Name, Persistent, read_pickle
from jaxchat.storage import first_line

_TENSOR, _PARAMETER, _DICT = (
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
)
_DTYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.DoubleStorage": np.dtype(np.float64),
    **{f"torch.{name}Storage": None for name in ("Byte", "Char", "Short", "Int", "Long", "Bool")},
}
_ALLOWED = {_TENSOR, _PARAMETER, _DICT, *_DTYPES}
_MOST = 1 << 48  # numbers in a storage
POINTER = b"version https://git-lfs"
_REMEDY = "get the whole file again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: a view of the storage `entry`. Offset and strides are counted in numbers, not bytes."""

    entry: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """The floating-point tensors of a dictionary of tensors, such as a `state_dict`, by name.

    Raises:
      UserError: the file is missing, damaged, of another form, or names anything but tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            self.tensors = self._read()
        except zipfile.BadZipFile:
            raise UserError(f"{path} {_what_else(path)}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); correct that, and try again") from None
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise UserError(
                f"{path} holds no weights that jaxchat reads: {error}; give a state_dict as torch.save writes it"
            ) from None

    def _read(self) -> dict[str, StoredTensor]:
        index = [name for name in self._archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(index) != 1:
            raise ValueError("its archive has no data.pkl")
        self._root = index[0].removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in self._archive.namelist() and self._bytes(order) != b"little":
            raise ValueError("its numbers have their most significant byte first")
        found = _items(read_pickle(self._bytes(index[0]), _ALLOWED))
        return {name: self._tensor(name, value) for name, value in found.items()}

    def _bytes(self, entry: str) -> bytes:
        if self._archive.getinfo(entry).compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its entry {entry} is compressed")
        return self._archive.read(entry)

    def _tensor(self, name: str, value: Any) -> StoredTensor:
        if not isinstance(name, str):
            raise ValueError("its weights have no names")
        if isinstance(value, Made) and value.name == _PARAMETER and value.args:
            value = value.args[0]
        if not (isinstance(value, Made) and value.name == _TENSOR):
            raise ValueError(f"{name} is not a tensor")
        match value.args:
            case (Persistent(("storage", Name(kind), str(key), _, int(count))), int(offset), shape, strides, *_):
                pass
            case _:
                raise ValueError(f"{name} is a tensor of an unknown form")
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise ValueError(f"{name} has whole numbers ({kind}), not the weights of a model")
        entry, whole = f"{self._root}data/{key}", (*shape, *strides, offset, count)
        if not (len(shape) == len(strides) and all(isinstance(n, int) and 0 <= n < _MOST for n in whole)):
            raise ValueError(f"{name} is a tensor of an unknown form")
        try:
            info = self._archive.getinfo(entry)
        except KeyError:
            raise ValueError(f"the numbers of {name} are missing") from None
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if info.file_size != count * dtype.itemsize or (math.prod(shape) and last >= count):
            raise ValueError(f"the numbers of {name} are not all there")
        return StoredTensor(entry, dtype, offset, tuple(shape), tuple(strides))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, in its own dtype.

        Raises:
          UserError: its numbers are damaged.
        """
        tensor = self.tensors[name]
        try:
            data = self._bytes(tensor.entry)
        # What zipfile raises for a damaged header, such as one that says the entry is encrypted.
        except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
            raise UserError(f"{self.path} is damaged at {name} ({first_line(error)}); {_REMEDY}") from None
        numbers = np.frombuffer(data, tensor.dtype)[tensor.offset :]
        strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)


def _items(value: Any) -> Mapping[Any, Any]:
    """The items of a dictionary, of Python's own kind or an ordered one."""
    if isinstance(value, Made) and value.name == _DICT:
        return value.items
    if not isinstance(value, dict):
        raise ValueError("it holds no dictionary of tensors")
    return value


def _what_else(path: Path) -> str:
    """What a file that is no zip archive is instead, and the remedy."""
    with path.open("rb") as file:
        head = file.read(len(POINTER))
    if head == POINTER:
        return "is only a pointer to the weights, as git leaves without git-lfs; get the file itself: git lfs pull"
    check(bool(head), f"{path} is empty; {_REMEDY}")
    if head[:1] == b"\x80":
        return "is of the form that PyTorch wrote before version 1.6; load it and save it again with torch.save"
    return f"is damaged or was not written by torch.save; {_REMEDY}"
