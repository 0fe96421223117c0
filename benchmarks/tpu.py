"""Compiles the training step for TPUs on a machine without one, and prints the memory that it takes.

    pip install '.[tpu]'
    python benchmarks/tpu.py
    python benchmarks/tpu.py --depth 20 --chips v5e-8 --fsdp 1 --rows 4 8 --remat=mlp
    python benchmarks/tpu.py --depth 12 --chips v6e-8 --model.window-pattern=SSSL

The step is that of pretraining: model, loss, gradients over all micro-batches, Muon and AdamW, in bf16. The TPU's own
compiler (libtpu) compiles it ahead of time; nothing runs, so there is no speed here. `held` is the memory of
parameters, optimizer and batch, `step` what a step takes in addition, and `code` the program, which a TPU holds in the
same memory. Where the plain step does not fit into 95 % of a chip's memory, those that recompute more are tried, as in
a run. `splash` counts the calls of splash attention's kernels in the compiled program: three a layer, where the
backward pass does not compute attention again. Other fields of an experiment may follow, as for launch.py. A
compilation takes two to four minutes on two cores; the dry run of launch.py leaves out what takes most of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from datetime import date
from typing import Any

from timing import machine, say, table

from jaxchat.analysis.dry_run import compile_stage
from jaxchat.analysis.planned_devices import Chips, Generation, chips, generation, why_not, without_tpus
from jaxchat.cli.options import override
from jaxchat.cli.parser import option_strings
from jaxchat.config import Experiment, MeshConfig, ModelConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.errors import UserError, check
from jaxchat.model.config import GPTConfig
from jaxchat.train.memory import GIB, SPARE

VOCABULARY = 32_768


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 2 if nothing could be compiled."""
    parser = _parser()
    options, overrides = parser.parse_known_args(argv)
    try:
        problem = why_not()
        check(problem is None, problem or "")
        without_tpus()
        slices = {name: chips(*_slice(name)) for name in options.chips}
        works = [
            (name, _experiment(name, depth, fsdp, rows, overrides, option_strings(parser)))
            for name, depth, fsdp, rows in itertools.product(slices, options.depth, options.fsdp, options.rows)
        ]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = open(options.json, "w") if options.json else None
    records = []
    for number, (on, experiment) in enumerate(works, 1):
        name = f"d{experiment.model.depth} on {on}, fsdp {experiment.mesh.fsdp}"
        say(f"{number} of {len(works)}, {name}: compiling, for minutes")
        record = {"chips": on, "overrides": overrides, "date": date.today().isoformat()}
        try:
            record |= _figures(slices[on], experiment)
        except Exception as error:  # what one program fails with is a line of the table
            record |= _named(experiment) | {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        records.append(record)
        say(f"{name}: {record.get('error') or _total(record)}")
        if file:
            print(json.dumps(record), file=file, flush=True)
    _print(records)
    return 0 if any("error" not in record for record in records) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--depth", type=int, nargs="+", default=[12, 20], help="one or more depths (default 12 20)")
    add("--chips", nargs="+", default=["v5e-8", "v6e-8"], metavar="KIND-N",
        help="kinds of TPU (v4, v5e, v5p, v6e) with numbers of chips (default v5e-8 v6e-8)")  # fmt: skip
    add("--fsdp", type=int, nargs="+", default=[1, 8], metavar="N",
        help="devices that share parameters and optimizer; the rest are data-parallel (default 1 8)")  # fmt: skip
    add("--rows", type=int, nargs="+", default=[8], help="of 2,048 tokens, per chip and micro-batch (default 8)")
    add("--json", metavar="FILE", help="write all figures to FILE, one JSON object per line")
    return parser


def _slice(name: str) -> tuple[Generation, int]:
    """The chips that are called, for example, `v5e-8`."""
    kind, _, count = name.rpartition("-")
    check(bool(kind) and count.isdecimal(), f"--chips is {name!r}; write a kind of TPU and a number, such as v5e-8")
    chip = generation(f"TPU {kind}")
    assert chip is not None, "its name begins with TPU"
    return chip, int(count)


def _experiment(name: str, depth: int, fsdp: int, rows: int, overrides: list[str], names: list[str]) -> Experiment:
    chip, count = _slice(name)
    base = Experiment(name="benchmark", model=ModelConfig(depth), mesh=MeshConfig(fsdp=fsdp))
    base = dataclasses.replace(
        base,
        pretrain=dataclasses.replace(base.pretrain, device_rows=rows),
        # A device with a known peak is an accelerator: the step is compiled in bf16.
        cost=dataclasses.replace(base.cost, device=f"TPU {chip.names[0]}", devices=count),
    )
    return override(base, overrides, names)


def _named(experiment: Experiment) -> dict[str, Any]:
    mesh = experiment.mesh
    return {"depth": experiment.model.depth, "fsdp": mesh.fsdp, "rows": experiment.pretrain.device_rows}


def _figures(chips: Chips, experiment: Experiment) -> dict[str, Any]:
    mesh = make_mesh(experiment.mesh, chips.devices)
    limit = int((1 - SPARE) * chips.memory)
    step = compile_stage(experiment, "pretrain", GPTConfig.of(experiment.model, VOCABULARY), mesh, limit)
    analysis, text = step.compiled.memory_analysis(), step.compiled.as_text()
    assert analysis and text, "libtpu gives both"
    return _named(experiment) | {
        "mesh": dict(mesh.shape),
        "device_kind": mesh.devices.flat[0].device_kind,
        "remat": step.remat,
        "fits": step.fits,
        "held_bytes": step.memory.held,
        "used_bytes": step.memory.used,
        "code_bytes": analysis.generated_code_size_in_bytes,
        "memory_bytes": chips.memory,
        "tried_bytes": {choice.remat: memory.total for choice, memory in step.memories.items()},
        "splash_calls": text.count('custom_call_target="tpu_custom_call"'),
        "seconds": step.seconds,
        "machine": machine("jax", "jaxlib", "libtpu"),
    }


# --- the table --------------------------------------------------------------------------------------------------------


def _total(record: dict[str, Any]) -> str:
    total = record["held_bytes"] + record["used_bytes"] + record["code_bytes"]
    return f"{total / GIB:.2f} of {record['memory_bytes'] / GIB:.2f} GiB" + ("" if record["fits"] else ", too much")


def _print(records: list[dict[str, Any]]) -> None:
    head = ["chips", "model", "data x fsdp", "rows", "remat", "held, GiB", "step", "code", "in all", "splash", "s"]
    table(head, [_line(record, len(head)) for record in records])
    compiled = [record for record in records if "error" not in record]
    if compiled:
        versions = compiled[0]["machine"]
        print(f"\njax {versions['jax']}, libtpu {versions['libtpu']}, {versions['cores']} cores; compiled, not run")


def _line(record: dict[str, Any], columns: int) -> list[str]:
    cells = [record["chips"], f"d{record['depth']}"]
    if "error" in record:
        cells += [f"? x {record['fsdp']}", str(record["rows"]), record["error"]]
        return cells + [""] * (columns - len(cells))
    return [
        *cells,
        f"{record['mesh']['data']} x {record['mesh']['fsdp']}",
        str(record["rows"]),
        record["remat"],
        *(f"{record[f'{part}_bytes'] / GIB:.2f}" for part in ("held", "used", "code")),
        _total(record),
        str(record["splash_calls"]),
        f"{sum(record['seconds'].values()):.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
