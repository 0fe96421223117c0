"""The model and the mesh of devices that it is split over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jaxchat.config.ranges import Range, Section

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
class ModelConfig(Section):
    """The GPT; its depth sets all other sizes."""

    section = "model"

    depth: Annotated[int, Range(at_least=1, at_most=256)] = 12
    """Number of layers. The width is 64 times as much, in heads of at most 128."""
    sequence_len: Annotated[int, Range(at_least=2, at_most=1 << 20)] = 2048
    """Context: tokens of a training row, and the most that the model can read and write in a conversation."""
    window_pattern: str = "L"
    """How far back each layer sees: S a quarter of the context, L all of it. The letters repeat over the layers, as in
    SSSL; the last layer always sees all of it."""
    num_kv_heads: Annotated[int | None, Range(at_least=1)] = None
    """Heads of keys and values, a divisor of the number of query heads. None: as many as query heads."""
    rope_base: Annotated[float, Range(at_least=1)] = 10_000.0
    """Base of the rotary position embeddings' wavelengths."""
    logit_cap: Annotated[float, Range(at_least=0.01)] = 15.0
    """Bound c of the logits, which become c * tanh(logits / c)."""
    attention_scale: Annotated[float, Range(above=0, at_most=100)] = 1.0
    """Factor of attention's scores beside 1 / sqrt(head size)."""
    residual_scales: bool = False
    """Before each block, the residual stream times a learned scale plus the embedded input times another."""
    value_embeddings: bool = False
    """Every other layer, the last one included, adds an embedding of the token to its values, by learned gates."""
    smear: bool = False
    """Each embedded token takes in some of the one before it in its document, by a learned gate."""
    bigrams: bool = False
    """To each embedded token is added a learned row for it and the token before it, found by a hash of both."""
    backout: bool = False
    """The last norm's input is less a learned part of the residual stream in the middle of the blocks."""
    embedding_std: Annotated[float, Range(above=0, at_most=100)] = 1.0
    """Standard deviation of the embedding's initial values."""
    up_factor: Annotated[float, Range(above=0, at_most=100)] = 1.0
    """Factor of the initial values of each MLP's first matrix."""
    head_std: Annotated[float, Range(at_least=0, at_most=100)] = 0.0
    """Standard deviation of the head's initial values."""

    def __post_init__(self):
        super().__post_init__()
        self.check(
            _depth_fits(self.depth),
            f"depth is {self.depth}; it gives a width of {self.width}, which {self.num_heads} heads cannot share in "
            f"equal and even sizes; nearest depths that work: {_nearest_depths(self.depth)}",
        )
        if self.num_heads % self.kv_heads:
            self.refuse("num_kv_heads", f"a divisor of the {self.num_heads} heads of depth {self.depth}")
        pattern = self.window_pattern
        if not pattern or not set(pattern) <= set("SLsl"):
            self.refuse(
                "window_pattern",
                "one letter per layer, S for a quarter of the context and L for all of it, repeated over the layers: "
                "such as SSSL",
            )
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

    @property
    def value_layers(self) -> tuple[int, ...]:
        """The layers with value embeddings: every other one, the last included."""
        return tuple(range((self.depth - 1) % 2, self.depth, 2)) if self.value_embeddings else ()


@dataclass(frozen=True)
class MeshConfig(Section):
    """Devices of each kind of parallelism; their product is the number of devices."""

    section = "mesh"

    data: Annotated[int, Range(at_least=-1)] = -1
    """Data parallelism: devices with whole copies of the model. -1: all devices that the others leave."""
    fsdp: Annotated[int, Range(at_least=1)] = 1
    """Fully sharded data parallelism: devices among which parameters and optimizer state are split."""
    tensor: Annotated[int, Range(at_least=1)] = 1
    """Tensor parallelism: devices among which each layer's heads and MLP are split."""

    def __post_init__(self):
        super().__post_init__()
        if self.data == 0:
            self.refuse("data", "at least 1, or -1 for all devices that the other axes leave")
