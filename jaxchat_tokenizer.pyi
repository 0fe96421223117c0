"""Type stubs of the Rust extension module for byte-pair encoding (rust_tokenizer/)."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

DEFAULT_PATTERN: str

class TokenizerError(ValueError): ...

class Encoder:
    def __new__(
        cls,
        tokens: Sequence[bytes],
        special: Sequence[str],
        pattern: str,
        merges: Sequence[tuple[int, int]] | None = None,
        whole_pieces: bool = True,
        keep_gaps: bool = False,
    ) -> Encoder: ...
    def encode(
        self, texts: Sequence[str], prepend: int | None = None, append: int | None = None, threads: int | None = None
    ) -> list[list[int]]: ...
    def encode_to_numpy(
        self, texts: Sequence[str], prepend: int | None = None, threads: int | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]: ...
    def decode(self, ids: Sequence[int] | NDArray[np.uint32] | NDArray[np.int64]) -> bytes: ...
    def decode_text(
        self, ids: Sequence[int] | NDArray[np.uint32] | NDArray[np.int64], threads: int | None = None
    ) -> str: ...
    def decode_batch(
        self,
        ids: Sequence[int] | NDArray[np.uint32] | NDArray[np.int64],
        offsets: Sequence[int] | NDArray[np.int64],
        threads: int | None = None,
    ) -> list[str]: ...

def train(
    texts: Iterable[str],
    size: int,
    pattern: str,
    longest: int | None = None,
    threads: int | None = None,
    progress: Callable[[str, int], object] | None = None,
) -> list[bytes]: ...
def train_arrow(
    batches: Iterable[tuple[str, NDArray[np.int64], NDArray[np.uint8]]],
    size: int,
    pattern: str,
    max_chars: int | None = None,
    longest: int | None = None,
    threads: int | None = None,
    progress: Callable[[str, int], object] | None = None,
) -> tuple[list[bytes], int]: ...
