"""A computation on the device that can be compiled in one thread and run in another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int

Result = TypeVar("Result")
SHORTEST = 16  # tokens, of a padded text


@dataclass(frozen=True)
class Computation(Generic[Result]):
    """`program(*arguments)`, on the host, of which `finish` makes the result; calling it runs it.

    A server compiles it first, beside the thread that owns the device: a compiler that takes seconds then holds up
    nobody.
    """

    program: Any  # of `jax.jit`
    arguments: tuple[Any, ...]
    finish: Callable[[Any], Result]

    def compile(self) -> None:
        """Compiles the program for arguments of these shapes; JAX keeps it for the call."""
        self.program.lower(*self.arguments).compile()

    def __call__(self) -> Result:
        return self.finish(self.program(*self.arguments))


def padded(tokens: list[int]) -> Int[np.ndarray, " P"]:
    """Tokens followed by zeros, up to a power of two, so that a handful of programs serves texts of every length.

    Attention is causal: what follows a token changes nothing.
    """
    length = max(SHORTEST, 1 << (len(tokens) - 1).bit_length())
    return np.pad(np.asarray(tokens, np.int32), (0, length - len(tokens)))
