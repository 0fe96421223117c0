"""`jaxchat import`: make a run directory of a model that another program has."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from jaxchat.cli.places import check_place
from jaxchat.cli.values import path, whole
from jaxchat.config import TRAINED, Range
from jaxchat.errors import UserError, check
from jaxchat.storage import is_free, is_remote


def add_command(commands: Any) -> None:
    """Adds `import` to the commands of `jaxchat`."""
    parser = commands.add_parser(
        "import",
        help="Make a run of a NanoChat of Hugging Face or of nanochat.",
        description="Make a run directory of a model of transformers or nanochat, to chat, serve, evaluate, export and "
        "fine-tune it. Files are read without PyTorch, and nothing that they contain is run. Download a model of the "
        "hub first: hf download NAME --local-dir SOURCE.",
    )
    add = parser.add_argument
    add("source", type=path, metavar="SOURCE", help="The model's folder.")
    add(
        "--from",
        dest="form",
        required=True,
        choices=("hf", "nanochat"),
        help="Its form: hf for config.json and model.safetensors, nanochat for model_STEP.pt and meta_STEP.json.",
    )
    add("--run", required=True, type=path, metavar="DIR", help="The run directory to make; it must not exist yet.")
    add(
        "--stage",
        choices=TRAINED,
        metavar="STAGE",
        help="What the model is to count as in the run: pretrain, midtrain, sft or rl. Of nanochat's base directory it "
        "also says which model. (default: what the files tell)",
    )
    add(
        "--step",
        type=whole(Range(at_least=0)),
        metavar="N",
        help="Step of nanochat's checkpoint. (default: the newest)",
    )
    add("--tokenizer", type=path, metavar="PATH", help="The tokenizer's file or folder, if it is not with the model.")
    parser.set_defaults(command=_import)


def _import(arguments: argparse.Namespace) -> int:
    source, target = _source(arguments.source), _target(arguments.run)
    tokenizer = None if arguments.tokenizer is None else Path(arguments.tokenizer)
    check(arguments.form == "nanochat" or arguments.step is None, "--step is for --from=nanochat; leave it out")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a GPU may be in use, and would not help
    from jaxchat.export.hf_import import read_hf
    from jaxchat.export.incoming import write_run
    from jaxchat.export.nanochat_import import read_nanochat

    if arguments.form == "hf":
        incoming = read_hf(source, stage=arguments.stage, tokenizer=tokenizer)
    else:
        incoming = read_nanochat(source, stage=arguments.stage, step=arguments.step, tokenizer=tokenizer)
    config = incoming.config
    print(
        f"import    {incoming.source['file']}: {config.depth} layers, width {config.width}, context "
        f"{config.sequence_len:,}, {config.vocab_size:,} tokens"
    )
    for remark in incoming.remarks:
        print(f"import    {remark}")
    write_run(incoming, target)
    print(f"import    {arguments.run} has it as the model of {incoming.stage}")
    run = shlex.quote(arguments.run)
    print(f"\ntalk to it:   jaxchat chat --run {run}")
    print(f"fine-tune it: python launch.py --experiment=finetune --init-from {run} --data DIR")
    return 0


def _source(name: str) -> Path:
    check(not is_remote(name), f"{name} is in cloud storage; copy it to this machine first")
    source = Path(name)
    if not source.exists():
        like_the_hub = len(source.parts) == 2 and not source.is_absolute()
        get = f"; a model of the hub is downloaded first: hf download {name} --local-dir {source.name}"
        raise UserError(f"{name} does not exist{get if like_the_hub else '; name the model as a folder'}")
    check(source.is_dir(), f"{name} is a file; name the folder that it is in")
    return source


def _target(name: str) -> Path:
    check(not is_remote(name), f"--run is {name}; a model is imported to this machine, from where it can be copied")
    check_place(name, "--run")
    target = Path(name).absolute()
    check(is_free(target), f"{name} is not empty; name another --run, or move it aside")
    return target
