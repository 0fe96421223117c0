"""How the best model, batch and learning rate grow with compute: trains a grid, fits the optima and their exponents.

    python benchmarks/scaling.py --data DIR --out scaling --experiment d12_modern --depths 4 6 8 10 12 \\
        --batches 131072 65536 262144 --flops 3e15 1e16 3e16
    python benchmarks/scaling.py --data DIR --out rates --experiment d12_modern --depths 8 --flops 3e16 \\
        --batches 131072 262144 --rates 0.5 1 2                # the best rate of each batch
    python benchmarks/scaling.py ... --plan                    # shows the runs and their seconds, and trains nothing
    for g in 0 1; do CUDA_VISIBLE_DEVICES=$g python benchmarks/scaling.py ... & done; wait

Each run is a pretraining as launch.py does it, as long as its budget of FLOPs allows, evaluated at its end on 2,097,152
tokens. Options of launch.py may follow the benchmark's own. With rules, as d12_modern has them and --rules=nanochat
sets them, the rates follow from batch and tokens; --rates are factors on them. A run with few steps says nothing of a
long training: those under --fewest-steps are left out. Nor does one that reads a little text over and over say what
more text teaches: --most-tokens leaves those out.

The smallest budgets come first, and of each the first batch with all depths, so that a grid that is cut off is of use.
All runs of one depth and batch share a compiled program. Several processes may share DIR, one on each GPU or two on one
(with XLA_PYTHON_CLIENT_MEM_FRACTION=0.45), so that one trains while the other compiles: each takes the next run that no
other has begun.

DIR/runs.jsonl gets a line for each run that is finished, which is not done again; one that was stopped is. All runs
share a tokenizer. DIR/scaling.json has all records, the optima and the fits, with the published exponents beside them;
DIR/scaling.png the curves. Only optima inside the grid count for an exponent.

--write-law also fits bits per byte as a function of parameters and tokens, to the best runs that read the text up to
four times, and writes it where the dry run finds it; with --within=0 nothing more is trained before that.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout
from jaxchat_quality import Trainer
from quality_runs import Measured, figures, read, write
from scaling_fits import budget_rows, draw, fits, law_rows
from scaling_law import fit_law, write_law
from timing import say, table

from jaxchat.cli.launch import prepare_jax
from jaxchat.cli.options import configure
from jaxchat.cli.parser import option_strings
from jaxchat.config import Experiment
from jaxchat.errors import UserError, check
from jaxchat.planning import expected_quality

# Enough to tell runs apart: the experiments' own evaluations would take longer than the shortest runs.
EVALUATED = "--pretrain.eval-tokens=2097152"
Measure = Callable[[Experiment, Sequence[int]], Measured]


@dataclass(frozen=True)
class Run:
    """A training of the grid: its options for launch.py, and what follows from them."""

    name: str
    options: tuple[str, ...]
    experiment: Experiment
    facts: dict[str, Any]

    @property
    def kind(self) -> tuple[int, int]:
        """What it shares a compiled program with."""
        return self.facts["depth"], self.facts["batch_tokens"]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns 2 for options that cannot be used, or if a run fails."""
    parser = _parser()
    options, overrides = parser.parse_known_args(argv)
    out = Path(options.out)
    try:
        runs = plan(options, overrides, option_strings(parser))
        if options.plan:
            _show_plan(runs, read(_records(out)))
            return 0
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # by default a quarter of it is left
        prepare_jax()
        failed = carry_out(runs, out, Trainer(out / "shared"), options.within)
        records = [record for record in read(_records(out)) if record["steps"] >= options.fewest_steps]
        report(records, out)
        if options.write_law:
            law = fit_law(records, options.experiment, options.write_law)
            write_law(law, expected_quality.FILE)
            say(f"{expected_quality.FILE} has {law}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 2 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="where records, figures and curves are kept")
    add("--data", metavar="DIR", help="folder of text, as for launch.py (default: the experiment's)")
    add("--experiment", default="d12", help="whose other settings all runs have (default d12)")
    add("--depths", type=int, nargs="+", required=True, metavar="N", help="layers")
    add("--batches", type=int, nargs="+", required=True, metavar="N", help="tokens of a step, the most important first")
    add("--flops", type=float, nargs="+", required=True, metavar="N", help="training compute of a run")
    add("--rates", type=float, nargs="+", default=[1.0], metavar="X", help="factors on all learning rates (default 1)")
    add("--fewest-steps", type=int, default=200, metavar="N",
        help="leave out shorter runs, also those that are there already (default 200)")  # fmt: skip
    add("--most-tokens", type=float, default=math.inf, metavar="N",
        help="leave out runs on more tokens, such as four times those of the text (default: none)")  # fmt: skip
    add("--within", type=float, metavar="SECONDS", help="begin no run that would probably end later than that")
    add("--write-law", metavar="TEXT", help="fit the law by which the dry run expects quality; TEXT names the text")
    add("--plan", action="store_true", help="show the runs and how long they may take, and train nothing")
    return parser


def plan(options: argparse.Namespace, overrides: Sequence[str], names: Sequence[str] = ()) -> list[Run]:
    """The runs of the grid in their order.

    Raises:
      UserError: an option that launch.py would refuse, or no run that is long enough.
    """
    from jaxchat.model.config import GPTConfig
    from jaxchat.recipes import counted_parameters
    from jaxchat.train.budget import pretraining_flops_per_token, training_length, training_tokens

    runs = []
    for flops, factor, batch, depth in itertools.product(
        sorted(options.flops), options.rates, options.batches, options.depths
    ):
        own = (
            *(EVALUATED, *overrides, f"--model.depth={depth}", f"--pretrain.batch-tokens={batch}"),
            *("--pretrain.num-iterations=None", f"--pretrain.target-flops={flops:g}"),
            f"--pretrain.lr-fraction={factor:g}",
        )
        experiment = configure(options.experiment, list(own), options.data, names)
        vocab_size, config = experiment.tokenizer.vocab_size, experiment.pretrain
        model = GPTConfig.of(experiment.model, vocab_size)
        steps, tokens = training_length(config, model), training_tokens(config, model)
        if steps < options.fewest_steps or tokens > options.most_tokens:
            continue
        facts = {
            **{"flops": flops, "depth": depth, "batch_tokens": batch, "lr_fraction": factor, "steps": steps},
            **{"parameters": counted_parameters(experiment.model, vocab_size), "tokens": tokens},
            **{"rate": factor * experiment.optimizer.matrix_lr, "decay": experiment.optimizer.matrix_weight_decay},
            **{"real_flops": float(tokens * pretraining_flops_per_token(config, model))},
        }
        place = () if options.data is None else (f"--data={options.data}",)
        name = f"{flops:g}-d{depth}-{batch}-{factor:g}"
        runs.append(Run(name, (f"--experiment={options.experiment}", *place, *own), experiment, facts))
    few, most = f"{options.fewest_steps:,} steps or more", f" and {options.most_tokens:,.0f} tokens or fewer"
    which = few + most * math.isfinite(options.most_tokens)
    check(bool(runs), f"no run has {which}; give more --flops or smaller --batches")
    return runs


def carry_out(runs: Sequence[Run], out: Path, measure: Measure, within: float | None) -> bool:
    """Trains what no process has trained or begun, and adds it to the records; returns whether a run failed.

    Of one budget, the runs come first for which this process has compiled the program.
    """
    import jax

    began, file, left, mine, failed = time.perf_counter(), _records(out), list(runs), set(), []
    while left:
        run = min(left, key=lambda run: (run.facts["flops"], run.kind not in mine))
        left.remove(run)
        claim = _claim(run, out)
        if claim is None:
            continue  # another process does it
        with claim as lock:
            known = read(file)
            if any(one["options"] == list(run.options) for one in known):
                continue
            takes = expected_seconds(run, known, run.kind in mine)
            if within is not None and time.perf_counter() - began + takes > within:
                say(f"{run.name}: left for another time")
                continue
            try:
                found = _record(run, measure)
            except KeyboardInterrupt:
                say(f"{run.name}: stopped")
                break
            except (UserError, jax.errors.JaxRuntimeError) as error:
                say(f"{run.name} failed: {error}")
                failed.append(lock.acquire())  # kept to the end: another process would fail too
                continue
            mine.add(run.kind)
            with FileLock(out / "lock"):
                write(file, found)
            bpb = "diverged" if found["bpb"] is None else f"{found['bpb']:.4f} bits per byte"
            say(f"{run.name}: {bpb} after {found['steps']:,} steps, {found['seconds']:.1f} of "
                f"{found['all_seconds']:.1f} s")  # fmt: skip
    return bool(failed)


def _records(out: Path) -> str:
    return str(out / "runs.jsonl")


def _claim(run: Run, out: Path) -> AcquireReturnProxy | None:
    """A lock on the run, which ends with this process at the latest; None if another process has it."""
    folder = out / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{run.name}-{hashlib.sha256(repr(run.options).encode()).hexdigest()[:8]}")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        return None


def _record(run: Run, measure: Measure) -> dict[str, Any]:
    began = time.perf_counter()
    measured = measure(run.experiment, (run.facts["steps"],))
    found = figures(measured["times"], measured["scores"])
    return {
        **{"name": run.name, "options": list(run.options), **run.facts, "bpb": found["curve"][-1][2], **found},
        **{name: measured[name] for name in ("passes", "peak_memory_bytes", "device")},
        **{"all_seconds": time.perf_counter() - began, "date": date.today().isoformat()},
    }


def expected_seconds(run: Run, known: Iterable[dict[str, Any]], compiled: bool) -> float:
    """What a run will probably take: as the records closest in depth; without any, as its experiment expects to.

    Args:
      compiled: whether its program is.
    """
    from jaxchat.devices.machine import device_peak_flops

    known, flops, depth = list(known), run.facts["real_flops"], run.facts["depth"]
    if not known:
        peak = device_peak_flops(run.experiment.cost.device)
        return flops / (run.experiment.cost.expected_mfu * peak) if peak else 0.0
    nearest = min(abs(one["depth"] - depth) for one in known)
    pace = max(one["seconds"] / one["real_flops"] for one in known if abs(one["depth"] - depth) == nearest)
    besides = [one["all_seconds"] - one["seconds"] for one in known]  # compiling, if it was to be, and evaluation
    return pace * flops + (min(besides) if compiled else max(besides))


def report(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Prints the tables, and writes figures and curves."""
    if not records:
        return
    found = fits(records)
    head = ("FLOPs", "depth", "batch", "rate x", "bits per byte", "best parameters", "tokens for each")
    table(head, budget_rows(found))
    table(("exponent", "here", "optima", "published"), law_rows(found))
    with FileLock(out / "lock"):
        (out / "scaling.json").write_text(json.dumps({**found, "runs": records}, indent=2) + "\n")
        draw(records, found, str(out / "scaling.png"))
    say(f"all figures are in {out / 'scaling.json'}, the curves in {out / 'scaling.png'}")


def _show_plan(runs: Sequence[Run], known: Sequence[dict[str, Any]]) -> None:
    rows, seconds, kinds = [], [], set()
    for run in runs:
        seconds.append(expected_seconds(run, known, run.kind in kinds))
        kinds.add(run.kind)
        counts = (f"{run.facts[name]:,}" for name in ("parameters", "steps", "tokens"))
        rows.append([run.name, *counts, f"{run.facts['rate']:.3g}", f"{seconds[-1]:.0f}"])
    table(("run", "parameters", "steps", "tokens", "Muon's rate", "seconds"), rows)
    flops, cost = math.fsum(run.facts["real_flops"] for run in runs), runs[0].experiment.cost
    basis = f"at {cost.expected_mfu:.0%} MFU of one {cost.device}, without compiling and evaluating"
    if known:
        basis = f"by the {len(known)} runs so far, in one process"
    print(f"\n{len(runs)} runs, {flops:.3g} FLOPs and about {math.fsum(seconds):.0f} s in all, {basis}")


if __name__ == "__main__":
    sys.exit(main())
