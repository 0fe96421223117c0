"""The model and the mesh of devices that it is split over."""

from __future__ import annotations

from dataclasses import dataclass

from jaxchat.config.ranges import check_each
from jaxchat.errors import check

WIDTH_PER_LAYER = 64
LARGEST_HEAD = 128


def model_width(depth: int) -> int:
    """The width of the residual stream of a model with `depth` layers."""
    return WIDTH_PER_LAYER * depth


def head_count(depth: int) -> int:
    """The number of query heads of a model with `depth` layers: as few as make none larger than `LARGEST_HEAD`."""
    return -(-model_width(depth) // LARGEST_HEAD)


def _depth_fits(depth: int) -> bool:
    """Whether heads are of equal and even size, as rotary embeddings need."""
    return model_width(depth) % (2 * head_count(depth)) == 0


def _nearest_depths(depth: int) -> str:
    below = next((d for d in range(depth - 1, 0, -1) if _depth_fits(d)), None)
    above = next(d for d in range(depth + 1, depth + 200) if _depth_fits(d))
    return " and ".join(str(d) for d in (below, above) if d)


@dataclass(frozen=True)
class ModelConfig:
    """The GPT; its depth sets all other sizes."""

    depth: int = 12
    """Number of layers. The width is 64 times as much, in heads of at most 128."""
    sequence_len: int = 2048
    """Context: tokens of a training row, and the most that the model can read and write in a conversation."""
    window_pattern: str = "L"
    """How far back each layer sees: S a quarter of the context, L all of it. The letters repeat over the layers, as in
    SSSL; the last layer always sees all of it."""
    num_kv_heads: int | None = None
    """Heads of keys and values, a divisor of the number of query heads. None: as many as query heads."""
    rope_base: float = 10_000.0
    """Base of the rotary position embeddings' wavelengths."""
    logit_cap: float = 15.0
    """Bound c of the logits, which become c * tanh(logits / c)."""

    def __post_init__(self):
        check(self.depth >= 1, f"model.depth is {self.depth}; it must be at least 1")
        check(self.sequence_len >= 2, f"model.sequence-len is {self.sequence_len}; it must be at least 2")
        check(
            _depth_fits(self.depth),
            f"model.depth {self.depth} gives a width of {self.width}, which {self.num_heads} heads cannot share in "
            f"equal and even sizes; nearest depths that work: {_nearest_depths(self.depth)}",
        )
        kv = self.kv_heads
        check(
            kv >= 1 and self.num_heads % kv == 0,
            f"model.num-kv-heads is {kv}; it must divide the {self.num_heads} heads of depth {self.depth}",
        )
        check(
            bool(self.window_pattern) and set(self.window_pattern) <= set("SLsl"),
            f"model.window-pattern is {self.window_pattern!r}; write one letter per layer, S for a quarter of the "
            "context and L for all of it, repeated over the layers: such as SSSL",
        )
        check_each(self, "model.", lambda value: value > 0, "above 0", "rope_base", "logit_cap")
        object.__setattr__(self, "window_pattern", self.window_pattern.upper())  # one model, one spelling

    @property
    def width(self) -> int:
        return model_width(self.depth)

    @property
    def num_heads(self) -> int:
        return head_count(self.depth)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer, the number of tokens before itself that a token sees; None for all of them."""
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.depth - 1)] + ["L"]
        return tuple(self.sequence_len // 4 if letter == "S" else None for letter in letters)


@dataclass(frozen=True)
class MeshConfig:
    """Devices of each kind of parallelism; their product is the number of devices."""

    data: int = -1
    """Data parallelism: devices with whole copies of the model. -1: all devices that the others leave."""
    fsdp: int = 1
    """Fully sharded data parallelism: devices among which parameters and optimizer state are split."""
    tensor: int = 1
    """Tensor parallelism: devices among which each layer's heads and MLP are split."""

    def __post_init__(self):
        check(self.fsdp >= 1 and self.tensor >= 1, "mesh.fsdp and mesh.tensor must be at least 1")
        check(self.data == -1 or self.data >= 1, "mesh.data must be at least 1, or -1 for all devices left")
