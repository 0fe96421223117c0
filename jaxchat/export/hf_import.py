"""Models in the form of Hugging Face's transformers: a folder with config.json, safetensors and tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxchat.errors import UserError, check
from jaxchat.export.incoming import Incoming, check_tokenizer, model_config
from jaxchat.export.names import check_weights
from jaxchat.export.torch_file import POINTER
from jaxchat.ops.norm import NORM_EPS
from jaxchat.runs.files import Object, read_json
from jaxchat.tokenizer import load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_CONFIG = Object(
    {"model_type": str},
    {
        **dict.fromkeys((*_SIZES, "intermediate_size", "max_position_embeddings"), int),
        "num_key_value_heads": (None, int),
        **dict.fromkeys(("rms_norm_eps", "final_logit_softcapping", "rope_theta"), (None, float)),
        "rope_parameters": (None, Object({}, {"rope_theta": float, "rope_type": str})),
        "bos_token_id": (None, int),
        "eos_token_id": (None, int, [int]),
    },
)
_REMEDY = "get the whole file again"
# What the model must have, and what transformers' class takes where config.json is silent.
_FIXED = {"hidden_act": "relu2", "attention_bias": False, "tie_word_embeddings": False}
# What no NanoChat has: only models of another kind.
_ABSENT = ("rope_scaling", "sliding_window", "layer_types", "quantization_config", "num_experts")
_FLOATS = {"F32", "F16", "BF16", "F64"}
_LARGEST_EPS = 1e-5


def read_hf(source: Path, *, stage: str | None = None, tokenizer: Path | None = None) -> Incoming:
    """The NanoChat in a folder that transformers has written, or a converter, or `jaxchat export`.

    Args:
      stage: where the model is to stand in a run; by default sft, or pretrain if its documents end where the next one
        begins.
      tokenizer: a tokenizer.json, or a folder with one, if it is not in `source`.

    Raises:
      UserError: a file is missing, damaged, or of a model that jaxchat does not have.
    """
    file = source / "config.json"
    found = read_json(file, _CONFIG, _REMEDY)  # pyright: ignore[reportArgumentType]
    other = any(source.glob("model_*.pt"))
    instead = "its files are nanochat's: --from=nanochat" if other else "give one that save_pretrained has written"
    check(found is not None, f"{source} has no config.json, and so is no folder of transformers; {instead}")
    kind = found["model_type"]
    check(
        kind == "nanochat", f"{file}: model_type is {kind!r}; of transformers' models only 'nanochat' can be imported"
    )
    for name in _SIZES:
        check(name in found, f"{file} has no {name}; {_REMEDY}")
    for name, value in _FIXED.items():
        there = found.get(name, value)
        check(there == value, f"{file}: {name} is {json.dumps(there)}; jaxchat's model has {json.dumps(value)} alone")
    strange = [name for name in _ABSENT if found.get(name)]
    check(not strange, f"{file} has {', '.join(strange)}, which jaxchat's model does not have")
    width, heads = found["hidden_size"], found["num_attention_heads"]
    inner = found.get("intermediate_size", 4 * width)
    check(inner == 4 * width, f"{file}: intermediate_size is {inner}; jaxchat's MLP is 4 times the width, {4 * width}")
    rope = found.get("rope_parameters") or {}
    check(
        rope.get("rope_type", "default") == "default",
        f"{file}: rope_type is {rope.get('rope_type')!r}; jaxchat's model has 'default' alone",
    )
    config = model_config(
        str(file),
        depth=found["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        vocab_size=found["vocab_size"],
        sequence_len=found.get("max_position_embeddings", 2048),
        rope_base=float(rope.get("rope_theta") or found.get("rope_theta") or 10_000.0),
        logit_cap=float(found.get("final_logit_softcapping") or 15.0),
    )
    shapes, read = _weights(source)
    check_weights(config, "hf", shapes, str(source))
    place = tokenizer or source
    words = load_tokenizer(place)
    check_tokenizer(str(place), words, config.vocab_size)
    ends = found.get("eos_token_id")
    base = ends is not None and ends in (words.bos_token_id, [words.bos_token_id])
    eps = found.get("rms_norm_eps") or NORM_EPS
    return Incoming(
        config=config,
        tokenizer=words,
        stage=stage or ("pretrain" if base else "sft"),
        step=0,
        form="hf",
        read=read,
        source={"from": "hf", "file": str(source.absolute()), "rms_norm_eps": eps},
        remarks=_about_eps(str(file), eps),
    )


def _about_eps(where: str, eps: float) -> tuple[str, ...]:
    check(0 <= eps <= _LARGEST_EPS, f"{where}: rms_norm_eps is {eps:g}; jaxchat's norms add {NORM_EPS:g} alone")
    if eps == NORM_EPS:
        return ()
    return (f"rms_norm_eps is {eps:g} there and {NORM_EPS:g} here, so logits are nearly, not exactly, the same",)


def _weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """The shapes of the weights in a folder's safetensors files, and what reads one by its name."""
    index = read_json(folder / INDEX, Object({"weight_map": Object(others=str)}), _REMEDY)  # pyright: ignore
    names = [WEIGHTS] if index is None else sorted(set(index["weight_map"].values()))
    strange = next((name for name in names if Path(name).name != name), None)
    check(strange is None, f"{folder / INDEX} names {strange}, which is not a file beside it")
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Any] = {}
    for name in names:
        file = _open(folder / name)
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            part = file.get_slice(key)
            dtype = part.get_dtype()
            check(dtype in _FLOATS, f"{folder / name}: {key} is of {dtype}; only floating-point weights can be read")
            shapes[key], files[key] = tuple(part.get_shape()), file
    return shapes, lambda key: files[key].get_tensor(key)


def _open(path: Path) -> Any:
    if not path.is_file():
        others = [other.name for other in path.parent.glob("*.bin")]
        hint = f" (load {others[0]} with transformers, and save it with save_pretrained)" if others else ""
        raise UserError(f"{path} is missing{hint}; {_REMEDY}")
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError, ValueError) as error:
        with path.open("rb") as file:
            pointer = file.read(len(POINTER)) == POINTER
        what = "is only a pointer, as git leaves without git-lfs" if pointer else f"is damaged ({error})"
        raise UserError(f"{path} {what}; {_REMEDY}") from None
