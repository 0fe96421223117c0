"""Trains recipes side by side and compares what they learn: bits per byte by steps and by seconds.

    python benchmarks/quality.py --data DIR --experiment d12 --steps 400 --at 100 200 400 --seeds 0 1 \\
        --recipe "guide:" "long warm-down:--pretrain.schedule.decay-ratio=0.65" \\
        --json quality.jsonl --png quality.png --pretrain.batch-tokens=131072 --data.packing=concat
    python benchmarks/quality.py --data DIR --steps 400 --file benchmarks/modern.toml --json parts.jsonl
    python benchmarks/quality.py --data DIR --tokens 52e6 --target 1.098 --json some.jsonl \\
        --recipe "small:--pretrain.batch-tokens=65536" "large:--pretrain.batch-tokens=262144"

A recipe is a name and options of launch.py, --experiment=NAME included; options that all have may follow the
benchmark's own. A file has recipes, or the parts of one for an ablation: each part alone and left out of the whole
(`recipes.py` says how it is written). Each run is a pretraining as launch.py does it, without samples and checkpoints.
Seconds are those of its steps: compiling and evaluations do not count. Bits per byte are those of the same rows.

With --target, the steps and seconds until then are told too, between evaluations by a straight line. A run goes on to
its last step all the same, since its learning rates are made for that many: the shortest run that ends at the target
is found by recipes of several lengths (--pretrain.num-iterations).

With --json, a run that is finished is not done again: the same command goes on where it was stopped. All recipes have
their first seed before any has its second.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxchat_quality import Trainer
from quality_runs import Record, Run, carry_out
from quality_tables import draw, show, show_parts
from recipes import Recipe, Recipes, ablation, chosen, parse, read
from timing import say

from jaxchat.cli.launch import prepare_jax
from jaxchat.cli.options import configure, named_fields
from jaxchat.cli.parser import option_strings
from jaxchat.errors import UserError, check

BASIS = "--experiment="
EVALUATIONS = 4  # of a run, if --at does not say after which steps


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns 2 for options that cannot be used, or if a run fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_options(parser)
    options, overrides = parser.parse_known_args(argv)
    try:
        given = recipes_of(options)
        runs = plan(options, given, overrides, option_strings(parser))
        done = train_all(runs, options.json, options.within)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(done, options, [part.name for part in given.parts])
    return 2 if None in done else 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a comparison, whichever programs it compares."""
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder of text, as for launch.py (default: the experiment's)")
    add("--experiment", default="d12", help="whose settings recipes begin with that name no other (default d12)")
    add("--recipe", nargs="+", action="extend", default=[], metavar="NAME:OPTIONS", help="recipes of jaxchat")
    add("--file", metavar="TOML", help="a file of recipes, or of the parts of one for an ablation")
    add("--only", nargs="+", metavar="NAME", help="only these recipes; the others can follow, or run elsewhere")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="of recipes that do not say so themselves")
    length.add_argument("--tokens", type=float, metavar="N", help="the same in tokens, for batches of several sizes")
    add("--at", type=int, nargs="+", metavar="STEP",
        help="steps after which to evaluate, besides the last, also where a recipe's batch grows and they have fewer "
             f"tokens at first (default: {EVALUATIONS} times, evenly)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of each recipe (default 0)")
    add("--target", type=float, metavar="BPB", help="also tell the steps and seconds until then")
    add("--within", type=float, metavar="SECONDS", help="begin no run that would probably end later than that")
    add("--json", metavar="FILE", help="keep a line of JSON of each run there, and do no run again that it has")
    add("--png", metavar="FILE", help="draw the curves")


def recipes_of(options: argparse.Namespace) -> Recipes:
    """The recipes of the file and of the command line, and the parts.

    Raises:
      UserError: they cannot be read, or there is none.
    """
    found = Recipes() if options.file is None else read(options.file)
    recipes = (*found.recipes, *map(parse, options.recipe))
    check(bool(recipes or found.parts), "no recipe is given; write --recipe NAME:OPTIONS, or --file FILE")
    return dataclasses.replace(found, recipes=recipes)


def plan(options: argparse.Namespace, given: Recipes, overrides: Sequence[str], names: Sequence[str]) -> list[Run]:
    """The runs of jaxchat in their order. Settings that are impossible are refused before the first.

    Args:
      overrides: options of launch.py that all recipes have.
      names: of the options of the command, for hints.

    Raises:
      UserError: an option that launch.py would refuse, or a length that is missing.
    """
    check(min(options.at or [1]) >= 1, "--at has a number below 1; evaluate after the first step at the earliest")
    runs = []
    for recipe in chosen([*given.recipes, *ablation(given.parts)], options.only):
        own = (*given.common, *overrides, *recipe.options)
        try:
            runs.append(_run(options, recipe, own, names))
        except UserError as error:
            raise UserError(f"{recipe.name}: {error}") from None
    return [
        dataclasses.replace(run, seed=seed, experiment=dataclasses.replace(run.experiment, seed=seed))
        for seed in options.seeds
        for run in runs
    ]


def _run(options: argparse.Namespace, recipe: Recipe, own: tuple[str, ...], names: Sequence[str]) -> Run:
    name = next((option.partition("=")[2] for option in reversed(own) if option.startswith(BASIS)), options.experiment)
    own = tuple(option for option in own if not option.startswith(BASIS))
    experiment = configure(name, list(own), options.data, names)
    steps = experiment.pretrain.num_iterations
    if "pretrain.num_iterations" not in named_fields(own):
        given = options.tokens and max(1, int(options.tokens // experiment.pretrain.mean_batch_tokens))
        steps = options.steps or given or steps
    if steps is None or steps < 1:
        raise UserError("nothing says how long it is; give --steps or --tokens")
    at = options.at or [round(steps * part / EVALUATIONS) for part in range(1, EVALUATIONS)]
    until = (*sorted({step for step in at if 0 < step < steps}), steps)
    # As an option, since rules have their say about what follows from it.
    experiment = configure(name, [*own, f"--pretrain.num-iterations={steps}"], options.data, names)
    all_options = (f"{BASIS}{name}", f"--data={options.data}", f"--steps={steps}", *own)
    return Run("jaxchat", recipe.name, all_options, experiment, experiment.seed, until)


def train_all(runs: Sequence[Run], file: str | None, within: float | None) -> list[Record | None]:
    """As `carry_out`, of runs of jaxchat, in this process."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # by default a quarter of a GPU's memory is left
    prepare_jax()
    with tempfile.TemporaryDirectory() as scratch:
        train = Trainer(scratch)
        return carry_out(runs, lambda run: train(run.experiment, run.at), file, within)


def report(done: Sequence[Record | None], options: argparse.Namespace, parts: Sequence[str] = ()) -> None:
    """Prints the tables of what did not fail, and draws its curves."""
    records = [found for found in done if found is not None]
    if not records:
        return
    show(records, options.target)
    if parts:
        show_parts(records, parts)
    if options.png:
        Path(options.png).write_bytes(draw(records))
        say(f"the curves are in {options.png}")


if __name__ == "__main__":
    sys.exit(main())
