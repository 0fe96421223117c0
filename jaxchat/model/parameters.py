"""The table of parameters: what everything outside the modules has to know of each of them.

A new parameter is a line in its module and a line here. A parameter without a row, or with two, is an error as soon as
anything asks: none can be trained, split over devices or saved by accident.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, abstract_params

Group = Literal["matrix", "embedding", "head", "value_embedding", "gate", "residual_scale", "input_scale", "scalar"]


@dataclass(frozen=True)
class Parameter:
    """A row of the table.

    Attributes:
      path: keys from the root of the parameter tree; {i} is a block's number.
      group: the optimizer group. "matrix" is Muon's, and takes matrices only; the others are AdamW's, each with a
        learning rate of its own.
      spec: how the array is split over the mesh.
      export: the name of the weight in transformers' NanoChat, {i} as above; None where that has no such weight.
      counted: whether the parameter counts towards the training horizon (tokens a parameter).
    """

    path: str
    group: Group
    spec: P
    export: str | None
    counted: bool = True

    def match(self, path: str) -> re.Match[str] | None:
        """Matches the end of `path`: optimizer states hold trees like the parameters', whose paths end alike."""
        return re.search(f"(?:^|/){self.path.replace('{i}', r'(?P<i>[0-9]+)')}$", path)


# As in Megatron-LM (Shoeybi et al. 2019), a pair of matrices splits its inner dimension over `tensor`, which costs one
# reduction a pair. fsdp splits the dimension of the residual stream.
INTO, OUT_OF = P("fsdp", "tensor"), P("tensor", "fsdp")
TABLE = (
    Parameter("embed/embedding", "embedding", OUT_OF, "model.embed_tokens.weight"),
    Parameter("blocks/{i}/attn/q/kernel", "matrix", INTO, "model.layers.{i}.self_attn.q_proj.weight"),
    Parameter("blocks/{i}/attn/k/kernel", "matrix", INTO, "model.layers.{i}.self_attn.k_proj.weight"),
    Parameter("blocks/{i}/attn/v/kernel", "matrix", INTO, "model.layers.{i}.self_attn.v_proj.weight"),
    Parameter("blocks/{i}/attn/o/kernel", "matrix", OUT_OF, "model.layers.{i}.self_attn.o_proj.weight"),
    Parameter("blocks/{i}/mlp/up/kernel", "matrix", INTO, "model.layers.{i}.mlp.fc1.weight"),
    Parameter("blocks/{i}/mlp/down/kernel", "matrix", OUT_OF, "model.layers.{i}.mlp.fc2.weight"),
    Parameter("head/kernel", "head", INTO, "lm_head.weight"),
    # Values are split as the matrix v splits them; the tables' rows over fsdp.
    Parameter("value_embeddings/embedding", "value_embedding", P(None, "fsdp", "tensor"), None, counted=False),
    Parameter("value_embeddings/gate", "gate", P(), None, counted=False),
    Parameter("residual_scales/residual", "residual_scale", P(), None, counted=False),
    Parameter("residual_scales/input", "input_scale", P(), None, counted=False),
    Parameter("bigrams/embedding", "value_embedding", OUT_OF, None, counted=False),
    Parameter("smear/gate", "scalar", P(), None, counted=False),
    Parameter("smear/scale", "scalar", P(), None, counted=False),
    Parameter("backout/scale", "scalar", P(), None, counted=False),
)


def row_of(path: str) -> Parameter:
    """The row of the parameter at `path`, such as `blocks/0/attn/q/kernel`.

    Raises:
      LookupError: no row matches, or more than one.
    """
    rows = [row for row in TABLE if row.match(path)]
    if len(rows) != 1:
        raise LookupError(f"parameter {path} has {len(rows)} rows in jaxchat/model/parameters.py; it needs one")
    return rows[0]


def path_of(keys: tuple[Any, ...]) -> str:
    """A path of JAX's tree functions as text."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def export_name(path: str) -> str:
    """The name of the parameter at `path` in transformers' NanoChat."""
    row = row_of(path)
    found = row.match(path)
    assert found, "row_of gives a row that matches"
    if row.export is None:
        raise LookupError(f"transformers' NanoChat has no parameter like {path}")
    return row.export.format(**found.groupdict())


def groups_of(params: Any) -> Any:
    """The tree of `params` with the optimizer group of each leaf.

    Raises:
      LookupError: as `row_of`.
      ValueError: Muon's group has an array that is not a matrix.
    """

    def group(keys, leaf):
        path = path_of(keys)
        row = row_of(path)
        if row.group == "matrix" and leaf.ndim != 2:
            raise ValueError(f"parameter {path} has shape {leaf.shape}; the group 'matrix' is for matrices")
        return row.group

    return jax.tree.map_with_path(group, params)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The NamedSharding of each leaf of `tree`: arrays or ShapeDtypeStructs of parameters, optimizer state, or both.

    Scalars are replicated, and so are a dimension that its mesh axis does not divide and what an optimizer keeps beside
    the trees like the parameters' (`opt_state/...` without a row).

    Raises:
      LookupError: a parameter is not in the table.
    """

    def place(keys, leaf):
        path = path_of(keys)
        own = path.startswith("opt_state/") and not any(row.match(path) for row in TABLE)
        if leaf.ndim == 0 or own:
            return NamedSharding(mesh, P())
        spec = row_of(path).spec
        axes = (axis if _divides(mesh, axis, size) else None for axis, size in zip(spec, leaf.shape, strict=False))
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map_with_path(place, tree)


def abstract_on(mesh: Mesh, config: GPTConfig) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s, laid out on the mesh."""
    abstract = abstract_params(config)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings(mesh, abstract),
    )


def _divides(mesh: Mesh, axis: str | None, size: int) -> bool:
    return axis is not None and size % mesh.shape[axis] == 0


@dataclass(frozen=True)
class ParameterCount:
    """The number of parameters of the large optimizer groups and of all others together, with the padded vocabulary.

    `counted` is the number of those that count towards the training horizon.
    """

    embedding: int
    matrices: int
    head: int
    value_embedding: int
    others: int
    counted: int

    @property
    def total(self) -> int:
        return self.embedding + self.matrices + self.head + self.value_embedding + self.others


def count_parameters(config: GPTConfig) -> ParameterCount:
    """The exact numbers of parameters, by the table."""
    sizes = [(row_of(path), leaf.size) for path, leaf in named_parameters(abstract_params(config))]

    def of(group: Group) -> int:
        return sum(size for row, size in sizes if row.group == group)

    large = {
        "embedding": of("embedding"),
        "matrices": of("matrix"),
        "head": of("head"),
        "value_embedding": of("value_embedding"),
    }
    others = sum(size for _, size in sizes) - sum(large.values())
    return ParameterCount(**large, others=others, counted=sum(size for row, size in sizes if row.counted))


def named_parameters(params: Any) -> Iterator[tuple[str, Any]]:
    """The path and the array of each parameter."""
    return ((path_of(keys), leaf) for keys, leaf in jax.tree.leaves_with_path(params))
