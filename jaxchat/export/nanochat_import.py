"""Models that nanochat has trained: `model_STEP.pt`, `meta_STEP.json` and `tokenizer.pkl`."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError, check
from jaxchat.export.incoming import Incoming, check_tokenizer, model_config
from jaxchat.export.names import check_weights
from jaxchat.export.pickles import Made, read_pickle
from jaxchat.export.torch_file import TorchFile
from jaxchat.runs.files import Object, read_bytes, read_json
from jaxchat.tokenizer import FILE_NAME, BaseTokenizer, Tokenizer, load_tokenizer
from jaxchat.tokenizer.foreign.tiktoken_ranks import from_ranks
from jaxchat.tokenizer.vocabulary import naming_file

# The folders of nanochat's base directory, and the stages whose models they have.
FOLDERS = {
    "base_checkpoints": "pretrain",
    "mid_checkpoints": "midtrain",
    "chatsft_checkpoints": "sft",
    "chatrl_checkpoints": "rl",
}
# Parts of the names of weights that nanochat's later models have.
_LATER = {
    "value_embeds": "value embeddings",
    "ve_gate": "gates of value embeddings",
    "resid_lambdas": "scalars of the residual stream",
    "x0_lambdas": "scalars of the first layer's input",
    "smear_gate": "smear",
    "smear_lambda": "smear",
    "backout_lambda": "backout",
}
_SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_META = Object({"model_config": Object(dict.fromkeys(_SIZES, int), {"window_pattern": (None, str)})})
_NORM_EPS = 1.1920929e-07  # what PyTorch's rms_norm adds in fp32 where nothing else is asked for
_REMEDY = "get the whole file again"
_PICKLE = "tokenizer.pkl"
_ENCODING = "tiktoken.core.Encoding"
_WRAPPED = "_orig_mod."  # what torch.compile puts before each name


def read_nanochat(
    source: Path, *, stage: str | None = None, step: int | None = None, tokenizer: Path | None = None
) -> Incoming:
    """The model in a folder of nanochat's: its base directory, a folder of checkpoints, or one from the hub.

    Args:
      stage: which of the base directory's models, and where it is to stand in a run; by default the last one.
      step: the checkpoint; by default the newest.
      tokenizer: the tokenizer.pkl, or a folder with one, if it is not beside the model.

    Raises:
      UserError: a file is missing, damaged, or of a model that jaxchat does not have.
    """
    folder, found_stage = _folder(source, stage)
    weights_file, found_step = _checkpoint(folder, step)
    meta_file = folder / weights_file.name.replace("model_", "meta_").replace(".pt", ".json")
    meta = read_json(meta_file, _META, _REMEDY)  # pyright: ignore[reportArgumentType]
    check(meta is not None, f"{meta_file} is missing, which has the model's sizes; get it too")
    sizes = meta["model_config"]
    file = TorchFile(weights_file)
    names = {name.removeprefix(_WRAPPED): name for name in file.tensors}
    _refuse_later(str(weights_file), names)
    later = sorted(set(sizes) - {*_SIZES, "window_pattern"})
    check(not later, f"{meta_file}: model_config has {', '.join(later)}, which jaxchat's model does not have")
    pattern = sizes.get("window_pattern") or "L"
    check(
        set(pattern) == {"L"},
        f"{meta_file}: window_pattern is {pattern!r}; nanochat's windows have changed their length, so only models "
        "without windows can be imported",
    )
    config = model_config(
        str(meta_file),
        depth=sizes["n_layer"],
        width=sizes["n_embd"],
        heads=sizes["n_head"],
        kv_heads=sizes["n_kv_head"],
        vocab_size=sizes["vocab_size"],
        sequence_len=sizes["sequence_len"],
    )
    shapes = {name: file.tensors[there].shape for name, there in names.items()}
    check_weights(config, "nanochat", shapes, str(weights_file))
    place, words = _tokenizer(folder if tokenizer is None else tokenizer)
    check_tokenizer(str(place), words, config.vocab_size)
    return Incoming(
        config=config,
        tokenizer=words,
        stage=stage or found_stage or _stage_by(meta),
        step=found_step,
        form="nanochat",
        read=lambda name: file.read(names[name]),
        source={"from": "nanochat", "file": str(weights_file.absolute()), "rms_norm_eps": _NORM_EPS},
    )


def _refuse_later(where: str, names: Collection[str]) -> None:
    later = {}
    for name in names:
        part = next((part for part in name.split(".") if part in _LATER), None)
        if part is not None:
            later.setdefault(_LATER[part], name)
    found = ", ".join(f"{what} ({name})" for what, name in later.items())
    check(
        not later,
        f"{where} is of nanochat's model of 2026, with {found}; jaxchat and transformers have that of October 2025, "
        "without them",
    )


def _folder(source: Path, stage: str | None) -> tuple[Path, str | None]:
    """The folder with the checkpoints, and the stage that its place tells; None if it tells nothing."""
    if any(source.glob("model_*.pt")):
        return source, FOLDERS.get(source.absolute().parent.name)
    folders = {named: source / name for name, named in FOLDERS.items() if any(source.glob(f"{name}/*/model_*.pt"))}
    if source.name in FOLDERS and any(source.glob("*/model_*.pt")):
        folders = {FOLDERS[source.name]: source}
    check(
        bool(folders),
        f"{source} has no checkpoint of nanochat: no model_STEP.pt, and none of {', '.join(FOLDERS)} with one"
        + ("; its files are those of transformers: --from=hf" if (source / "config.json").exists() else ""),
    )
    chosen = stage or list(folders)[-1]
    check(chosen in folders, f"{source} has no model of {chosen}, only of {', '.join(folders)}")
    models = sorted({path.parent for path in folders[chosen].glob("*/model_*.pt")})
    names = ", ".join(str(model) for model in models)
    check(len(models) == 1, f"{folders[chosen]} has several models; name one of {names}")
    return models[0], chosen


def _checkpoint(folder: Path, step: int | None) -> tuple[Path, int]:
    steps = {
        int(match[1]): path for path in folder.glob("*.pt") if (match := re.fullmatch(r"model_(\d+)\.pt", path.name))
    }
    check(bool(steps), f"{folder} has no model_STEP.pt")
    chosen = max(steps) if step is None else step
    check(chosen in steps, f"{folder} has no checkpoint of step {chosen}, only of {', '.join(map(str, sorted(steps)))}")
    return steps[chosen], chosen


def _stage_by(meta: dict[str, Any]) -> str:
    """The stage of a model by what nanochat notes of its training: only pretraining was told a depth."""
    told = meta.get("user_config")
    return "pretrain" if isinstance(told, dict) and "depth" in told else "sft"


def _tokenizer(place: Path) -> tuple[Path, BaseTokenizer]:
    """The tokenizer at `place`, or of a folder of checkpoints: where nanochat and the hub's models have it."""
    if place.is_file():
        return place, read_tokenizer(place)
    looked = [place, place / "tokenizer", place.absolute().parent.parent / "tokenizer"]
    for folder in looked:
        for name in (_PICKLE, FILE_NAME):
            if (folder / name).is_file():
                return folder / name, read_tokenizer(folder / name)
    raise UserError(
        f"there is no {_PICKLE} in {', '.join(map(str, looked))}; name the model's tokenizer with --tokenizer"
    )


