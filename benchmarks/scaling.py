"""How the best model, batch and learning rate grow with compute: trains a grid, fits the optima and their exponents.

    python benchmarks/scaling.py --data DIR --out scaling --depths 6 8 10 12 --flops 1e17 3e17 1e18 \\
        --batches 65536 131072 262144 524288 --rules=nanochat
    python benchmarks/scaling.py --data DIR --out scaling --depths 8 --flops 3e17 --batches 131072 262144 \\
        --rates 0.5 1 2 --rules=nanochat                       # the best rate of each batch
    python benchmarks/scaling.py ... --plan                    # shows the runs, and trains nothing

Each run is a pretraining by launch.py in a process of its own, as long as its budget of FLOPs allows, evaluated at its
end. Options of launch.py may follow the benchmark's own. With --rules the rates follow from the batch; --rates are
factors on them. A run with few steps says nothing of a long training: those under --fewest-steps are left out.

DIR/runs.jsonl gets a line for each run that is finished, which is not done again; one that was stopped goes on from its
last checkpoint. All runs share a tokenizer. DIR/scaling.json has the records, the optima and the fits, with the
published exponents beside them; DIR/scaling.png the curves. Only optima inside the grid count for an exponent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from quality_runs import read, write
from scaling_fits import budget_rows, draw, fits, law_rows
from timing import say, table

from jaxchat.cli.options import configure
from jaxchat.cli.parser import option_strings
from jaxchat.errors import UserError, check

LAUNCH = Path(__file__).parents[1] / "launch.py"
# Nothing but training and one evaluation before the first step and after the last; the last checkpoint is deleted.
QUIET = ("--pretrain.eval-every=0", "--pretrain.sample-every=0", "--pretrain.save-every=0", "--pretrain.core-every=0")


@dataclass(frozen=True)
class Run:
    """A training of the grid: its options for launch.py, and what follows from them."""

    name: str
    options: tuple[str, ...]
    facts: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns 2 for options that cannot be used, or if a run fails."""
    parser = _parser()
    options, overrides = parser.parse_known_args(argv)
    try:
        runs = plan(options, overrides, option_strings(parser))
        if options.plan:
            _show_plan(runs)
            return 0
        records, failed = carry_out(runs, Path(options.out), options.within)
        report(records, Path(options.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 2 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="where runs, figures and curves are kept")
    add("--data", metavar="DIR", help="folder of text, as for launch.py (default: the experiment's)")
    add("--experiment", default="d12", help="whose other settings all runs have (default d12)")
    add("--depths", type=int, nargs="+", required=True, metavar="N", help="layers")
    add("--batches", type=int, nargs="+", required=True, metavar="N", help="tokens of a step")
    add("--flops", type=float, nargs="+", required=True, metavar="N", help="training compute of a run")
    add("--rates", type=float, nargs="+", default=[1.0], metavar="X", help="factors on all learning rates (default 1)")
    add("--fewest-steps", type=int, default=100, metavar="N", help="leave out shorter runs (default 100)")
    add("--within", type=float, metavar="SECONDS", help="begin no run that would probably end later than that")
    add("--plan", action="store_true", help="show the runs, and train nothing")
    return parser


def plan(options: argparse.Namespace, overrides: Sequence[str], names: Sequence[str] = ()) -> list[Run]:
    """The runs of the grid, the cheapest first.

    Raises:
      UserError: an option that launch.py would refuse, or no run that is long enough.
    """
    from jaxchat.model.config import GPTConfig
    from jaxchat.recipes import counted_parameters
    from jaxchat.train.budget import flops_per_token, training_length

    runs = []
    grid = itertools.product(sorted(options.flops), options.depths, options.batches, options.rates)
    for flops, depth, batch, factor in grid:
        own = (
            *(*overrides, *QUIET, f"--model.depth={depth}", f"--pretrain.batch-tokens={batch}"),
            *("--pretrain.num-iterations=None", f"--pretrain.target-flops={flops:g}"),
            f"--pretrain.lr-fraction={factor:g}",
        )
        experiment = configure(options.experiment, list(own), options.data, names)
        vocab_size = experiment.tokenizer.vocab_size
        model = GPTConfig.of(experiment.model, vocab_size)
        steps = training_length(experiment.pretrain, model)
        if steps < options.fewest_steps:
            continue
        facts = {
            **{"flops": flops, "depth": depth, "batch_tokens": batch, "lr_fraction": factor, "steps": steps},
            **{"parameters": counted_parameters(experiment.model, vocab_size), "tokens": steps * batch},
            **{"rate": factor * experiment.optimizer.matrix_lr, "decay": experiment.optimizer.matrix_weight_decay},
            **{"real_flops": float(steps * batch * flops_per_token(model))},
        }
        place = () if options.data is None else (f"--data={options.data}",)
        name = f"{flops:g}-d{depth}-{batch}-{factor:g}"
        runs.append(Run(name, (f"--experiment={options.experiment}", *place, *own), facts))
    check(bool(runs), f"no run has {options.fewest_steps:,} steps or more; give more --flops or smaller --batches")
    return runs


def carry_out(runs: Sequence[Run], out: Path, within: float | None) -> tuple[list[dict[str, Any]], bool]:
    """The records of the runs that are finished, and whether one failed."""
    began, file = time.perf_counter(), str(out / "runs.jsonl")
    known, records, failed, tokenizer = read(file), [], False, out / "tokenizer"
    for run in runs:
        found = next((one for one in known if one["options"] == list(run.options)), None)
        if found is None:
            # Runs of one budget take about as long as each other.
            alike = [one["all_seconds"] / one["flops"] * run.facts["flops"] for one in known]
            if within is not None and time.perf_counter() - began + max(alike, default=0.0) > within:
                say(f"{run.name}: left for another time")
                continue
            if not (tokenizer / "tokenizer" / "stage.json").exists() and not _launch(run, tokenizer, "tokenizer"):
                return records, True
            found = _train(run, out / "runs" / run.name, tokenizer / "tokenizer")
            if found is None:
                failed = True
                continue
            write(file, found)
            known.append(found)
            say(f"{run.name}: {found['bpb']:.4f} bits per byte after {found['steps']:,} steps")
        records.append(found)
    return records, failed


def _train(run: Run, directory: Path, tokenizer: Path) -> dict[str, Any] | None:
    """The record of a run; None if it failed."""
    from jaxchat.runs.metrics import read_metrics

    began = time.perf_counter()
    if not _launch(run, directory, "tokenizer,pretrain", f"--tokenizer.path={tokenizer}"):
        return None
    curve = [[line["step"], 0.0, line["bpb"]] for line in read_metrics(directory) if "bpb" in line]
    shutil.rmtree(directory / "pretrain" / "checkpoints")
    return {
        **{"name": run.name, "options": list(run.options), **run.facts, "bpb": curve[-1][2], "curve": curve},
        **{"all_seconds": time.perf_counter() - began, "date": date.today().isoformat()},
    }


def _launch(run: Run, directory: Path, stages: str, *more: str) -> bool:
    """Runs launch.py, which goes on where it was stopped; whether it succeeded."""
    log = Path(f"{directory}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(LAUNCH), *run.options, *more, f"--run-dir={directory}", f"--stages={stages}"]
    with log.open("a") as lines:
        code = subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        say(f"{run.name} failed with code {code}, see {log}: {last}")
    return code == 0


def report(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Prints the tables, and writes figures and curves."""
    if not records:
        return
    found = fits(records)
    (out / "scaling.json").write_text(json.dumps({**found, "runs": records}, indent=2) + "\n")
    head = ("FLOPs", "depth", "batch", "rate x", "bits per byte", "best parameters", "tokens for each")
    table(head, budget_rows(found))
    table(("exponent", "here", "optima", "published"), law_rows(found))
    draw(records, found, str(out / "scaling.png"))
    say(f"all figures are in {out / 'scaling.json'}, the curves in {out / 'scaling.png'}")


def _show_plan(runs: Sequence[Run]) -> None:
    rows = [
        [run.name, *(f"{run.facts[name]:,}" for name in ("parameters", "steps", "tokens")), f"{run.facts['rate']:.3g}"]
        for run in runs
    ]
    table(("run", "parameters", "steps", "tokens", "Muon's rate"), rows)
    print(f"\n{len(runs)} runs, {sum(run.facts['real_flops'] for run in runs):.3g} FLOPs in all")


if __name__ == "__main__":
    sys.exit(main())
