"""A model as a folder that Hugging Face's transformers loads as its own NanoChat.

config.json, generation_config.json, model.safetensors (several, with an index, if large), tokenizer.json,
tokenizer_config.json and README.md, the model card.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxchat.errors import UserError, check
from jaxchat.export.hf_tokenizer import BOS, END, tokenizer_config, tokenizer_json
from jaxchat.export.names import Weight, weights
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params
from jaxchat.model.parameters import named_parameters
from jaxchat.ops.norm import NORM_EPS
from jaxchat.storage import is_free, written_whole
from jaxchat.tokenizer import BaseTokenizer

Dtype = Literal["float32", "bfloat16"]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
# How the model answers where nothing else is asked for: as `jaxchat chat` does.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 50}
SHARD_BYTES = 2 * 10**9  # of one file, all of which is in memory twice while it is written
# The fields of GPTConfig that NanoChat can express, or that only training knows, like `border_token`.
_EXPRESSED = {
    *("depth", "sequence_len", "window_pattern", "num_kv_heads", "rope_base", "logit_cap", "vocab_size"),
    *("embedding_std", "up_factor", "head_std", "border_token"),
}


def check_expressible(config: GPTConfig, tokenizer: BaseTokenizer) -> None:
    """Checks that transformers' NanoChat can be this model.

    Raises:
      UserError: it cannot; the message names the setting or the parameter.
    """
    target = "transformers' NanoChat"
    check(
        all(window is None for window in config.windows),
        f"the model has windows (window-pattern {config.window_pattern}), which {target} does not: only models with "
        "--model.window-pattern=L can be exported",
    )
    check(
        config.head_dim * config.num_heads == config.width,
        f"the model has {config.num_heads} heads of {config.head_dim}, but {target} derives heads of "
        f"{config.width // config.num_heads} from its width of {config.width}",
    )
    for field in dataclasses.fields(config):
        check(
            field.name in _EXPRESSED or getattr(config, field.name) == field.default,
            f"{target} has nothing like {field.name.replace('_', '-')} {getattr(config, field.name)}; only models "
            f"with {field.name.replace('_', '-')} {field.default} can be exported",
        )
    weights(config, "hf")
    check(
        tokenizer.vocab_size == config.vocab_size,
        f"the tokenizer has {tokenizer.vocab_size:,} ids and the model {config.vocab_size:,}: it is that of another "
        "run; give the one that the model was trained with",
    )


def config_json(
    config: GPTConfig, tokenizer: BaseTokenizer, *, dtype: Dtype, base: bool = False, norm_eps: float = NORM_EPS
) -> dict[str, Any]:
    """The contents of config.json. Every field that decides a logit is there: the class has other defaults."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "rms_norm_eps": norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": config.logit_cap,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        **_special_ids(tokenizer, base),
        "dtype": dtype,
    }


def generation_config(tokenizer: BaseTokenizer, *, base: bool = False) -> dict[str, Any]:
    """The contents of generation_config.json: an answer ends where jaxchat's engine ends it."""
    ids = _special_ids(tokenizer, base)
    return {**ids, "eos_token_id": [tokenizer.encode_special(END), tokenizer.encode_special(BOS)], **SAMPLING}


def _special_ids(tokenizer: BaseTokenizer, base: bool) -> dict[str, int]:
    bos, end = tokenizer.encode_special(BOS), tokenizer.encode_special(END)
    return {"bos_token_id": bos, "eos_token_id": bos if base else end, "pad_token_id": bos}


def export_hf(
    config: GPTConfig,
    params: Params,
    tokenizer: BaseTokenizer,
    folder: str | os.PathLike,
    *,
    dtype: Dtype = "float32",
    base: bool = False,
    norm_eps: float = NORM_EPS,
    card: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the model to `folder`, which is there with everything in it, or not at all.

    Args:
      folder: does not exist yet, or is empty.
      base: the model continues documents and has not learned to answer.
      norm_eps: what the norms add to the mean square: other than jaxchat's for weights from a program with another.
      card: the model card, Markdown.
      progress: is told how many weights are written, or about to be, and of how many.

    Raises:
      UserError: the folder has something in it, or NanoChat cannot express the model.
      OSError: the disk fails.
    """
    check_expressible(config, tokenizer)
    folder = Path(folder).absolute()
    check_free(folder)
    files = {
        "config.json": _json(config_json(config, tokenizer, dtype=dtype, base=base, norm_eps=norm_eps)),
        "generation_config.json": _json(generation_config(tokenizer, base=base)),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": _json(tokenizer_config(config.sequence_len, base=base)),
        **({"README.md": card} if card else {}),
    }
    with written_whole(folder) as part:
        for name, text in files.items():
            (part / name).write_text(text, encoding="utf-8")
        _write_weights(config, params, part, DTYPES[dtype], progress)
    return folder


def check_free(folder: Path) -> None:
    """Checks that `folder` does not exist, or is an empty folder.

    Raises:
      UserError: it does not.
    """
    check(not folder.exists() or folder.is_dir(), f"{folder} is a file; name a new folder")
    check(is_free(folder), f"{folder} is not empty; name a new folder, or move it aside first")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write_weights(
    config: GPTConfig, params: Params, folder: Path, dtype: np.dtype, progress: Callable[[int, int], None]
) -> None:
    """Writes the weights to one file or, if large, to several with an index, of which one at a time is in memory."""
    leaves, table = dict(named_parameters(params)), weights(config, "hf")
    shards = list(_shards(table, dtype.itemsize))
    total, place = 0, {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {}
        for weight in shard:
            progress(len(place) + len(arrays), len(table))
            parameter = np.asarray(leaves[weight.path])
            arrays[weight.name] = np.ascontiguousarray(weight.of_parameter(parameter), dtype)
        try:
            save_file(arrays, folder / name, {"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{folder / name} cannot be written ({error}); make room, and try again") from error
        shutil.copymode(folder / "config.json", folder / name)  # the library lets only the owner read it
        total += sum(array.nbytes for array in arrays.values())
        place |= dict.fromkeys(arrays, name)
    progress(len(place), len(table))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place}
        (folder / "model.safetensors.index.json").write_text(_json(index))


def _shards(table: dict[str, Weight], itemsize: int) -> Iterator[list[Weight]]:
    """The weights of each file."""
    shard, filled = [], 0
    for weight in table.values():
        size = weight.shape[0] * weight.shape[1] * itemsize
        if shard and filled + size > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(weight)
        filled += size
    yield shard
