"""`jaxchat export`: a trained model as files for other programs."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxchat.cli.answering import add_answering_model
from jaxchat.cli.places import check_place
from jaxchat.cli.values import path
from jaxchat.errors import check

if TYPE_CHECKING:
    from jaxchat.runs.directory import RunDirectory

AT_ONCE = 2.0  # seconds in which it is done without a word


def add_command(commands: Any) -> None:
    """Adds `export` to the commands of `jaxchat`."""
    parser = commands.add_parser(
        "export",
        help="Write a trained model as files for transformers.",
        description="Writes the model of a run to the folder OUT, which transformers loads as its own NanoChat: "
        "weights (safetensors), settings, tokenizer with chat template, and a model card. It needs no GPU.",
    )
    add = parser.add_argument
    add_answering_model(add)
    add("--to", required=True, choices=("hf",), help="The form: hf, a folder of Hugging Face's transformers.")
    add("out", type=path, metavar="OUT", help="The folder to write, which must not exist yet or be empty.")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="Type of the weights: as they were trained, or rounded, in half the space. (default float32)",
    )
    parser.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from jaxchat.storage import is_remote

    out = arguments.out
    check(not is_remote(out), f"{out} is in cloud storage; export to a folder of this machine, and copy that")
    check_place(out, "OUT")
    import jax  # --help and bad options need not wait for it

    jax.config.update("jax_platforms", "cpu")  # it only copies, and a GPU may be busy
    from jaxchat.export.card import exported_parameters, model_card
    from jaxchat.export.hf import check_free, export_hf
    from jaxchat.infer.trained import load_model
    from jaxchat.ops.norm import NORM_EPS
    from jaxchat.runs.directory import RunDirectory
    from jaxchat.runs.progress import LiveLine, format_count

    check_free(Path(out))
    directory = RunDirectory(arguments.run)
    model = load_model(arguments.run, arguments.stage, arguments.step)
    step = _step(arguments.step, directory, model.stage)
    live, began = LiveLine("export", None), time.monotonic()

    def progress(done: int, total: int) -> None:
        if time.monotonic() - began > AT_ONCE:
            live.show_progress("weights", done, total)

    card = model_card(model, directory, step, title=Path(out).absolute().name, dtype=arguments.dtype)
    base = model.stage == "pretrain"
    # Weights that jaxchat has not trained keep the constant that they were trained with.
    origin = (directory.read_record(model.stage) or {}).get("imported", {})
    norm_eps = origin.get("rms_norm_eps", NORM_EPS)
    try:
        export_hf(model.model, model.params, model.tokenizer, out, dtype=arguments.dtype, base=base, norm_eps=norm_eps,
                  card=card, progress=progress)  # fmt: skip
    finally:
        live.close()
    size = sum(file.stat().st_size for file in Path(out).iterdir())
    if norm_eps != NORM_EPS:
        print(f"rms_norm_eps is {norm_eps:.2g}, as where the weights are from; jaxchat computes with {NORM_EPS:g}")
    print(
        f"{out} has {model.stage}, step {step:,}, of {arguments.run}: {format_count(exported_parameters(model))} "
        f"parameters in {arguments.dtype}, {size / 1e6:,.1f} MB\n"
        f"AutoModelForCausalLM.from_pretrained({os.path.abspath(out)!r}) loads it with transformers 5.0 or later"
    )
    return 0


def _step(asked: str | None, directory: RunDirectory, stage: str) -> int:
    """The step of a checkpoint that `load_model` has found."""
    from jaxchat.checkpoint import Checkpoints

    if asked is None:
        return directory.result_step(stage)
    return int(asked) if asked != "best" else Checkpoints(directory.checkpoints(stage)).best_step() or 0
