"""What other programs call the parameters, and how their arrays differ, for both directions.

jaxchat's kernels are `[in, out]`, and its vocabulary is padded; weights of PyTorch are `[out, in]`, and files hold the
rows of the vocabulary alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxchat.errors import UserError, check
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, abstract_params
from jaxchat.model.parameters import export_name, named_parameters, row_of

Form = Literal["hf", "nanochat"]
FORMS = {"hf": "transformers' NanoChat", "nanochat": "nanochat"}


# nanochat's names, by the paths of the table of parameters, which has transformers' names. Both programs have the model
# of October 2025: a parameter that is not here, neither of them can express.
NANOCHAT = {
    "embed/embedding": "transformer.wte.weight",
    "blocks/{i}/attn/q/kernel": "transformer.h.{i}.attn.c_q.weight",
    "blocks/{i}/attn/k/kernel": "transformer.h.{i}.attn.c_k.weight",
    "blocks/{i}/attn/v/kernel": "transformer.h.{i}.attn.c_v.weight",
    "blocks/{i}/attn/o/kernel": "transformer.h.{i}.attn.c_proj.weight",
    "blocks/{i}/mlp/up/kernel": "transformer.h.{i}.mlp.c_fc.weight",
    "blocks/{i}/mlp/down/kernel": "transformer.h.{i}.mlp.c_proj.weight",
    "head/kernel": "lm_head.weight",
}


@dataclass(frozen=True)
class Weight:
    """A weight of another program, and the parameter that it is.

    Attributes:
      name: what it is called there.
      path: the parameter's path here, such as `blocks/0/attn/q/kernel`.
      shape: its shape there, without padding of the vocabulary.
      transposed: whether the parameter is its transpose.
      padded_rows: the rows that it would have with jaxchat's padding of the vocabulary.
    """

    name: str
    path: str
    shape: tuple[int, int]
    transposed: bool
    padded_rows: int

    def of_parameter(self, parameter: np.ndarray) -> np.ndarray:
        """The weight as a view of its parameter."""
        return (parameter.T if self.transposed else parameter)[: self.shape[0]]

    def to_parameter(self, weight: np.ndarray) -> np.ndarray:
        """The parameter, fp32. Rows that only pad the vocabulary are zeros, whatever `weight` has there."""
        padded = np.zeros((self.padded_rows, self.shape[1]), np.float32)
        padded[: self.shape[0]] = weight[: self.shape[0]]
        return np.ascontiguousarray(padded.T) if self.transposed else padded


def weights(config: GPTConfig, form: Form) -> dict[str, Weight]:
    """The weights that the model has in another program, by their names there.

    Raises:
      UserError: the program has nothing like one of the parameters.
    """
    found = {}
    for path, leaf in named_parameters(abstract_params(config)):
        name, transposed = _name(path, form), path.endswith("kernel")  # of a Linear, here [in, out]
        rows, columns = leaf.shape[::-1] if transposed else leaf.shape
        of_vocabulary = path.split("/")[0] != "blocks"
        shape = (config.vocab_size if of_vocabulary else rows, columns)
        found[name] = Weight(name, path, shape, transposed, rows)
    return found


def _name(path: str, form: Form) -> str:
    row = row_of(path)
    if row.path not in NANOCHAT:
        raise UserError(f"the model's parameter {path} has no counterpart in {FORMS[form]}, so it cannot be exported")
    return export_name(path) if form == "hf" else NANOCHAT[row.path].replace("{i}", path.split("/")[1])


def check_weights(config: GPTConfig, form: Form, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Checks that `shapes`, by name, are those of the weights of a model of `config`.

    Weights of nanochat may have more rows of the vocabulary, which are padding.

    Args:
      where: the file, for messages.

    Raises:
      UserError: a weight is missing, of another shape, or none that the model has; the message names it.
    """
    expected = weights(config, form)
    unknown = [name for name in shapes if name not in expected]
    missing = [name for name in expected if name not in shapes]
    check(
        not unknown,
        f"{where} has {_several(unknown)}, which jaxchat's model does not have; only models of the form that "
        "nanochat had in October 2025 can be read",
    )
    check(not missing, f"{where} lacks {_several(missing)}; a model of depth {config.depth} has it; get the whole file")
    for name, weight in expected.items():
        rows, columns = weight.shape
        there = tuple(shapes[name])
        fits = there == weight.shape
        if form == "nanochat" and weight.path.split("/")[0] != "blocks":
            fits = len(there) == 2 and there[0] >= rows and there[1] == columns
        check(fits, f"{where}: {name} has the shape {list(there)}, but by its settings the model has {[rows, columns]}")


def _several(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2:,} more" if len(names) > 2 else "")


def params_of(config: GPTConfig, form: Form, read: Callable[[str], np.ndarray]) -> Params:
    """The tree of fp32 parameters, as NumPy arrays, from weights whose names and shapes `check_weights` has checked.

    Args:
      read: gives a weight by its name there.
    """
    tree: dict[str, Any] = {}
    for name, weight in weights(config, form).items():
        *folders, last = weight.path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = weight.to_parameter(read(name))
    return tree
