"""Compares what jaxchat and nanochat learn from the same text: bits per byte by steps and by seconds.

    python benchmarks/against_nanochat.py quality --checkout nanochat --python nanochat/.venv/bin/python --data DIR \\
        --steps 400 --at 100 200 400 --seeds 0 1 --json all.jsonl --png all.png --recipe "guide:" \\
        --peer "its own rule:" "its best:--rates=2 --warmup-steps=0 --momentum=0.85,0.97,0.9,0.35,0.65" \\
        --pretrain.batch-tokens=131072 --data.packing=concat

jaxchat's recipes are those of `quality.py`, whose options hold here too; of the parts in a file it trains the base and
the whole. A recipe of nanochat (--peer, or [nanochat] in the file) is a name and options of its scripts/base_train.py;
`nanochat_quality.py` has --rates, --momentum and --same-batches besides. The script runs as it is, in a process of its
own, on the same files in the same order, with the same tokenizer. Depth, context, tokens a step, number of steps, seeds
and rows for validation are those of jaxchat's first recipe; its --window-pattern is L unless a recipe says otherwise.
Its loader crops documents, and so reads a text more often than jaxchat does for as many tokens; with --same-batches it
has the batches of jaxchat's first recipe, token for token.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from quality import add_options, plan, recipes_of, report, train_all
from quality_runs import Measured, Record, Run, carry_out
from recipes import Recipe, ablation, chosen, parse
from timing import Failed, alone, run

from jaxchat.cli.parser import option_strings
from jaxchat.config import Experiment
from jaxchat.errors import UserError, check

HERE = Path(__file__).parent
SAME_BATCHES = "--same-batches"  # of a recipe of nanochat
BATCHES = "batches.npy"
OF_THE_TEXT = 3  # options of a run of nanochat: they tell it apart from others, but its script has none such
LONG = 7 * 86_400  # seconds: no run is cut short


def main(argv: Sequence[str]) -> int:
    """Prints the tables; returns 2 for options that cannot be used, or if a run fails."""
    parser = argparse.ArgumentParser(
        prog="against_nanochat.py quality", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--checkout", required=True, metavar="DIR", help="a nanochat checkout, of January 2026 or later")
    add("--python", default=sys.executable, metavar="FILE", help="a Python with torch (default: this one)")
    add("--peer", nargs="+", action="extend", default=[], metavar="NAME:OPTIONS", help="recipes of nanochat")
    add("--rows", type=int, default=32, help="that nanochat computes at once (default 32)")
    add_options(parser)
    options, overrides = parser.parse_known_args(argv)
    try:
        done = compare(options, overrides, option_strings(parser))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(done, options)
    return 2 if None in done else 0


def compare(options: argparse.Namespace, overrides: Sequence[str], names: Sequence[str]) -> list[Record | None]:
    """The records of jaxchat's runs, and then of nanochat's.

    Raises:
      UserError: options or a text that cannot be used.
    """
    script = Path(options.checkout) / "scripts" / "base_train.py"
    check(script.exists(), f"{options.checkout} is not a nanochat checkout (no scripts/base_train.py)")
    check("setup_optimizer(" in script.read_text(), f"{script} is too old; check out a commit of January 2026 or later")
    given = recipes_of(options)
    peers = (*given.nanochat, *map(parse, options.peer))
    given = dataclasses.replace(given, recipes=(*given.recipes, *ablation(given.parts)[:2]), parts=())
    wanted = [recipe.name for recipe in chosen((*given.recipes, *peers), options.only)]
    options.only = None
    ours = plan(options, given, overrides, names)
    theirs = [_peer(options, one, peer) for one in ours if one.recipe == ours[0].recipe for peer in peers]
    asked = [[one for one in runs if one.recipe in wanted] for runs in (ours, theirs)]
    began = time.perf_counter()
    try:
        # In a process of its own: JAX would keep the memory of the GPU.
        done, _ = alone(train_all, asked[0], options.json, options.within, timeout=LONG)
    except Failed as failure:
        raise UserError(f"jaxchat failed: {failure}") from None
    left = options.within and options.within - (time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as scratch:
        train = functools.partial(_train, options, Path(scratch))
        return done + carry_out(asked[1], train, options.json, left)


def _peer(options: argparse.Namespace, ours: Run, peer: Recipe) -> Run:
    """A run of nanochat, of the sizes of one of jaxchat; the options of its process follow those of the text."""
    experiment = ours.experiment
    settings = (
        f"--data={options.data}",
        *(f"--vocab-size={experiment.tokenizer.vocab_size}", f"--eval-tokens={experiment.pretrain.eval_tokens}"),
        *(f"--depth={experiment.model.depth}", f"--max-seq-len={experiment.model.sequence_len}"),
        *(f"--total-batch-size={experiment.pretrain.batch_tokens}", f"--device-batch-size={options.rows}"),
        *("--window-pattern=L", *peer.options),
    )
    return dataclasses.replace(ours, program="nanochat", recipe=peer.name, options=settings)


def _train(options: argparse.Namespace, scratch: Path, one: Run) -> Measured:
    count = one.at[-1] if SAME_BATCHES in one.options else 0
    folder = scratch / f"given-{count}"
    if not folder.exists():
        try:
            alone(prepare, one.experiment, str(folder), count, timeout=LONG)
        except Failed as failure:
            raise UserError(str(failure)) from None
    result, checkout = scratch / "result.json", str(Path(options.checkout).absolute())
    command = [
        *(options.python, str(HERE / "nanochat_quality.py"), checkout, f"--seed={one.seed}", f"--json={result}"),
        *(f"--text={folder / 'text'}", f"--tokenizer={folder / 'tokenizer.json'}", f"--rows={folder / 'rows.npy'}"),
        *([f"--batches={folder / BATCHES}"] if count else []),
        *("--at", *map(str, one.at), *(option for option in one.options[OF_THE_TEXT:] if option != SAME_BATCHES)),
    ]
    environment = {**os.environ, "PYTHONPATH": checkout, "NANOCHAT_BASE_DIR": str(scratch / "base")}
    return run("nanochat", command, environment, result)


def prepare(experiment: Experiment, folder: str, batches: int = 0) -> None:
    """Leaves in a new folder what nanochat is given.

    `text` has the files of parquet in their order, the one for validation last; `tokenizer.json` jaxchat's tokenizer;
    `rows.npy` the rows for validation, int32[rows, 2, T] of inputs and targets; `batches.npy` those of so many batches,
    if any.

    Raises:
      UserError: the text is not parquet, or no single file of it is for validation.
    """
    import jax

    from jaxchat.stages import tokenizer
    from jaxchat.stages.pretrain import text_batches, validation_rows
    from jaxchat.stages.workspace import Workspace

    jax.config.update("jax_platforms", "cpu")  # too late for JAX_PLATFORMS: it is imported before
    with tempfile.TemporaryDirectory() as directory:
        workspace = Workspace(experiment, Path(directory) / "run", say=lambda line: None)
        text = workspace.text()
        files = [*text.train.files, *text.val.files]
        parquet = all(str(file).endswith(".parquet") for file in files)
        good = parquet and text.train.hold_out is None and len(text.val.files) == 1
        check(good, f"nanochat reads files of parquet, one of them for validation; {text.folder} has others")
        tokenizer.run(workspace)
        rows = validation_rows(workspace, workspace.tokenizer(), text)
        written = Path(folder)
        (written / "text").mkdir(parents=True)
        for number, file in enumerate(files):
            (written / "text" / f"{number:05d}.parquet").symlink_to(os.path.abspath(file))
        np.save(written / "rows.npy", np.stack([rows["inputs"], rows["targets"]], axis=1))
        workspace.tokenizer().save(written)
        if batches:
            length = experiment.model.sequence_len
            count = experiment.pretrain.batch_tokens // length
            source = text_batches(workspace, workspace.tokenizer(), text, count)
            shape = batches * count, 2, length
            kept = np.lib.format.open_memmap(written / BATCHES, mode="w+", dtype=np.int32, shape=shape)
            for start in range(0, len(kept), count):
                batch = next(source)
                kept[start : start + count] = np.stack([batch["inputs"], batch["targets"]], axis=1)
            kept.flush()