def read_tokenizer(path: Path) -> BaseTokenizer:
    """The tokenizer in nanochat's `tokenizer.pkl`, or in any file that `load_tokenizer` reads.

    Raises:
      UserError: the file is missing or damaged, or holds anything but an `Encoding` of tiktoken.
    """
    data = read_bytes(path, _REMEDY)  # pyright: ignore[reportArgumentType]
    check(data is not None, f"{path} is missing; {_REMEDY}")
    if not (data or b"").startswith(b"\x80"):
        return load_tokenizer(path)
    try:
        made = read_pickle(data or b"", {_ENCODING})
    except ValueError as error:
        raise UserError(f"{path} is no tokenizer of nanochat: {error}; {_REMEDY}") from None
    state = made.state if isinstance(made, Made) else None
    check(
        not isinstance(state, str),
        f"{path} holds only the name of an encoding that tiktoken downloads, {state!r}; give its .tiktoken file",
    )
    match state:
        case {"pat_str": str(pattern), "mergeable_ranks": dict(ranks), "special_tokens": dict(special)}:
            pass
        case _:
            raise UserError(f"{path} is no tokenizer of nanochat: it holds no Encoding of tiktoken; {_REMEDY}")
    with naming_file(path):  # pyright: ignore[reportArgumentType]
        return Tokenizer.from_vocabulary(from_ranks(ranks, special, pattern))
